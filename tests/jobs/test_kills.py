"""Killed anywhere, any number of times, with any number of jobs: the store comes out the same, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_jobs import OPTIONS
from kill_switch import contents
from made_pictures import add_bad, make_pictures
from small_models import micro_model

from dove_fast.atomic import is_temporary
from dove_fast.jobs import LoadedModel, TokenizeOptions, tokenize

KILL_JOBS = Path(__file__).parents[1] / "kill_jobs.py"
PICTURES = 40


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokenize(photos, folder / "whole", LoadedModel(model, model.fingerprint()), TokenizeOptions(**OPTIONS))
    finally:
        torch.set_num_threads(threads)
    return photos, folder / "model", contents(folder / "whole")


@pytest.mark.parametrize("jobs", [1, 3])
def test_sixty_kills_and_the_same_bytes(tmp_path, job, jobs):
    photos, model, expected = job
    done = subprocess.run(
        [sys.executable, KILL_JOBS, photos, tmp_path / "s", model, "60", str(jobs), "7"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    killed, in_the_middle = map(int, done.stdout.split())
    assert killed >= 60
    # Not only before the first unit and after the last one.
    assert in_the_middle >= 40, done.stdout
    found = contents(tmp_path / "s")
    assert found.keys() == expected.keys()
    assert not [name for name in found if is_temporary(Path(name).name)]
    for name, content in expected.items():
        assert found[name] == content, name


def test_a_job_whose_decoding_processes_are_killed_goes_on(tmp_path, job):
    photos, model, expected = job
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dove_fast.cli", "tokenize", photos, tmp_path / "s", "--checkpoint", model),
            *("--device", "cpu", "--batch-size", "3", "--shard-size", "2", "--workers", "2", "--no-report"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
        cwd=tmp_path,
    )
    killed = 0
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if killed < 3 and (tmp_path / "s/records/00000.parquet").exists():
            for child in children.read_text().split():
                try:
                    os.kill(int(child), signal.SIGKILL)
                    killed += 1
                except ProcessLookupError:
                    continue
        time.sleep(0.01)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert killed
    found = contents(tmp_path / "s")
    for name, content in expected.items():
        if name.startswith(("tokens/", "records/")):
            assert found[name] == content, name
