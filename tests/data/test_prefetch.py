"""Working ahead in threads: order, the bound, errors at their turn, and stopping early."""

from __future__ import annotations

import threading
import time

import pytest

from dove_fast.data import prefetch, read_ahead


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


def test_in_bursts_nothing_is_computed_while_the_consumer_works():
    running, seen = [], []

    def work(item):
        running.append(item)
        time.sleep(0.005)
        running.remove(item)
        seen.append(item)
        return item

    stream = prefetch(work, range(11), workers=3, depth=4, in_bursts=lambda: True)
    for item in stream:
        assert not running
        # All of this burst, and none of the next one.
        assert sorted(seen) == list(range(min(item // 4 * 4 + 4, 11)))
        time.sleep(0.01)
    assert item == 10


def test_bursts_may_end_on_the_way():
    bursts = iter([True] * 6)
    stream = prefetch(str, range(30), workers=2, depth=4, in_bursts=lambda: next(bursts, False))
    assert list(stream) == [str(item) for item in range(30)]


@pytest.mark.parametrize("in_bursts", [False, True])
def test_an_error_in_a_burst_is_raised_at_its_items_turn(in_bursts):
    def work(item):
        return 1 // (item - 2)

    stream = prefetch(work, range(10), workers=2, depth=6, in_bursts=lambda: in_bursts)
    assert [next(stream), next(stream)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(stream)


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


def ended(name: str = "dove-fast-read", seconds: float = 5) -> bool:
    """Wait until no thread of this name is left."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not [thread for thread in threading.enumerate() if thread.name == name]:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_what_is_read_ahead_comes_in_order(depth):
    assert list(read_ahead(range(50), depth=depth)) == list(range(50))
    assert list(read_ahead([], depth=depth)) == []
    assert list(read_ahead([None, False, [], None], depth=depth)) == [None, False, [], None]
    assert ended()


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_items_are_read_ahead(depth):
    taken = 0

    def items():
        nonlocal taken
        for item in range(20):
            taken += 1
            yield item

    most = 0
    for item in read_ahead(items(), depth=depth):
        time.sleep(0.01)
        # This one is in hand, not ahead.
        most = max(most, taken - (item + 1))
    assert most == depth


def test_nothing_is_read_before_somebody_asks():
    read = []
    stream = read_ahead(map(read.append, range(5)), depth=3)
    time.sleep(0.05)
    assert read == []
    stream.close()
    assert read == [] and ended()


def test_items_are_read_while_the_consumer_works():
    third = threading.Event()

    def items():
        yield from (0, 1)
        third.set()
        yield 2

    stream = read_ahead(items(), depth=2)
    assert next(stream) == 0
    assert third.wait(10)
    assert list(stream) == [1, 2]


@pytest.mark.parametrize("error", [KeyError("three"), KeyboardInterrupt("three"), OSError(5, "three")])
def test_an_error_of_reading_is_raised_at_its_turn(error):
    def items():
        yield from range(3)
        raise error

    stream = read_ahead(items(), depth=10)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error), match="three") as raised:
        next(stream)
    assert raised.value is error
    assert list(stream) == []
    assert ended()


def test_an_error_before_the_first_item():
    with pytest.raises(TypeError, match="not iterable"):
        next(read_ahead(5, depth=1))

    def items():
        raise ValueError("at once")
        yield

    with pytest.raises(ValueError, match="at once"):
        list(read_ahead(items(), depth=1))
    assert ended()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("read", [1, 2, 5])
def test_closing_early_closes_what_is_read_in_the_thread_that_reads_it(read, waits):
    closed_in = []
    ahead = threading.Event()

    def items():
        try:
            for item in range(1000):
                if item == read + 1:
                    ahead.set()
                yield item
        finally:
            closed_in.append(threading.current_thread().name)

    source = items()
    stream = read_ahead(source, depth=2)
    assert [next(stream) for _ in range(read)] == list(range(read))
    if waits:
        # Until it has read as much as it may.
        assert ahead.wait(10)
        time.sleep(0.05)
    stream.close()
    assert closed_in == ["dove-fast-read"] and ended()
    assert list(source) == [] and list(stream) == []


def test_an_error_in_the_consumer_closes_what_is_read():
    closed = threading.Event()

    def items():
        try:
            yield from range(1000)
        finally:
            closed.set()

    def consume():
        for item in read_ahead(items(), depth=2):
            if item == 3:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        consume()
    assert closed.wait(5) and ended()


def test_closing_while_an_item_is_awaited_returns_and_the_thread_ends_later():
    go_on, closed = threading.Event(), threading.Event()

    def items():
        try:
            yield 0
            go_on.wait(60)
            yield 1
        finally:
            closed.set()

    stream = read_ahead(items(), depth=2)
    assert next(stream) == 0
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 4
    assert not closed.is_set()
    go_on.set()
    assert closed.wait(5) and ended()


def test_an_error_while_closing_is_not_printed(capfd):
    def items():
        try:
            yield from range(10)
        finally:
            raise OSError("too late")

    stream = read_ahead(items(), depth=1)
    next(stream)
    stream.close()
    assert ended()
    assert capfd.readouterr() == ("", "")


def test_a_depth_below_one_is_refused_at_once():
    for depth in (0, -1):
        with pytest.raises(ValueError, match=f"depth must be at least 1, got {depth}"):
            read_ahead([], depth=depth)
