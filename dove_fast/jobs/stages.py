"""Where a job's time goes: seconds by stage."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

__all__ = ["STAGES", "StageClock", "stage_shares"]

# `decode` is the busy time of all workers together, `wait` what the main loop waited for them.
STAGES = ("decode", "wait", "encode", "generate", "write")


class StageClock:
    """Adds up the seconds of each of `STAGES`; may be fed from several threads.

    A stage that is timed inside another one counts in both. Names that are no stage are a `ValueError`.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere; a sum never goes down."""
        if stage not in self._seconds:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
        with self._lock:
            # The difference of two clocks may be below zero by rounding.
            self._seconds[stage] += max(seconds, 0.0)

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes, also if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of every stage so far, a copy."""
        with self._lock:
            return dict(self._seconds)

    def shares(self, elapsed: float, workers: int) -> dict[str, float]:
        """Return `stage_shares` of the seconds so far."""
        return stage_shares(self.seconds, elapsed, workers)


def stage_shares(seconds: Mapping[str, float], elapsed: float, workers: int) -> dict[str, float]:
    """Return the share of `elapsed` seconds that each stage was busy, zeros for no time.

    `decode` is the mean over the workers; 0 workers are one, the main loop itself.
    """
    if elapsed <= 0:
        return dict.fromkeys(seconds, 0.0)
    return {
        stage: value / (elapsed * (max(workers, 1) if stage == "decode" else 1)) for stage, value in seconds.items()
    }
