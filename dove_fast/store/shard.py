"""Writing one shard: token values stream into a safetensors file, so that memory does not grow with the shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch

from dove_fast.ragged import RaggedTokens
from dove_fast.store.layout import DTYPES, FORMAT_VERSION, METADATA_KEY
from dove_fast.store.records import InputError, RecordRow, Unit

__all__ = ["ShardWriter"]

# The header is written last, over this many reserved bytes; safetensors allows spaces behind a header's JSON.
HEADER_BYTES = 1024
ALIGNMENT = 8
MAX_TOKENS = 2**31 - 1
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ShardWriter:
    """Writes the tokens of shard `index` into an open file and collects what its records need.

    `store` is `settings_id` of the store's settings, `width` is d, `dtype` a key of `DTYPES`.
    """

    def __init__(self, file: BinaryIO, index: int, *, store: str, width: int, dtype: str) -> None:
        """Reserve the header's place."""
        self._file = file
        self._index = index
        self._store = store
        self._width = width
        self._dtype = dtype
        self._errors: list[InputError] = []
        self._tokens = 0
        self.rows: list[RecordRow] = []
        file.write(bytes(HEADER_BYTES))

    def append(self, tokens: RaggedTokens, rows: Sequence[RecordRow]) -> None:
        """Add images: their tokens, on the CPU in the store's dtype and width, and one record each."""
        lengths = [row.length for row in rows]
        if len(tokens) != len(rows) or list(tokens.host_lengths) != lengths:
            raise ValueError(f"rows must have the tokens' lengths {list(tokens.host_lengths)}, got {lengths}")
        values = tokens.values
        if values.dtype != DTYPES[self._dtype] or values.shape[1:] != (self._width,):
            raise ValueError(
                f"tokens must be {self._dtype} of width {self._width}, got {values.dtype} and {tuple(values.shape)}"
            )
        if self._tokens + values.shape[0] > MAX_TOKENS:
            raise ValueError(f"a shard holds at most {MAX_TOKENS} tokens; use a smaller shard size")
        if values.numel():
            # As bytes, because numpy has no bfloat16.
            self._file.write(values.contiguous().view(torch.uint8).numpy().data)
        self._tokens += values.shape[0]
        self.rows.extend(rows)

    def set_aside(self, error: InputError) -> None:
        """Record an input that has no tokens."""
        self._errors.append(error)

    def finish(self) -> Unit:
        """Complete the safetensors file and return what the unit came to."""
        return Unit(
            shard=self._index,
            store=self._store,
            records=len(self.rows),
            tokens=self._tokens,
            tokens_bytes=self._write_tail(),
            errors=tuple(self._errors),
        )

    def _write_tail(self) -> int:
        keys = [row.key.encode() for row in self.rows]
        item_size = DTYPES[self._dtype].itemsize
        header: dict[str, object] = {
            "__metadata__": {
                METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION, "shard": self._index, "store": self._store})
            }
        }
        offset = self._tokens * self._width * item_size
        header["values"] = {
            "dtype": SAFETENSORS_DTYPES[self._dtype],
            "shape": [self._tokens, self._width],
            "data_offsets": [0, offset],
        }
        parts = [
            ("key_offsets", "I64", _offsets([len(key) for key in keys], np.dtype("<i8"))),
            ("cu_seqlens", "I32", _offsets([row.length for row in self.rows], np.dtype("<i4"))),
            ("keys", "U8", np.frombuffer(b"".join(keys), np.uint8)),
        ]
        if offset % ALIGNMENT:
            # Only for odd widths: safetensors knows no gaps, and what follows must lie aligned in the file.
            parts.insert(0, ("alignment", "U8", np.zeros(-offset % ALIGNMENT, np.uint8)))
        for name, dtype, array in parts:
            self._file.write(array.tobytes())
            header[name] = {"dtype": dtype, "shape": [array.size], "data_offsets": [offset, offset + array.nbytes]}
            offset += array.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write((HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8))
        return HEADER_BYTES + offset


def _offsets(sizes: list[int], dtype: np.dtype[np.signedinteger]) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, dtype)
    np.cumsum(sizes, out=offsets[1:])
    return offsets
