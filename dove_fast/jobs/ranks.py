"""Several processes on one store: which one this is, and one a device started from here."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Rank", "rank_from", "run_on_devices"]

# Seconds between looks at the processes, and for them to end when they are asked to.
POLL, PATIENCE = 0.2, 30.0


@dataclass(frozen=True)
class Rank:
    """Process `rank` of `world_size`, the `local`-th on its machine; `origin` says what started them."""

    rank: int
    world_size: int
    local: int
    origin: str


def rank_from(environment: Mapping[str, str]) -> Rank | None:
    """Return what torchrun, or a Slurm step of several tasks (srun), says of this process; None where neither does.

    A Slurm job's own script is one process, whatever the job's number of tasks. Raises `ValueError` for variables that
    are no numbers.
    """
    for origin, marker, names in (
        ("torchrun", "TORCHELASTIC_RUN_ID", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        ("Slurm", "SLURM_STEP_ID", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")),
    ):
        if marker not in environment or any(name not in environment for name in names):
            continue
        try:
            rank, world_size, local = (int(environment[name]) for name in names)
        except ValueError:
            raise ValueError(f"{', '.join(names)} must be numbers, set by {origin}") from None
        return Rank(rank, world_size, local, origin)
    return None


def run_on_devices(
    arguments: Sequence[str], devices: Sequence[str], *, on_poll: Callable[[], None] | None = None
) -> list[tuple[str, int, str]]:
    """Run `dove-fast ARGUMENTS --join --device D` once a device, and return each device, exit code and stderr.

    A process that fails leaves its unit to the others. At KeyboardInterrupt all are asked to end as they would be
    by Ctrl-C, and it is raised again once they have.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dove_fast.cli", *arguments, "--join", "--device", device],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for device in devices
    ]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(POLL)
            if on_poll is not None:
                on_poll()
    except BaseException:
        for process in processes:
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
        raise
    finally:
        errors = [process.communicate()[1] for process in processes]
    return [
        (device, process.returncode, error) for device, process, error in zip(devices, processes, errors, strict=True)
    ]
