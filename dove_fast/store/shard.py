"""Writing one shard: token values stream into a safetensors file, so that memory does not grow with the shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dove_fast.ragged import RaggedTokens
from dove_fast.store.layout import FORMAT_VERSION, METADATA_KEY, TOKEN_DTYPES
from dove_fast.store.records import InputError, RecordRow, Unit

__all__ = ["ShardWriter", "quantize_tokens"]

# The header is written last, over this many reserved bytes; safetensors allows spaces behind a header's JSON.
HEADER_BYTES = 1024
ALIGNMENT = 8
MAX_TOKENS = 2**31 - 1
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
INT8_MOST = 127


def quantize_tokens(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (total, d) as int8 with one fp32 scale each (total,): values are close to int8 * scale.

    The scale is the token's largest magnitude over 127, so that a value is off by half a scale at most.
    """
    wide = values.float()
    scales = wide.abs().amax(dim=1) / INT8_MOST if values.shape[0] else wide.new_zeros(0)
    steps = wide / torch.where(scales > 0, scales, 1.0)[:, None]
    return steps.round().clamp(-INT8_MOST, INT8_MOST).to(torch.int8), scales


class ShardWriter:
    """Writes the tokens of shard `index` into an open file, readable too, and collects what its records need.

    `store` is `settings_id` of the store's settings, `width` is d, `dtype` a key of `TOKEN_DTYPES`. With `codes`, that
    many codes come with every image.
    """

    def __init__(self, file: BinaryIO, index: int, *, store: str, width: int, dtype: str, codes: int | None) -> None:
        """Reserve the header's place."""
        self._file = file
        self._index = index
        self._store = store
        self._width = width
        self._dtype = dtype
        self._codes_each = codes
        self._codes: list[np.ndarray] = []
        self._scales: list[np.ndarray] = []
        self._squared_error = self._squared_norm = 0.0
        self._errors: list[InputError] = []
        self._tokens = 0
        self.rows: list[RecordRow] = []
        file.write(bytes(HEADER_BYTES))

    def append(self, tokens: RaggedTokens, rows: Sequence[RecordRow], codes: Tensor | None = None) -> None:
        """Add images: their tokens on the CPU, of the store's width, and one record each.

        Tokens have the store's dtype, or any floating one where it is int8. `codes` (n, N), where the store keeps them.
        """
        lengths = [row.length for row in rows]
        if len(tokens) != len(rows) or list(tokens.host_lengths) != lengths:
            raise ValueError(f"rows must have the tokens' lengths {list(tokens.host_lengths)}, got {lengths}")
        values = self._checked(tokens.values)
        if self._tokens + values.shape[0] > MAX_TOKENS:
            raise ValueError(f"a shard holds at most {MAX_TOKENS} tokens; use a smaller shard size")
        expected = None if self._codes_each is None else (len(rows), self._codes_each)
        if (None if codes is None else tuple(codes.shape)) != expected:
            raise ValueError(f"codes must be {expected}, got {None if codes is None else tuple(codes.shape)}")
        if codes is not None:
            self._codes.append(codes.numpy().astype("<u2"))
        if values.numel():
            # As bytes, because numpy has no bfloat16.
            self._file.write(values.contiguous().view(torch.uint8).numpy().data)
        self._tokens += values.shape[0]
        self.rows.extend(rows)

    def _checked(self, values: Tensor) -> Tensor:
        expected = TOKEN_DTYPES[self._dtype]
        fits = values.is_floating_point() if expected == torch.int8 else values.dtype == expected
        if not fits or values.shape[1:] != (self._width,):
            raise ValueError(
                f"tokens must be {self._dtype} of width {self._width}, got {values.dtype} and {tuple(values.shape)}"
            )
        if expected != torch.int8:
            return values
        small, scales = quantize_tokens(values)
        self._scales.append(scales.numpy())
        exact = values.double()
        self._squared_error += float((small * scales[:, None].double() - exact).square().sum())
        self._squared_norm += float(exact.square().sum())
        return small

    def set_aside(self, error: InputError) -> None:
        """Record an input that has no tokens."""
        self._errors.append(error)

    def finish(self) -> Unit:
        """Complete the safetensors file and return what the unit came to."""
        size = self._write_tail()
        return Unit(
            shard=self._index,
            store=self._store,
            records=len(self.rows),
            tokens=self._tokens,
            tokens_bytes=size,
            tokens_sha256=self._hash(),
            errors=tuple(self._errors),
            squared_error=self._squared_error,
            squared_norm=self._squared_norm,
        )

    def _write_tail(self) -> int:
        keys = [row.key.encode() for row in self.rows]
        item_size = TOKEN_DTYPES[self._dtype].itemsize
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
        ]
        if self._dtype == "int8":
            parts.append(("scales", "F32", np.concatenate([np.zeros(0, "<f4"), *self._scales]).astype("<f4")))
        if self._codes_each is not None:
            parts.append(("codes", "U16", np.concatenate([np.zeros((0, self._codes_each), "<u2"), *self._codes])))
        parts.append(("keys", "U8", np.frombuffer(b"".join(keys), np.uint8)))
        if offset % ALIGNMENT:
            # safetensors knows no gaps, and what follows must lie aligned in the file.
            parts.insert(0, ("alignment", "U8", np.zeros(-offset % ALIGNMENT, np.uint8)))
        for name, dtype, array in parts:
            self._file.write(array.tobytes())
            header[name] = {
                "dtype": dtype,
                "shape": list(array.shape),
                "data_offsets": [offset, offset + array.nbytes],
            }
            offset += array.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write((HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8))
        return HEADER_BYTES + offset

    def _hash(self) -> str:
        # Read again, as the header in front was written last; the pages are still in memory.
        digest = hashlib.sha256()
        self._file.seek(0)
        while part := self._file.read(1 << 20):
            digest.update(part)
        return digest.hexdigest()


def _offsets(sizes: list[int], dtype: np.dtype[np.signedinteger]) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, dtype)
    np.cumsum(sizes, out=offsets[1:])
    return offsets
