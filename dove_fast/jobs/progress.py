"""How jobs tell how far they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dove_fast.jobs.stages import stage_shares

__all__ = ["OnProgress", "Progress"]


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
    def stages(self) -> dict[str, float]:
        """The share of the elapsed time that each stage was busy."""
        return stage_shares(self.stage_seconds, self.elapsed, self.workers)


OnProgress = Callable[[Progress], None]
