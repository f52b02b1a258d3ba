"""A table of pictures, texts and boxes, for data sets of millions of regions: arrays, not an object a sample."""

from __future__ import annotations

import operator
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dove_fast.data.listing import printable
from dove_fast.data.samples import Picture, Sample

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "EMPTY_TEXT",
    "MALFORMED",
    "NOT_A_BOX",
    "NO_AREA",
    "NO_PICTURE",
    "OUTSIDE",
    "RegionBuilder",
    "RegionTable",
    "Strings",
    "jpegs_in",
    "published_file",
]

# Why a region is left out; a data set adds reasons of its own.
MALFORMED = "malformed entry"
EMPTY_TEXT = "empty text"
NO_PICTURE = "no picture file"
NOT_A_BOX = "a box that is not four finite numbers"
NO_AREA = "a box of no area"
OUTSIDE = "a box outside the picture"

# By a box's code; of a region's boxes the highest code is the reason.
BOX_REASONS = ("", OUTSIDE, NO_AREA, NOT_A_BOX)


class Strings:
    """Strings in one block of UTF-8; what UTF-8 cannot hold (half of a surrogate pair) becomes a question mark."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> int:
        """Add `string` and return its index."""
        self._bytes += string.encode("utf-8", "replace")
        self._ends.append(len(self._bytes))
        return len(self) - 1

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode()


class RegionBuilder:
    """Collects the regions of a data set, leaves out those whose boxes are none, and counts them by reason.

    `pictures` are the pictures' paths below `folder`, with / between folders: they are also the keys. `frames` (P, 2)
    holds the width and height that each picture's boxes are measured in, finite and above 0.
    """

    def __init__(self, folder: str, pictures: Sequence[str], frames: ArrayLike) -> None:
        self.folder = folder
        self.pictures = Strings(pictures)
        self.frames = np.asarray(frames, np.float32).reshape(-1, 2)
        if len(self.frames) != len(self.pictures):
            raise ValueError(f"{len(self.pictures)} pictures need as many frames, got {len(self.frames)}")
        self.texts = Strings()
        self.left_out: Counter[str] = Counter()
        self.picture_of = array("i")
        self.text_of = array("i")
        self.boxes_of = array("i")
        self.boxes = array("f")

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count `count` regions as left out for `reason`."""
        if count:
            self.left_out[reason] += count

    def text(self, text: str) -> int | None:
        """Keep `text`, its white space made single blanks, and return its index; None if nothing is left of it."""
        words = " ".join(text.split())
        return self.texts.append(words) if words else None

    def add(self, pictures: ArrayLike, texts: ArrayLike, counts: ArrayLike, boxes: ArrayLike) -> None:
        """Add N regions that have B boxes together.

        `pictures` and `texts` (N) are indices, `counts` (N) says how many boxes each region has, at least 1, and
        `boxes` (B, 4) holds them one region after the other: left, top, right, bottom. They are kept in float32 and
        clipped to the frame. A region with a box of no area, outside the frame, or of values that are not finite is
        left out with all its boxes: what remained would be less than its text asks for.
        """
        pictures, texts, counts = (np.asarray(values, np.int32) for values in (pictures, texts, counts))
        if not len(counts):
            return
        with np.errstate(over="ignore"):
            raw = np.asarray(boxes, np.float64).reshape(-1, 4).astype(np.float32)
        if counts.min() < 1 or counts.sum() != len(raw):
            raise ValueError(f"counts must be at least 1 and add up to the {len(raw)} boxes, got {counts.tolist()}")
        frames = np.repeat(self.frames[pictures], counts, axis=0)
        clipped = np.clip(raw, 0, np.concatenate([frames, frames], axis=1))
        codes = np.zeros(len(raw), np.intp)
        codes[~_has_area(clipped)] = BOX_REASONS.index(OUTSIDE)
        codes[~_has_area(raw)] = BOX_REASONS.index(NO_AREA)
        codes[~np.isfinite(raw).all(axis=1)] = BOX_REASONS.index(NOT_A_BOX)
        codes = np.maximum.reduceat(codes, np.cumsum(counts) - counts)
        for code, reason in enumerate(BOX_REASONS[1:], start=1):
            self.leave_out(reason, int(np.count_nonzero(codes == code)))
        kept = codes == 0
        for collected, values in ((self.picture_of, pictures), (self.text_of, texts), (self.boxes_of, counts)):
            collected.frombytes(values[kept].tobytes())
        self.boxes.frombytes(clipped[np.repeat(kept, counts)].tobytes())


class RegionTable:
    """The `Samples` that a `RegionBuilder` collected: about 40 bytes a region and its text.

    Boxes that a region has twice are given once. `left_out` counts what is not here, by reason.
    """

    def __init__(self, builder: RegionBuilder) -> None:
        self.left_out: dict[str, int] = dict(builder.left_out)
        self._folder = builder.folder
        self._pictures = builder.pictures
        self._frames = builder.frames
        self._texts = builder.texts
        self._picture_of: NDArray[np.int32] = np.array(builder.picture_of, np.int32)
        self._text_of: NDArray[np.int32] = np.array(builder.text_of, np.int32)
        self._starts: NDArray[np.int64] = np.zeros(len(self._text_of) + 1, np.int64)
        np.cumsum(builder.boxes_of, out=self._starts[1:])
        self._boxes: NDArray[np.float32] = np.array(builder.boxes, np.float32).reshape(-1, 4)

    def __len__(self) -> int:
        """Return the number of regions."""
        return len(self._text_of)

    def __getitem__(self, index: int, /) -> Sample:
        """Return the region at `index`, from 0; raises `IndexError` beyond the last and below 0."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be at least 0 and below {len(self)}, got {index}")
        picture = int(self._picture_of[index])
        key = self._pictures[picture]
        boxes = self._boxes[self._starts[index] : self._starts[index + 1]].tolist()
        width, height = self._frames[picture].tolist()
        return Sample(
            Picture(key, os.path.join(self._folder, key)),
            self._texts[self._text_of[index]],
            tuple(dict.fromkeys((left, top, right, bottom) for left, top, right, bottom in boxes)),
            (width, height),
        )


def jpegs_in(folder: str) -> list[str]:
    """Return the names of the .jpg files in `folder` without that ending, sorted; raises `OSError`.

    Names beyond ASCII are passed over: no publisher has such ids, and not every file name is text.
    """
    return sorted(name[: -len(".jpg")] for name in os.listdir(folder) if name.endswith(".jpg") and name.isascii())


def published_file(root: str, names: Sequence[str], advice: str) -> str:
    """Return the path of the first of `names` that is a file in `root`.

    Raises `FileNotFoundError` that names them, followed by `advice`: where the publisher has the file.
    """
    for name in names:
        path = os.path.join(root, name)
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"no {' or '.join(names)} in {printable(root)}: {advice}")


def _has_area(boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
