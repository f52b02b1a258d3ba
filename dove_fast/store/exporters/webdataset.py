"""A store as WebDataset shards: tar files that hold each image as a few members of one name.

    000000012.json         key, source, length, width, height, eos_probability, extra
    000000012.npy          tokens (length, d)
    000000012.codes.npy    codes uint16 (N,), where the store has them

The name is the image's index in the store: a key may hold dots and folders, and WebDataset splits at the first dot.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import numpy as np

from dove_fast.store.exporters import ExportFile, OnImage, code_array, ends_with, shards, token_array
from dove_fast.store.reader import TokenRecord, TokenStore

__all__ = ["webdataset_files"]

# A tar file ends with two blocks of zeros, and more of them up to a multiple of its record size.
END = bytes(2 * tarfile.BLOCKSIZE)


def webdataset_files(store: TokenStore, shard_size: int) -> Iterator[ExportFile]:
    """Yield the tar files of a store, `shard_size` images each; the same store gives the same bytes."""
    for name, rows in shards(len(store), shard_size):
        yield ExportFile(f"{name}.tar", rows, partial(_write, store, rows), _is_whole)


def _is_whole(file: BinaryIO) -> bool:
    return ends_with(file, END) and file.tell() % tarfile.RECORDSIZE == 0


def _write(store: TokenStore, rows: range, file: BinaryIO, on_image: OnImage) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            record = store[row]
            _add(tar, f"{row:09d}.json", _describe(record))
            _add(tar, f"{row:09d}.npy", _npy(token_array(record)))
            if store.has_codes:
                _add(tar, f"{row:09d}.codes.npy", _npy(code_array(record.key, record.codes)))
            # tarfile keeps what it wrote in a list: memory would grow with the file.
            tar.members.clear()  # type: ignore[attr-defined]
            on_image(record.length)


def _describe(record: TokenRecord) -> bytes:
    names = ("key", "source", "length", "width", "height", "eos_probability", "extra")
    return json.dumps({name: getattr(record, name) for name in names}, ensure_ascii=False).encode()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # As TarInfo is made: time, owner and group are 0.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
