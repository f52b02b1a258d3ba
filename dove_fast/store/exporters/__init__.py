"""A store in other libraries' formats: what the files of an export have in common; one module a format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch

from dove_fast.errors import StoreError
from dove_fast.store.reader import TokenRecord

__all__ = ["ExportFile", "OnImage", "code_array", "ends_with", "shards", "token_array"]

# Called with an image's number of tokens, or of codes, once they are written.
OnImage = Callable[[int], None]


@dataclass(frozen=True)
class ExportFile:
    """One file of an export: its name and the images in it, by index; empty for one that comes beside another.

    `is_whole` tells whether an open file is what `write` would have written, cut off nowhere.
    """

    name: str
    rows: range
    write: Callable[[BinaryIO, OnImage], None]
    is_whole: Callable[[BinaryIO], bool]


def shards(total: int, size: int) -> Iterator[tuple[str, range]]:
    """Yield "000000", "000001", .. with the images of each, `size` but in the last."""
    for number, first in enumerate(range(0, total, size)):
        yield f"{number:06d}", range(first, min(first + size, total))


def ends_with(file: BinaryIO, end: bytes) -> bool:
    """Tell whether a file's last bytes are `end`, what its format puts behind everything else."""
    size = file.seek(0, os.SEEK_END)
    # Not the end alone: Parquet's stands at the beginning too.
    if size <= len(end):
        return False
    file.seek(-len(end), os.SEEK_END)
    return file.read() == end


def token_array(record: TokenRecord) -> np.ndarray:
    """Return an image's tokens (length, d) float32 or float16; numpy has no bfloat16, float32 holds it exactly."""
    tokens = record.tokens
    array: np.ndarray = (tokens.float() if tokens.dtype == torch.bfloat16 else tokens).numpy()
    return array


def code_array(key: str, codes: torch.Tensor | None) -> np.ndarray:
    """Return an image's codes (N,) uint16. Raises `StoreError` where a store that has codes lacks them."""
    if codes is None:
        raise StoreError(f"{key} has no codes, though the manifest says that they were kept; run dove-fast verify")
    array: np.ndarray = codes.numpy().astype("<u2")
    return array
