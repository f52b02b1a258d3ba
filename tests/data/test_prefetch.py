"""Working ahead in threads: order, the bound, errors at their turn, and stopping early."""

from __future__ import annotations

import threading
import time

import pytest

from dove_fast.data import prefetch


def test_results_come_in_order_whatever_takes_longest():
    def work(item):
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item * item

    assert list(prefetch(work, range(30), workers=4, depth=8)) == [item * item for item in range(30)]


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (2, 5), (8, 3)])
def test_no_more_than_depth_items_are_taken_ahead(workers, depth):
    taken = 0

    def items():
        nonlocal taken
        for item in range(40):
            taken += 1
            yield item

    for consumed, _ in enumerate(prefetch(lambda item: item, items(), workers=workers, depth=depth)):
        assert taken - consumed <= depth


def test_an_exception_is_raised_at_its_items_turn():
    def work(item):
        if item == 3:
            raise KeyError("three")
        return item

    stream = prefetch(work, range(10), workers=2, depth=6)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(stream)


def test_closing_drops_what_has_not_started_and_ends_the_threads():
    started = []

    def work(item):
        started.append(item)
        time.sleep(0.02)
        return item

    stream = prefetch(work, range(1000), workers=2, depth=100)
    next(stream)
    stream.close()
    count = len(started)
    assert count < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dove-fast-load")]
    assert len(started) == count


def test_no_items():
    assert list(prefetch(str, [], workers=2, depth=2)) == []


@pytest.mark.parametrize(("workers", "depth"), [(0, 1), (1, 0)])
def test_counts_below_one_are_refused(workers, depth):
    with pytest.raises(ValueError, match="workers and depth must be at least 1"):
        prefetch(str, [], workers=workers, depth=depth)
