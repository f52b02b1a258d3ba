"""Several processes on one store: which one this is, and one a device started from here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dove_fast.errors import StoreError
from dove_fast.jobs.progress import OnProgress, Progress
from dove_fast.store.layout import read_manifest, records_path
from dove_fast.store.records import read_unit

__all__ = ["Ended", "Rank", "StoreWatch", "rank_from", "run_on_devices"]

# Seconds between looks at the processes, and for them to end when they are asked to.
POLL, PATIENCE = 0.2, 30.0
# Bytes of a process's stderr that are told, its last ones.
TAIL = 8192
# Seconds between looks at the store, and how much longer than a look that is at least.
LOOK, REST = 1.0, 10


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


@dataclass(frozen=True)
class Ended:
    """How the process of a device ended: its exit code, below 0 the signal that killed it; the end of its stderr."""

    device: str
    code: int
    error: str

    @property
    def how(self) -> str:
        """The exit code or the signal, in words."""
        if self.code >= 0:
            return f"exit code {self.code}"
        known = (number.name for number in signal.Signals if number == -self.code)
        return f"killed by {next(known, f'signal {-self.code}')}"


def run_on_devices(
    arguments: Sequence[str], devices: Sequence[str], *, on_poll: Callable[[], None] | None = None
) -> list[Ended]:
    """Run `dove-fast ARGUMENTS --join --device D` once a device, and return how each ended.

    `on_poll` is called every `POLL` seconds. A process that fails leaves its unit to the others. At KeyboardInterrupt
    all are asked to end as they would be by Ctrl-C, and it is raised again once they have.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        # Files, because a process waits for a reader once a pipe is full.
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in devices]
        try:
            for device, error in zip(devices, errors, strict=True):
                command = [sys.executable, "-m", "dove_fast.cli", *arguments, "--join", "--device", device]
                processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=error))
            while any(process.poll() is None for process in processes):
                time.sleep(POLL)
                if on_poll is not None:
                    on_poll()
        except BaseException:
            _end(processes)
            raise
        return [
            Ended(device, process.returncode, _tail(error))
            for device, process, error in zip(devices, processes, errors, strict=True)
        ]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - TAIL, 0))
    return file.read().decode(errors="replace").strip()


class StoreWatch:
    """Tells from a store's files how far the processes are that write it, in units.

    Units that were done before this was made count as done, and are not read: `images` and tokens are those of the
    units that came since. Nothing is told while there is no store.
    """

    def __init__(self, directory: Path, on_progress: OnProgress) -> None:
        self.images = 0
        self._directory = directory
        self._on_progress = on_progress
        self._done = self._names()
        self._units: int | None = None
        self._tokens = 0
        self._start = self._next = time.perf_counter()

    def poll(self) -> None:
        """Look, if it is time for it: a million names take a while."""
        start = time.perf_counter()
        if start < self._next:
            return
        self.look()
        end = time.perf_counter()
        self._next = end + max(LOOK, REST * (end - start))

    def look(self) -> None:
        """Tell how far it is now."""
        for name in sorted(self._names() - self._done):
            unit = read_unit(self._records / name)
            # The name may be there before the file is, on a network.
            if unit is not None:
                self._done.add(name)
                self.images += unit.records
                self._tokens += unit.tokens
        if self._units is None:
            with contextlib.suppress(OSError, StoreError):
                self._units = read_manifest(self._directory)["settings"].get("units")
        if self._units is not None:
            elapsed = time.perf_counter() - self._start
            self._on_progress(Progress(len(self._done), self._units, self.images, self._tokens, elapsed=elapsed))

    @property
    def _records(self) -> Path:
        return records_path(self._directory, 0).parent

    def _names(self) -> set[str]:
        with contextlib.suppress(OSError):
            return {name for name in os.listdir(self._records) if name.endswith(".parquet")}
        return set()
