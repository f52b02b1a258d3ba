"""Working ahead of the consumer in threads, in order and within a bound."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

__all__ = ["prefetch", "read_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds that closing waits for an item that is being read.
PATIENCE = 2.0


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    depth: int,
    in_bursts: Callable[[], bool] = lambda: False,
    abandon: Callable[[], None] | None = None,
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item, in order, computed by `workers` threads.

    At most `depth` items are taken from `items` ahead of the consumer, so memory is bounded by `depth` results. While
    `in_bursts` says so they are computed `depth` at a time, as the consumer waits, and none while it works: for a
    consumer that needs all cores itself.
    An exception of `function` is raised at its item's turn. Closing the generator drops what has not started and waits
    for what has; `abandon` is called before, where there is something to cut short.
    Raises `ValueError` unless `workers` and `depth` are at least 1.
    """
    if workers < 1 or depth < 1:
        raise ValueError(f"workers and depth must be at least 1, got {workers} and {depth}")
    return _prefetch(function, items, workers, depth, in_bursts, abandon)


def _prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    depth: int,
    in_bursts: Callable[[], bool],
    abandon: Callable[[], None] | None,
) -> Generator[Result, None, None]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="dove-fast-load")
    pending: deque[Future[Result]] = deque()
    remaining = iter(items)
    try:
        while True:
            if not (pending and in_bursts()):
                pending.extend(pool.submit(function, item) for item in islice(remaining, depth - len(pending)))
                if in_bursts():
                    wait(pending)
            if not pending:
                return
            yield pending.popleft().result()
    except BaseException:
        if abandon is not None:
            abandon()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _End:
    """Stands behind the last item in a queue, with what ended it."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def read_ahead(items: Iterable[Item], *, depth: int) -> Generator[Item, None, None]:
    """Yield the items, in order, read by a thread of their own at most `depth` ahead of the consumer.

    What reading them raises is raised at its turn. Closing the generator closes the one that it reads, and waits
    `PATIENCE` seconds at most for the item that is being read. Raises `ValueError` unless `depth` is at least 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return _read_ahead(items, depth)


def _read_ahead(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    waiting: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def read() -> None:
        error: BaseException | None = None
        try:
            iterator = iter(items)
            try:
                # Before an item is read, not before it is passed on: it takes memory from then.
                while room.acquire() and not closed.is_set():
                    waiting.put(next(iterator))
            except StopIteration:
                pass
            finally:
                # In this thread, as generators are not passed on in the middle of a step.
                if isinstance(iterator, Generator):
                    iterator.close()
        except BaseException as raised:
            error = raised
        waiting.put(_End(error))

    thread = threading.Thread(target=read, name="dove-fast-read", daemon=True)
    thread.start()
    try:
        while not isinstance(item := waiting.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        room.release()
        thread.join(PATIENCE)
