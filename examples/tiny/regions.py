"""Captions and boxes that are made from a picture itself: where something is, or what stands out.

The words of all captions are the vocabulary of the tiny model's tokenizer, which `python regions.py FILE` writes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# A picture is seen as GRID x GRID cells.
GRID = 3
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
HALVES = {
    "left half": (0.0, 0.0, 0.5, 1.0),
    "right half": (0.5, 0.0, 1.0, 1.0),
    "upper half": (0.0, 0.0, 1.0, 0.5),
    "lower half": (0.0, 0.5, 1.0, 1.0),
}
FORMS = ("the {}", "what is in the {}?", "look at the {}", "describe the {}")

Cell = npt.NDArray[np.float64]


def _detail(cell: Cell) -> float:
    return float(np.abs(np.diff(cell.mean(axis=2), axis=0)).mean() + np.abs(np.diff(cell.mean(axis=2), axis=1)).mean())


# What a cell is measured by, and the name of the cell that has most of it.
QUALITIES: dict[str, Callable[[Cell], float]] = {
    "brightest part": lambda cell: float(cell.mean()),
    "darkest part": lambda cell: -float(cell.mean()),
    "most colourful part": lambda cell: float((cell.max(axis=2) - cell.min(axis=2)).mean()),
    "most detailed part": _detail,
    "smoothest part": lambda cell: -_detail(cell),
    "reddest part": lambda cell: float((cell[..., 0] - cell.mean(axis=2)).mean()),
    "greenest part": lambda cell: float((cell[..., 1] - cell.mean(axis=2)).mean()),
    "bluest part": lambda cell: float((cell[..., 2] - cell.mean(axis=2)).mean()),
}


def regions(pixels: npt.NDArray[np.uint8], random: np.random.Generator) -> list[dict[str, object]]:
    """Return three captioned regions of a picture (S, S, 3): a place, a half, and what has most of some quality."""
    size = len(pixels)
    row, column = (int(value) for value in random.integers(0, GRID, 2))
    half = str(random.choice(sorted(HALVES)))
    quality = str(random.choice(sorted(QUALITIES)))
    cells = {
        (y, x): pixels[_edges(y, size)[0] : _edges(y, size)[1], _edges(x, size)[0] : _edges(x, size)[1]] / 255
        for y in range(GRID)
        for x in range(GRID)
    }
    best = max(cells, key=lambda at: QUALITIES[quality](cells[at]))
    found = [
        (PLACES[row][column], _box(row, column, size)),
        (half, [edge * size for edge in HALVES[half]]),
        (quality, _box(*best, size)),
    ]
    return [{"text": str(random.choice(FORMS)).format(name), "boxes": [box]} for name, box in found]


def _edges(index: int, size: int) -> tuple[int, int]:
    return index * size // GRID, (index + 1) * size // GRID


def _box(row: int, column: int, size: int) -> list[float]:
    (top, bottom), (left, right) = _edges(row, size), _edges(column, size)
    return [float(edge) for edge in (left, top, right, bottom)]


def vocabulary() -> list[str]:
    """Return every word of every caption, and a token for all others first."""
    names = [name for line in PLACES for name in line] + list(HALVES) + list(QUALITIES)
    words = {word for text in (*names, *FORMS) for word in re.findall(r"[a-z]+|\?", text)}
    return ["[UNK]", *sorted(words)]


def write_tokenizer(path: str) -> None:
    """Write the `tokenizers` file: lower case, split at blanks and signs, a number a word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(path)


if __name__ == "__main__":
    write_tokenizer(sys.argv[1])
