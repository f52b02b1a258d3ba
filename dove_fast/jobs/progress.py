"""How jobs tell how far they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["OnProgress", "Progress"]


@dataclass(frozen=True)
class Progress:
    """How far a job is: inputs done of `total`, and of those done by this run the images and their tokens.

    `total`: None where the number of inputs is not known beforehand. `stages`: the share of the elapsed time that each
    stage was busy. `units_done` of `units`: the store's, 0 where there are none.
    """

    done: int
    total: int | None
    images: int
    tokens: int
    stages: Mapping[str, float] = field(default_factory=dict)
    units_done: int = 0
    units: int = 0


OnProgress = Callable[[Progress], None]
