"""WebDataset shards as training data: tar archives whose members are pictures, texts and boxes."""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dove_fast.data.decode import DecodeError, upright_size
from dove_fast.data.formats import SUFFIXES
from dove_fast.data.listing import printable
from dove_fast.data.regions import MALFORMED, NO_AREA, NO_PICTURE, NOT_A_BOX, OUTSIDE, Strings
from dove_fast.data.samples import Picture, Sample
from dove_fast.data.sources import expand_ranges
from dove_fast.data.tar import Member, content, members, open_tar, what_is_wrong

__all__ = ["BOX_WITHOUT_TEXT", "NO_SIZE", "NO_TEXT_OR_BOX", "WebDataset"]

# Why something is left out, beside the reasons of dove_fast.data.regions.
BOX_WITHOUT_TEXT = "a box without text"
NO_TEXT_OR_BOX = "a region without text and boxes"
NO_SIZE = "a picture whose size cannot be read"


class WebDataset:
    """The samples of uncompressed WebDataset shards, in the order of the shards and of their members.

    `shards` is one of these or several: a shard's path; a text with ranges, "train-{000000..000146}.tar", both ends
    included and padded with zeros to the width of the first; a folder, which stands for every .tar below it, sorted,
    without hidden ones (links to folders are not followed). Files that are one after the other in a shard and have the
    same path up to the first dot of the base name belong together; names without a dot or with one at their start
    are passed over. Of what follows the dot, in any case of letters, counts:

    - an ending of `SUFFIXES`: the picture. Exactly one.
    - json: {"text": str, "boxes": [[left, top, right, bottom], ..]}, or {"regions": [..]} with a list of such objects,
      each a sample of its own; beside regions, that object's own text and boxes are not read. Numbers "width" and
      "height" beside them are the frame of all boxes; without them boxes are in pixels of the upright picture.
      A region without boxes is the whole picture. What is null counts as absent, other entries are ignored.
    - txt, in UTF-8: the text of the whole picture, where the json has no text, boxes or regions, or is not there.

    Without any of these texts the sample is the whole picture without text. White space in texts is made single
    blanks. Boxes are kept in float32 and clipped to the frame; those that a region has twice are given once.

    A key is {shard's name without .tar}/{path up to the dot}. Whether keys are unique is not checked, for that would
    keep all of them in memory twice: shards of the same name in two folders may repeat them.

    Making it reads every tar header and every json once. Boxes without width and height also cost the picture's
    header, and a TIFF or PNG is decoded for it: put width and height into the json of large data sets. Afterwards a
    sample costs no scan; the memory is about 80 bytes a sample, its name and its text.

    `left_out` counts by reason. The unit is the sample's files together: no picture or several, several json or txt
    files, a link or sparse file in place of one of these, a json or txt that is malformed, a width or height that is no
    positive number where boxes need it, a picture whose size cannot be read. Else it is the region: malformed, with
    boxes but no text, with neither in a list of regions, or with a box that is not four finite numbers, has no area or
    lies outside the frame; such a region goes with all its boxes, for what remained would be less than
    its text asks for.

    Raises `FileNotFoundError` for a path that is not there, and `ValueError` for no shards, for a range that runs
    backwards, and for a shard that is compressed, no tar archive, damaged, or shorter than it should be.
    """

    def __init__(self, shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
        self._shards = _listed(shards)
        self._names = Strings()
        self._shard_of = array("i")
        self._offset_of = array("q")
        self._size_of = array("q")
        self._frames = array("f")
        # One entry a sample from here; boxes_end counts boxes and has a 0 before the first sample's.
        self._picture_of = array("i")
        self._texts = Strings()
        self._boxes_end = array("q", [0])
        self._boxes = array("f")
        left_out: Counter[str] = Counter()
        for number, path in enumerate(self._shards):
            for name, found in _scan(path):
                if isinstance(found, str):
                    left_out[found] += 1
                else:
                    left_out.update(found.left_out)
                    self._add(number, name, found)
        self.left_out: dict[str, int] = dict(left_out)

    def _add(self, shard: int, name: str, found: _Found) -> None:
        if not found.regions:
            return
        picture = self._names.append(printable(name))
        self._shard_of.append(shard)
        self._offset_of.append(found.picture.offset_data)
        self._size_of.append(found.picture.size)
        self._frames.extend(found.frame)
        for text, boxes in found.regions:
            self._picture_of.append(picture)
            self._texts.append(text)
            self._boxes.extend(boxes)
            self._boxes_end.append(len(self._boxes) // 4)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._picture_of)

    def __getitem__(self, index: int, /) -> Sample:
        """Return the sample at `index`, from 0; raises `IndexError` beyond the last and below 0."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index must be at least 0 and below {len(self)}, got {index}")
        picture = self._picture_of[index]
        path = self._shards[self._shard_of[picture]]
        edges = self._boxes[4 * self._boxes_end[index] : 4 * self._boxes_end[index + 1]]
        boxes = zip(edges[0::4], edges[1::4], edges[2::4], edges[3::4], strict=True)
        return Sample(
            Picture(f"{_stem(path)}/{self._names[picture]}", path, (self._offset_of[picture], self._size_of[picture])),
            self._texts[index],
            tuple(dict.fromkeys(boxes)),
            (self._frames[2 * picture], self._frames[2 * picture + 1]),
        )


class _LeftOutError(Exception):
    """What cannot be used, by the reason that counts it."""


@dataclass(frozen=True)
class _Found:
    """What the files of one name hold: the regions as text and boxes, four numbers a box one after the other."""

    picture: tarfile.TarInfo
    frame: tuple[float, float]
    regions: list[tuple[str, array[float]]]
    left_out: Counter[str]


def _listed(shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    sources = [shards] if isinstance(shards, str | os.PathLike) else shards
    paths = [path for source in sources for path in _paths(os.fspath(source))]
    if not paths:
        raise ValueError("shards must name at least one shard, got none")
    return paths


def _paths(source: str) -> list[str]:
    if os.path.isdir(source):
        paths = sorted(_below(source))
        if not paths:
            raise ValueError(f"no shards in {printable(source)}: no file below it ends in .tar")
        return paths
    # A file may have braces in its name.
    paths = [source] if os.path.exists(source) else list(expand_ranges(source))
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no such shard: {printable(path)}")
    return paths


def _below(folder: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in files if name.endswith(".tar") and name[0] != ".")


def _stem(path: str) -> str:
    return printable(os.path.basename(path).removesuffix(".tar"))


def _scan(path: str) -> Iterator[tuple[str, _Found | str]]:
    """Yield each name of a shard with what its files hold, or why that is nothing."""
    with open(path, "rb") as file:
        try:
            with open_tar(file) as archive:
                for name, files in itertools.groupby(members(archive, file), key=lambda file: file.name):
                    try:
                        yield name, _read(archive, list(files))
                    except _LeftOutError as reason:
                        yield name, str(reason)
        except (tarfile.TarError, OverflowError) as error:
            # The latter for a size beyond any file's.
            raise ValueError(f"shard {printable(path)} {what_is_wrong(file, error)}") from None


def _read(archive: tarfile.TarFile, files: list[Member]) -> _Found:
    """Return what the files of one name hold; raises `_LeftOutError` with the reason if that is nothing."""
    picture = _only(files, SUFFIXES, "picture")
    if picture is None:
        raise _LeftOutError(NO_PICTURE)
    description = _json(archive, _only(files, {".json"}, "json"))
    txt = _only(files, {".txt"}, "txt")
    listed = description.get("regions")
    if listed is None:
        listed = []
    if not isinstance(listed, list):
        raise _LeftOutError(MALFORMED)
    entries = listed or [description]
    frame = (1.0, 1.0)
    if any(isinstance(entry, dict) and entry.get("boxes") for entry in entries):
        frame = _frame(archive, picture, description)
    found = _Found(picture, frame, [], Counter())
    for entry in entries:
        try:
            text, boxes = _region(entry, frame)
            if not text and boxes:
                raise _LeftOutError(BOX_WITHOUT_TEXT)
            if not text and listed:
                raise _LeftOutError(NO_TEXT_OR_BOX)
            if not text and txt is not None:
                text = _text(archive, txt)
        except _LeftOutError as reason:
            found.left_out[str(reason)] += 1
        else:
            found.regions.append((text, boxes))
    return found


def _only(files: list[Member], endings: Collection[str], kind: str) -> tarfile.TarInfo | None:
    found = [file for file in files if file.ending in endings]
    if len(found) > 1:
        raise _LeftOutError(f"more than one {kind} file")
    if found and found[0].unread:
        raise _LeftOutError(found[0].unread)
    return found[0].header if found else None


def _json(archive: tarfile.TarFile, header: tarfile.TarInfo | None) -> dict[str, Any]:
    if header is None:
        return {}
    try:
        description = json.loads(content(archive, header).read())
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict):
        raise _LeftOutError(MALFORMED)
    return description


def _text(archive: tarfile.TarFile, header: tarfile.TarInfo) -> str:
    try:
        return _words(content(archive, header).read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _LeftOutError(MALFORMED) from None


def _words(text: str) -> str:
    return " ".join(text.split())


def _frame(archive: tarfile.TarFile, picture: tarfile.TarInfo, description: dict[str, Any]) -> tuple[float, float]:
    sides = [description.get("width"), description.get("height")]
    if sides == [None, None]:
        try:
            return upright_size(content(archive, picture))
        except DecodeError:
            raise _LeftOutError(NO_SIZE) from None
    numbers = _numbers(sides)
    if numbers is None or min(numbers) <= 0:
        raise _LeftOutError(MALFORMED)
    return numbers[0], numbers[1]


def _region(entry: object, frame: tuple[float, float]) -> tuple[str, array[float]]:
    """Return a region's text and boxes, four numbers a box one after the other; either may be empty."""
    if not isinstance(entry, dict):
        raise _LeftOutError(MALFORMED)
    text = "" if entry.get("text") is None else entry["text"]
    boxes = [] if entry.get("boxes") is None else entry["boxes"]
    if not isinstance(text, str) or not isinstance(boxes, list):
        raise _LeftOutError(MALFORMED)
    edges = array("f")
    for box in boxes:
        edges.extend(_clipped(box, *frame))
    return _words(text), edges


def _clipped(box: object, width: float, height: float) -> tuple[float, float, float, float]:
    numbers = _numbers(box) if isinstance(box, list) and len(box) == 4 else None
    if numbers is None:
        raise _LeftOutError(NOT_A_BOX)
    left, top, right, bottom = numbers
    if left >= right or top >= bottom:
        raise _LeftOutError(NO_AREA)
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
    if left >= right or top >= bottom:
        raise _LeftOutError(OUTSIDE)
    return left, top, right, bottom


def _numbers(values: list[Any]) -> array[float] | None:
    """Return finite numbers in float32; None if one of the values is none."""
    # Not isinstance: True is an int too.
    if any(type(value) not in (int, float) for value in values):
        return None
    try:
        numbers = array("f", values)
    except OverflowError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
