"""Stopping between two steps instead of in the middle of one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["stop_requested"]


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Yield an event that SIGINT or SIGTERM sets while the block runs; a second signal raises `KeyboardInterrupt`.

    A signal that is ignored, as in a background job, stays so; outside the main thread nothing is changed.
    """
    asked = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                earlier[number] = signal.signal(number, on_signal)
    try:
        yield asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
