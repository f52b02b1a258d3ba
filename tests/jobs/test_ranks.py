"""Which process of many this is, and one a device."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from made_stores import fill, settings, write

from dove_fast.jobs import ranks
from dove_fast.jobs.ranks import TAIL, Ended, Rank, StoreWatch, rank_from, run_on_devices
from dove_fast.store.writer import StoreWriter

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Rank(3, 8, 1, "torchrun")),
        (SLURM, Rank(5, 16, 2, "Slurm")),
        # torchrun within a Slurm step: the inner one counts.
        ({**SLURM, **TORCHRUN}, Rank(3, 8, 1, "torchrun")),
        # A batch script is no step, and not one of the job's tasks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, None),
        # Variables of the same names that somebody else set.
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, None),
    ],
)
def test_what_started_this_process(environment, expected):
    assert rank_from(environment) == expected


def test_variables_that_are_no_numbers():
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, LOCAL_RANK must be numbers, set by torchrun"):
        rank_from({**TORCHRUN, "RANK": "first"})


@pytest.fixture
def in_place_of_python(tmp_path, monkeypatch):
    """Returns a function that puts a shell script in the place of the processes; $device is theirs."""

    def put(script: str) -> None:
        path = tmp_path / "script"
        path.write_text(f"#!/bin/sh\nfor device; do :; done\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def within(seconds: float):
    """Return a function to call at every poll, which ends what hangs."""
    deadline = time.monotonic() + seconds

    def check() -> None:
        assert time.monotonic() < deadline, "the processes do not end"

    return check


def test_a_process_may_write_more_to_stderr_than_a_pipe_holds(in_place_of_python):
    in_place_of_python("head -c 300000 /dev/zero | tr '\\0' x >&2; echo 'the end of it' >&2; exit 3")
    (ended,) = run_on_devices([], ["cpu"], on_poll=within(20))
    assert ended.code == 3
    assert ended.error.lstrip("x") == "the end of it"
    assert len(ended.error) == TAIL - 1


def test_each_device_gets_its_process_and_what_it_said(in_place_of_python):
    in_place_of_python('echo "$*" >&2; [ $device = cpu ]')
    assert run_on_devices(["tokenize", "a b"], ["cpu", "cuda:1"], on_poll=within(20)) == [
        Ended("cpu", 0, "-m dove_fast.cli tokenize a b --join --device cpu"),
        Ended("cuda:1", 1, "-m dove_fast.cli tokenize a b --join --device cuda:1"),
    ]


def test_bytes_that_are_no_text_are_told_too(in_place_of_python):
    in_place_of_python("printf 'a\\377b' >&2")
    assert [ended.error for ended in run_on_devices([], ["cpu"], on_poll=within(20))] == ["a\ufffdb"]


def test_how_a_process_ended_in_words(in_place_of_python):
    in_place_of_python("case $device in cpu) kill -KILL $$;; *) exit 2;; esac")
    assert [ended.how for ended in run_on_devices([], ["cpu", "cuda:1"], on_poll=within(20))] == [
        "killed by SIGKILL",
        "exit code 2",
    ]
    # One of those without a name.
    assert Ended("cpu", -40, "").how == "killed by signal 40"


@pytest.mark.parametrize("script", ["exec sleep 60", "trap '' TERM; while :; do sleep 0.1; done"])
def test_all_processes_end_where_the_job_is_interrupted(tmp_path, in_place_of_python, monkeypatch, script):
    in_place_of_python(f"echo $$ >{tmp_path}/$device; exec 2>&-; {script}")
    monkeypatch.setattr(ranks, "PATIENCE", 0.5)

    def interrupt() -> None:
        if all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_devices([], ["a", "b"], on_poll=interrupt)
    for name in "ab":
        # Waited for, too: nothing is left of it.
        assert not (Path("/proc") / (tmp_path / name).read_text().strip()).exists()


def test_a_store_is_watched_from_before_it_is_there(tmp_path):
    seen = []
    watch = StoreWatch(tmp_path / "s", seen.append)
    watch.look()
    assert seen == []
    writer = StoreWriter(tmp_path / "s", settings(8), {"torch": "test"})
    writer.begin()
    watch.look()
    fill(writer)
    watch.look()
    assert [(progress.extent, progress.images, progress.tokens) for progress in seen] == [
        ((0, 3), 0, 0),
        ((3, 3), 8, writer.tokens),
    ]
    assert 0 < seen[0].elapsed < seen[1].elapsed
    assert watch.images == 8


def test_units_of_earlier_runs_are_done_and_not_this_runs(tmp_path):
    write(tmp_path / "s")
    second = tmp_path / "s/records/00001.parquet"
    records = second.read_bytes()
    second.unlink()
    seen = []
    watch = StoreWatch(tmp_path / "s", seen.append)
    watch.look()
    # Half of a file, as a network shows it for a moment.
    second.write_bytes(records[:100])
    watch.look()
    second.write_bytes(records)
    watch.look()
    watch.look()
    assert [(progress.extent, progress.images) for progress in seen] == [
        ((2, 3), 0),
        ((2, 3), 0),
        ((3, 3), 3),
        ((3, 3), 3),
    ]


def test_a_store_is_not_looked_at_all_the_time(tmp_path, monkeypatch):
    write(tmp_path / "s")
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def took(seconds: float):
        return lambda progress: (seen.append(now[0]), now.__setitem__(0, now[0] + seconds))

    for seconds, expected in ((0.0, [0.0, 1.0, 2.0]), (0.25, [0.0, 2.75])):
        now[0] = 0.0
        seen: list[float] = []
        watch = StoreWatch(tmp_path / "s", took(seconds))
        while now[0] <= 2.8:
            watch.poll()
            now[0] += 0.25
        assert seen == expected
