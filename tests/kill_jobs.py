"""Kill tokenization jobs by SIGKILL, over and over: `python kill_jobs.py INPUT STORES CHECKPOINT KILLS WORKERS SEED`.

A process that has imported everything forks each job, so that a kill costs no new interpreter. WORKERS says how many
jobs work on one store at a time, and how many decoding processes each has, such as 0,1,2 for three jobs. STORES gets
one store after the other, each of them finished whatever is killed: 000 without a kill, then as many as it takes to
kill KILLS jobs. Prints JSON: for every store how many units were done at each kill, and how many decoding processes
outlived a killed job. Fails if a job does that is not killed, or if a decoding process stays.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from dove_fast.jobs import LoadedModel, TokenizeOptions, load_model, tokenize

# After how many more units jobs are killed, by turns at random: kills fall everywhere however fast the machine is, and
# every store is finished. At 0 at any moment, also before the first unit or after the last one.
AFTER = (0, 1, 2)
# Seconds for decoding processes to notice that their job is gone.
PATIENCE = 20.0
# Of <linux/prctl.h>: processes whose parent dies come to this one, and not to the system's first.
PR_SET_CHILD_SUBREAPER = 36


def options(**more) -> TokenizeOptions:
    return TokenizeOptions(batch_size=3, shard_size=2, **more)


def begin(source: str, output: Path, loaded: LoadedModel, workers: list[int]) -> list[int]:
    """Start the jobs on one store, and return their processes."""
    processes = []
    for count in workers:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                tokenize(source, output, loaded, options(workers=count, join=len(workers) > 1))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                # No exit handler of the parent's may run here.
                os._exit(code)
        processes.append(process)
    return processes


def running(processes: list[int]) -> list[int]:
    """Return those that have not ended; who ended by itself did so well."""
    ended = [os.waitpid(process, os.WNOHANG) for process in processes]
    assert not any(status for _, status in ended), f"a job ended with status {ended}"
    return [process for process, (found, _) in zip(processes, ended, strict=True) if not found]


def reap() -> int:
    """Wait for the decoding processes that killed jobs left, and return how many there were."""
    count = 0
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return count
        count += found > 0
        if time.monotonic() > deadline:
            stay = children(os.getpid())
            for process in stay:
                os.kill(process, signal.SIGKILL)
            raise AssertionError(f"decoding processes stay without their job: {stay}")
        if not found:
            time.sleep(0.002)


def children(process: int) -> list[int]:
    """Return the processes that any thread of a process has started."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_alive(process: int) -> bool:
    """Tell whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def whole_units(output: Path) -> int:
    return len(list((output / "records").glob("[0-9]*.parquet")))


def complete(output: Path) -> bool:
    try:
        return '"complete": true' in (output / "manifest.json").read_text()
    except FileNotFoundError:
        return False


def main(source: str, stores: Path, checkpoint: str, kills: int, workers: list[int], seed: int) -> None:
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl failed")
    torch.set_num_threads(1)
    loaded = load_model(checkpoint, device="cpu")
    moments = random.Random(seed)
    start = time.monotonic()
    processes = begin(source, stores / "000", loaded, workers)
    while processes := running(processes):
        time.sleep(0.002)
    undisturbed = time.monotonic() - start
    units = whole_units(stores / "000")
    assert reap() == 0
    done: list[list[int]] = [[]]
    orphans = 0
    while sum(map(len, done)) < kills:
        output = stores / f"{len(done):03d}"
        done.append([])
        while not complete(output):
            after = moments.choice(AFTER)
            wanted = whole_units(output) + after
            wait = moments.uniform(0, undisturbed / (2 if after == 0 else units))
            processes = begin(source, output, loaded, workers)
            while (processes := running(processes)) and whole_units(output) < wanted:
                time.sleep(0.002)
            deadline = time.monotonic() + wait
            while (processes := running(processes)) and time.monotonic() < deadline:
                time.sleep(0.002)
            reached = whole_units(output)
            for process in processes:
                os.kill(process, signal.SIGKILL)
            for process in processes:
                _, status = os.waitpid(process, 0)
                # It may have ended just before.
                if status == signal.SIGKILL:
                    done[-1].append(reached)
                else:
                    assert status == 0, f"a job ended with status {status}"
        orphans += reap()
    print(json.dumps({"done": done, "orphans": orphans, "undisturbed": undisturbed}))


if __name__ == "__main__":
    _, source, stores, checkpoint, kills, workers, seed = sys.argv
    main(source, Path(stores), checkpoint, int(kills), [int(count) for count in workers.split(",")], int(seed))
