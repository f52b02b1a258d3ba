"""Killed anywhere, any number of times, with any number of jobs and workers: the store is the same, byte for byte."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kill_jobs import children, options
from kill_switch import contents
from made_pictures import add_bad, make_pictures
from small_models import micro_model

from dove_fast.atomic import is_temporary
from dove_fast.jobs import LoadedModel, load_model, tokenize

KILL_JOBS = Path(__file__).parents[1] / "kill_jobs.py"
PICTURES = 24


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The pictures, a checkpoint, and what an undisturbed job makes of them."""
    folder = tmp_path_factory.mktemp("kills")
    photos = make_pictures(folder / "photos", PICTURES // 4)
    for copy in range(3):
        make_pictures(folder / "photos" / f"more-{copy}", PICTURES // 4)
    add_bad(photos)
    model = micro_model()
    model.save_pretrained(folder / "model")
    with one_thread():
        tokenize(photos, folder / "whole", LoadedModel(model, model.fingerprint()), options(workers=0))
    return photos, folder / "model", contents(folder / "whole")


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if is_temporary(Path(name).name)]
    for name, content in expected.items():
        assert found[name] == content, name


@pytest.mark.parametrize(
    ("kills", "workers"),
    [
        (12, "0,1,2"),
        *(pytest.param(60, workers, marks=pytest.mark.slow) for workers in ("0", "2", "0,1,2")),
    ],
)
def test_many_kills_and_the_same_bytes(tmp_path, job, kills, workers):
    photos, model, expected = job
    done = subprocess.run(
        [sys.executable, KILL_JOBS, photos, tmp_path, model, str(kills), workers, "7"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # Nor does a decoding process that is left say anything.
    assert done.stderr == ""
    told = json.loads(done.stdout)
    stores = sorted(tmp_path.iterdir())
    compared = 0
    for store, units in zip(stores, told["done"], strict=True):
        assert_same(contents(store), expected)
        compared += len(units)
    assert compared >= kills
    # Not only before the first unit and after the last one.
    total = sum(name.startswith("records/") for name in expected)
    assert sum(0 < unit < total for units in told["done"] for unit in units) >= kills // 2, told
    # Not only before there were decoding processes; that they end is seen there.
    assert told["orphans"] >= (kills // 4 if workers != "0" else 0), told


def test_a_job_whose_decoding_processes_are_killed_goes_on(tmp_path, job):
    photos, model, expected = job
    seen, killed = set[int](), set[int]()
    moments = [PICTURES // 2, PICTURES // 4]

    def kill(progress) -> None:
        workers = [child for child in children(os.getpid()) if is_worker(child)]
        seen.update(workers)
        # Twice: a third time, an image that has been there each time would be blamed.
        if moments and progress.images >= moments[-1]:
            moments.pop()
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            killed.update(workers)

    with one_thread():
        tokenize(photos, tmp_path / "s", load_model(model, device="cpu"), options(workers=2), on_progress=kill)
    assert len(killed) >= 3 and seen - killed, (seen, killed)
    assert_same(contents(tmp_path / "s"), expected)


def is_worker(process: int) -> bool:
    try:
        return b"dove_fast.data.worker" in Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
