"""A store's codes as Megatron-LM's indexed dataset: a sequence an image, each a document of its own.

    tokens.bin   the codes of all images, uint16, one image after the other
    tokens.idx   "MMIDIDX", version 1, dtype, the number of sequences and of document indices; then for every sequence
                 its length int32, then where it begins in tokens.bin, in bytes, int64; then the document indices int64:
                 with which sequence each document begins, and the number of sequences at the end

The layout is that of `_IndexWriter` in Megatron-LM's megatron/core/datasets/indexed_dataset.py; all is little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import numpy as np

from dove_fast.errors import StoreError
from dove_fast.store.exporters import ExportFile, OnImage, code_array
from dove_fast.store.reader import TokenStore

__all__ = ["megatron_files"]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# Megatron-LM's number for uint16.
UINT16_CODE = 8
ITEM_SIZE = 2
HEADER = struct.Struct("<9sQBQQ")
# Entries of the index that are in memory together.
INDEX_ENTRIES = 1 << 20


def megatron_files(store: TokenStore, shard_size: int) -> Iterator[ExportFile]:
    """Return the two files of a store, whatever the shard size. Raises `ValueError` for a store without codes."""
    if not store.has_codes:
        raise ValueError(
            f"{store.directory} has no codes, and megatron takes integers only; "
            "make a store that has them with dove-fast tokenize --codes"
        )
    count, each = len(store), store.config.num_features
    sizes = count * each * ITEM_SIZE, HEADER.size + count * (4 + 8) + (count + 1) * 8
    files = [
        ExportFile("tokens.bin", range(count), partial(_write_codes, store, each), partial(_has_size, size=sizes[0])),
        ExportFile("tokens.idx", range(0), partial(_write_index, count, each), partial(_has_size, size=sizes[1])),
    ]
    return iter(files)


def _has_size(file: BinaryIO, size: int) -> bool:
    return file.seek(0, os.SEEK_END) == size


def _write_codes(store: TokenStore, each: int, file: BinaryIO, on_image: OnImage) -> None:
    for row in range(len(store)):
        # Not the whole record: its tokens would be read from the disk for nothing.
        codes = code_array(f"image {row}", store.codes(row))
        if len(codes) != each:
            raise StoreError(f"image {row} has {len(codes)} codes, the configuration says {each}")
        file.write(codes.data)
        on_image(each)


def _write_index(count: int, each: int, file: BinaryIO, on_image: OnImage) -> None:
    file.write(HEADER.pack(MAGIC, VERSION, UINT16_CODE, count, count + 1))
    for part in _ranges(count):
        file.write(np.full(len(part), each, "<i4").data)
    for part in _ranges(count):
        file.write((np.arange(part.start, part.stop, dtype="<i8") * (each * ITEM_SIZE)).data)
    for part in _ranges(count + 1):
        file.write(np.arange(part.start, part.stop, dtype="<i8").data)


def _ranges(count: int) -> Iterator[range]:
    for first in range(0, count, INDEX_ENTRIES):
        yield range(first, min(first + INDEX_ENTRIES, count))
