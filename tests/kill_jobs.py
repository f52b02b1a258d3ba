"""Kill tokenization jobs by SIGKILL, over and over: `python kill_jobs.py INPUT OUTPUT CHECKPOINT KILLS JOBS SEED`.

A process that has imported everything forks each job, so that a kill costs no new interpreter. JOBS of them work on one
store at a time. Prints how often a job was killed, and how often it had been alive in the store by then.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from dove_fast.jobs import TokenizeOptions, load_model, tokenize

OPTIONS = {"batch_size": 3, "shard_size": 2, "workers": 0}
# In the time that undisturbed jobs take: kills fall everywhere.
LONGEST = 1.1


def begin(source: str, output: Path, loaded, join: bool) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        tokenize(source, output, loaded, TokenizeOptions(join=join, **OPTIONS))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # No exit handler of the parent's may run here.
        os._exit(code)


def main(source: str, output: Path, checkpoint: str, kills: int, jobs: int, seed: int) -> None:
    torch.set_num_threads(1)
    loaded = load_model(checkpoint, device="cpu")
    moments = random.Random(seed)
    start = time.monotonic()
    for process in [begin(source, output, loaded, jobs > 1) for _ in range(jobs)]:
        os.waitpid(process, 0)
    undisturbed = time.monotonic() - start
    killed = in_the_middle = 0
    while killed < kills:
        shutil.rmtree(output)
        while not complete(output):
            running = [begin(source, output, loaded, jobs > 1) for _ in range(jobs)]
            deadline = time.monotonic() + moments.uniform(0, LONGEST * undisturbed)
            while running and time.monotonic() < deadline:
                running = [process for process in running if os.waitpid(process, os.WNOHANG) == (0, 0)]
                time.sleep(0.002)
            for process in running:
                os.kill(process, signal.SIGKILL)
                killed += 1
                in_the_middle += (output / "manifest.json").exists() and not complete(output)
            for process in running:
                os.waitpid(process, 0)
    print(killed, in_the_middle)


def complete(output: Path) -> bool:
    try:
        return '"complete": true' in (output / "manifest.json").read_text()
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
