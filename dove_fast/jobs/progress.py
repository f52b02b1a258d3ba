"""How jobs tell how far they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from dove_fast.jobs.stages import stage_shares

__all__ = ["OnProgress", "Progress", "TimeLeft", "describe_seconds"]


@dataclass(frozen=True)
class Progress:
    """How far a job is, `elapsed` seconds after it began.

    `done` inputs of `total`, None where that is not known beforehand, those of earlier runs included. Of this run: the
    images, their tokens, the errors (inputs that were set aside), and the seconds that each stage was busy, `decode` of
    `workers` together, which is 0 where the main loop decodes. `units_done` of `units`: the store's, 0 where there are
    none.
    """

    done: int
    total: int | None
    images: int
    tokens: int
    errors: int = 0
    elapsed: float = 0.0
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    workers: int = 1
    units_done: int = 0
    units: int = 0

    @property
    def extent(self) -> tuple[int, int | None]:
        """How much is done of how much: of the inputs, or of the units where the inputs are not counted.

        The latter is None where nothing tells: a single unit is done at the end only.
        """
        if self.total is not None:
            return self.done, self.total
        return self.units_done, self.units if self.units > 1 else None

    @property
    def stages(self) -> dict[str, float]:
        """The share of the elapsed time that each stage was busy."""
        return stage_shares(self.stage_seconds, self.elapsed, self.workers)


OnProgress = Callable[[Progress], None]


class TimeLeft:
    """Tells the seconds that a job still takes, by its mean speed since the first state that this was shown.

    The mean, because one batch may take longer than any window of seconds.
    """

    def __init__(self) -> None:
        # When the first state came, and how much was done by then, by earlier runs too.
        self._first: tuple[float, int] | None = None

    def after(self, progress: Progress, now: float) -> float | None:
        """Return the seconds left at a state that came at `now`, in seconds of any clock; None where nothing tells."""
        done, total = progress.extent
        first, before = self._first = self._first or (now, done)
        if total is None or now <= first or done <= before:
            return None
        return max(total - done, 0) * (now - first) / (done - before)


def describe_seconds(seconds: float) -> str:
    """Put a span of time into words: 0:00:35 or 1 day, 3:46:30."""
    return str(timedelta(seconds=round(seconds)))
