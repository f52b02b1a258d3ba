"""What training reads: pictures that are not decoded yet and, for Q-DOVE, the text and the boxes of each."""

from __future__ import annotations

import operator
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

__all__ = ["Box", "JoinedSamples", "Picture", "Sample", "Samples"]

# left, top, right, bottom; y grows downwards.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """An encoded picture: a file, or `span` = (offset, size) in bytes of an archive that holds it uncompressed."""

    key: str
    path: str
    span: tuple[int, int] | None = None

    def encoded(self) -> bytes:
        """Return the bytes, which `decode_image` takes. Raises `OSError` for a file that cannot be read."""
        with open(self.path, "rb", opener=_open_without_waiting) as file:
            if self.span is None:
                return file.read()
            offset, size = self.span
            file.seek(offset)
            return file.read(size)


@dataclass(frozen=True)
class Sample:
    """A picture with the text that asks for a region of it: the union of `boxes`; no text asks for all of it.

    `frame` is the width and height that the boxes are measured in: the size that their publisher saw the picture in,
    or (1, 1) for fractions of it. The picture may come in another size.
    """

    picture: Picture
    text: str = ""
    boxes: tuple[Box, ...] = ()
    frame: tuple[float, float] = (1.0, 1.0)


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe that has no writer is empty then, instead of waiting for one.
    return os.open(path, flags | os.O_NONBLOCK)


class Samples(Protocol):
    """A data set: so many samples, each made when it is asked for, with what was left out of it and why."""

    left_out: dict[str, int]

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """Return the sample at `index`, from 0."""
        ...


class JoinedSamples:
    """Several data sets as one, one behind the other; `left_out` counts what all of them left out, by reason.

    Raises `ValueError` for no data sets.
    """

    def __init__(self, sets: Sequence[Samples]) -> None:
        if not sets:
            raise ValueError("there are no data sets to join")
        self._sets = list(sets)
        self._ends = list(accumulate(map(len, self._sets)))
        self.left_out: dict[str, int] = dict(sum((Counter(samples.left_out) for samples in self._sets), Counter()))

    def __len__(self) -> int:
        """Return the number of samples of all sets."""
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Sample:
        """Return the sample at `index`, from 0; raises `IndexError` beyond the last and below 0."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be at least 0 and below {len(self)}, got {index}")
        which = bisect_right(self._ends, index)
        return self._sets[which][index - (self._ends[which - 1] if which else 0)]
