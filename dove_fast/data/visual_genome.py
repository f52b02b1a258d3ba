"""Visual Genome (Krishna et al. 2017) as its publisher lays it out: region descriptions and questions with boxes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from dove_fast.data.listing import printable
from dove_fast.data.regions import (
    EMPTY_TEXT,
    MALFORMED,
    NO_PICTURE,
    RegionBuilder,
    RegionTable,
    jpegs_in,
    published_file,
)
from dove_fast.data.samples import Box

__all__ = ["MALFORMED_IMAGE_DATA", "NO_BOXES", "NO_IMAGE_DATA", "VisualGenome"]

NO_BOXES = "question without boxes"
NO_IMAGE_DATA = "picture that image_data.json does not name"
MALFORMED_IMAGE_DATA = "malformed entry of image_data.json"

PICTURE_FOLDERS = ("VG_100K", "VG_100K_2")

# JSON's integers have no bound, a float has: what is beyond any picture counts as no number.
LARGEST_NUMBER = 1e9
NOT_NUMBERS: Box = (float("nan"),) * 4

BLANKS = re.compile(r"[ \t\r\n]*")


class VisualGenome(RegionTable):
    """The region descriptions of Visual Genome, then its questions, each in the order of its file.

    `root` holds image_data.json, region_descriptions.json and question_answers.json, unpacked; `images`, by default
    `root`, holds the folders VG_100K and VG_100K_2 with the pictures {id}.jpg, of which one may be absent. A sample's
    frame is the picture's width and height in image_data.json, its key the path below `images`.

    A description's text is its phrase, its region the phrase's box. A question's text is the question alone, for the
    answer is what is to be found in the picture; its region is the union of the boxes of the objects that its answer
    and it name.

    Left out and counted in `left_out`: questions without boxes, samples whose picture has no file or no size, empty
    texts, entries without the fields they need, and what `RegionBuilder.add` refuses; boxes are clipped to the frame.

    Raises `FileNotFoundError` for a file, or both picture folders, that are not there, and `ValueError` for a file
    that is not JSON of its published layout, or if `questions` and `descriptions` are both False.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        questions: bool = True,
        descriptions: bool = True,
        images: str | os.PathLike[str] | None = None,
    ) -> None:
        if not (questions or descriptions):
            raise ValueError("questions and descriptions are both False: nothing is left of Visual Genome")
        root = os.fspath(root)
        parts: list[tuple[str, str, Callable[[dict[str, Any]], tuple[object, list[Box]]]]] = []
        if descriptions:
            parts.append((_file(root, "region_descriptions.json"), "regions", _description))
        if questions:
            parts.append((_file(root, "question_answers.json"), "qas", _question))
        builder, rows = _pictures(_file(root, "image_data.json"), root if images is None else os.fspath(images))
        for path, name, read in parts:
            _add_all(builder, rows, path, name, read)
        super().__init__(builder)


def _file(root: str, name: str) -> str:
    return published_file(root, [name], f"unpack {name}.zip from Visual Genome's download page there")


def _pictures(image_data: str, folder: str) -> tuple[RegionBuilder, dict[int, int | None]]:
    """Return a builder with the pictures that have a size and a file, and the row of each id: None without a file."""
    found = {}
    folders = [name for name in PICTURE_FOLDERS if os.path.isdir(os.path.join(folder, name))]
    if not folders:
        raise FileNotFoundError(
            f"no {' or '.join(PICTURE_FOLDERS)} in {printable(folder)}: unpack Visual Genome's images.zip and "
            "images2.zip there, or say with images= where they are"
        )
    for name in folders:
        for stem in jpegs_in(os.path.join(folder, name)):
            found[stem] = f"{name}/{stem}.jpg"
    rows: dict[int, int | None] = {}
    keys: list[str] = []
    frames: list[tuple[float, float]] = []
    malformed = 0
    for entry in _entries(image_data):
        picture = _picture_id(entry) if isinstance(entry, dict) else None
        if picture is None or not (_is_size(entry.get("width")) and _is_size(entry.get("height"))):
            malformed += 1
        elif picture not in rows:
            key = found.get(str(picture))
            rows[picture] = None if key is None else len(keys)
            if key is not None:
                keys.append(key)
                frames.append((entry["width"], entry["height"]))
    if malformed and not rows:
        raise ValueError(f"{printable(image_data)} has no entry with an image_id, a width and a height")
    builder = RegionBuilder(folder, keys, frames)
    builder.leave_out(MALFORMED_IMAGE_DATA, malformed)
    return builder, rows


