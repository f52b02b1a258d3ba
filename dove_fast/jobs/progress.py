"""How jobs tell how far they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["OnProgress", "Progress"]


@dataclass(frozen=True)
class Progress:
    """How far a job is: inputs done of `total`, and of those done by this run the images and their tokens."""

    done: int
    total: int
    images: int
    tokens: int


OnProgress = Callable[[Progress], None]
