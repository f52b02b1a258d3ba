"""Locks of one store: who may write, who may join, and what a dead process leaves behind."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from made_stores import fill, settings

from dove_fast import StoreError, TokenStore
from dove_fast.store import claims
from dove_fast.store.claims import Claims
from dove_fast.store.layout import read_manifest, write_manifest
from dove_fast.store.writer import StoreWriter

# A second process: prints what it got, and waits for a line.
OTHER = """
import sys
from pathlib import Path
from dove_fast import StoreError
from dove_fast.store.claims import Claims
join, share, *units = sys.argv[2:]
try:
    held = Claims(Path(sys.argv[1]), join=join == "join")
except StoreError as error:
    print("refused", error)
    raise SystemExit
alone = held.alone
if share == "share":
    held.share()
print("alone" if alone else "beside", *[held.claim(int(unit)) for unit in units], flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Start a second process; returns it and its first line."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, tmp_path, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_job_is_refused_or_joins(tmp_path, other):
    held = Claims(tmp_path, join=False)
    assert held.alone
    held.share()
    assert held.claim(3)
    _, said = other("alone", "share")
    assert said.startswith(f"refused {tmp_path} is being written by another job; wait for it")
    assert "--join" in said
    _, said = other("join", "share", 3, 4)
    assert said == "beside False True"
    assert not held.claim(4)
    assert held.claim(5)
    held.release(3)
    _, said = other("join", "share", 3, 4, 5)
    assert said == "beside True False False"


def test_who_joins_first_begins(tmp_path, other):
    _, said = other("join", "share")
    assert said == "alone"
    held = Claims(tmp_path, join=True)
    assert not held.alone


def test_a_dead_process_holds_nothing(tmp_path, other):
    process, said = other("alone", "share", 0, 1)
    assert said == "alone True True"
    with pytest.raises(StoreError, match="is being written by another job"):
        Claims(tmp_path, join=False)
    held = Claims(tmp_path, join=True)
    assert not held.claim(0)
    process.kill()
    process.wait()
    assert held.claim(0)
    held.close()
    assert Claims(tmp_path, join=False).alone


def test_one_job_a_process(tmp_path):
    held = Claims(tmp_path, join=False)
    for join in (False, True):
        with pytest.raises(StoreError, match="is being written by another job of this process"):
            Claims(tmp_path, join=join)
    held.close()
    held.close()
    again = Claims(tmp_path, join=True)
    assert again.alone
    del again
    assert Claims(tmp_path, join=False).alone


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claims.fcntl, "lockf", fail)
    with pytest.raises(StoreError, match=r"on a file system without locks \(Operation not supported\)"):
        Claims(tmp_path, join=False)
    monkeypatch.undo()
    assert Claims(tmp_path, join=False).alone


@pytest.mark.parametrize("made", ["nothing", "the manifest"])
def test_who_joins_a_job_that_died_before_the_store_was_made_makes_it(tmp_path, other, made):
    process, said = other("alone", "not yet")
    assert said == "alone"
    writer = StoreWriter(tmp_path, settings(8), {"torch": "test"})
    if made == "the manifest":
        writer._write_manifest(complete=False)
    begun = threading.Thread(target=writer.begin, kwargs={"join": True})
    begun.start()
    begun.join(0.2)
    assert begun.is_alive()
    process.kill()
    begun.join(20)
    assert not begun.is_alive()
    fill(writer)
    writer.finish()
    assert len(TokenStore(tmp_path)) == 8


def test_the_manifest_names_what_ran_in_all_jobs(tmp_path):
    """One after the other, each with a part of the units, as jobs that join have them."""
    for number, units in enumerate(([0], [1, 2])):
        writer = StoreWriter(tmp_path, settings(8), {"batch_size": number})
        writer.begin(join=True)
        for unit in units:
            assert writer.claim(unit)
        fill(writer, only=units)
        if not writer.missing:
            # Who finishes the store does not take back what others wrote after it had read.
            written = read_manifest(tmp_path)
            ran = [*written["environments"], {"batch_size": 7}]
            write_manifest(tmp_path, {"complete": False, "settings": written["settings"], "environments": ran})
            writer.finish()
        writer.close()
    assert TokenStore(tmp_path).manifest["environments"] == [{"batch_size": 0}, {"batch_size": 1}, {"batch_size": 7}]