def _add_all(
    builder: RegionBuilder,
    rows: dict[int, int | None],
    path: str,
    name: str,
    read: Callable[[dict[str, Any]], tuple[object, list[Box]]],
) -> None:
    """Add the items that each entry of `path` has under `name`; `read` gives an item's text and boxes."""
    fitting = malformed = 0
    for entry in _entries(path):
        items = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(items, list):
            malformed += 1
            continue
        fitting += 1
        pictures, texts, counts = [], [], []
        boxes: list[Box] = []
        for item in items:
            if not isinstance(item, dict):
                builder.leave_out(MALFORMED)
                continue
            text, item_boxes = read(item)
            picture = _picture_id(item) if "image_id" in item else _picture_id(entry)
            if not isinstance(text, str) or picture is None:
                builder.leave_out(MALFORMED)
            elif picture not in rows:
                builder.leave_out(NO_IMAGE_DATA)
            elif (row := rows[picture]) is None:
                builder.leave_out(NO_PICTURE)
            elif not item_boxes:
                builder.leave_out(NO_BOXES)
            elif (index := builder.text(text)) is None:
                builder.leave_out(EMPTY_TEXT)
            else:
                pictures.append(row)
                texts.append(index)
                counts.append(len(item_boxes))
                boxes += item_boxes
        builder.add(pictures, texts, counts, boxes)
    if malformed and not fitting:
        raise ValueError(f"{printable(path)} has no entry with a list {name!r}")
    builder.leave_out(MALFORMED, malformed)


def _description(item: dict[str, Any]) -> tuple[object, list[Box]]:
    return item.get("phrase"), [_box(item, "width", "height")]


def _question(item: dict[str, Any]) -> tuple[object, list[Box]]:
    boxes = []
    for name in ("a_objects", "q_objects"):
        objects = item.get(name, [])
        if not isinstance(objects, list):
            return item.get("question"), [NOT_NUMBERS]
        boxes += [_box(thing, "w", "h") for thing in objects]
    return item.get("question"), boxes


def _box(thing: object, width: str, height: str) -> Box:
    if not isinstance(thing, dict):
        return NOT_NUMBERS
    x, y, w, h = thing.get("x"), thing.get("y"), thing.get(width), thing.get(height)
    if not (_is_number(x) and _is_number(y) and _is_number(w) and _is_number(h)):
        return NOT_NUMBERS
    return x, y, x + w, y + h


def _is_number(value: Any) -> TypeGuard[int | float]:
    # Not isinstance: True is an int too. NaN fails the comparison.
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER


def _is_size(value: Any) -> bool:
    return _is_number(value) and value >= 1


def _picture_id(entry: dict[str, Any]) -> int | None:
    # Older releases say "id".
    value = entry.get("image_id", entry.get("id"))
    return value if type(value) is int else None


def _entries(path: str) -> Iterator[Any]:
    """Yield the elements of the list that `path` holds, one at a time: as objects all of them would take gigabytes."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        decode = json.JSONDecoder().raw_decode
        at = _after(text, 0, "[")
        if text[at : at + 1] == "]":
            end = at
        else:
            while True:
                entry, end = decode(text, at)
                yield entry
                end = _blanks(text, end)
                if text[end : end + 1] != ",":
                    break
                at = _blanks(text, end + 1)
        if _after(text, end, "]") != len(text):
            raise ValueError("text after the list")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)} is not a JSON list as Visual Genome publishes it: {error}") from error


def _after(text: str, at: int, mark: str) -> int:
    at = _blanks(text, at)
    if text[at : at + 1] != mark:
        raise ValueError(f"expected {mark!r} at character {at}, got {text[at : at + 1]!r}")
    return _blanks(text, at + 1)


def _blanks(text: str, at: int) -> int:
    match = BLANKS.match(text, at)
    return match.end() if match else at
