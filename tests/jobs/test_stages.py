"""Seconds by stage, and their shares of a run."""

from __future__ import annotations

import threading
import time

import pytest

from dove_fast.jobs.stages import STAGES, StageClock, stage_shares


@pytest.fixture
def ticks(monkeypatch) -> list[float]:
    """The clock's next readings."""
    readings: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_blocks_add_up(ticks):
    clock = StageClock()
    ticks += [10.0, 12.5, 20.0, 20.25]
    for _ in range(2):
        with clock.time("encode"):
            pass
    clock.add("decode", 3.0)
    clock.add("decode", 0.5)
    assert clock.seconds == {"decode": 3.5, "wait": 0.0, "encode": 2.75, "generate": 0.0, "write": 0.0}
    assert tuple(clock.seconds) == STAGES


def test_a_block_inside_another_counts_in_both(ticks):
    clock = StageClock()
    ticks += [0.0, 1.0, 3.0, 7.0]
    with clock.time("generate"), clock.time("wait"):
        pass
    assert (clock.seconds["generate"], clock.seconds["wait"]) == (7.0, 2.0)


def test_a_block_that_raises_counts(ticks):
    clock = StageClock()
    ticks += [1.0, 5.0]
    with pytest.raises(OSError, match="full"), clock.time("write"):
        raise OSError("full")
    assert clock.seconds["write"] == 4.0


def test_seconds_are_a_copy_and_never_go_down():
    clock = StageClock()
    clock.add("write", 2.0)
    clock.seconds["write"] = 100.0
    clock.add("write", -1e-9)
    assert clock.seconds["write"] == 2.0


def test_shares_are_of_the_elapsed_time_and_decode_is_per_worker():
    clock = StageClock()
    for stage, seconds in (("decode", 6.0), ("encode", 5.0), ("write", 0.5)):
        clock.add(stage, seconds)
    assert clock.shares(10.0, 4) == {"decode": 0.15, "wait": 0.0, "encode": 0.5, "generate": 0.0, "write": 0.05}
    assert clock.shares(10.0, 0)["decode"] == clock.shares(10.0, 1)["decode"] == 0.6
    assert set(clock.shares(0.0, 4).values()) == {0.0}
    assert stage_shares({"encode": 1.0}, 4.0, 2) == {"encode": 0.25}


def test_names_that_are_no_stage():
    clock = StageClock()
    with pytest.raises(ValueError, match="stage must be one of decode, wait, encode, generate, write, got 'upload'"):
        clock.add("upload", 1.0)


def test_threads_lose_nothing():
    clock = StageClock()

    def work() -> None:
        for _ in range(2000):
            clock.add("decode", 1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.seconds["decode"] == 8000.0
