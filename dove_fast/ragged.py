"""RaggedTokens: sequences of different lengths, one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, overload

import torch
from torch import Tensor

from dove_fast.ops.pack import cu_seqlens_from_offsets, host_lengths, pack, unpack

__all__ = ["RaggedTokens"]


@dataclass(frozen=True, eq=False, repr=False)
class RaggedTokens:
    """B sequences of tokens, of different lengths and one width, stored one behind the other.

    values: (total, d), any dtype; cu_seqlens: (B + 1,) int32 on values' device, row b is
    values[cu_seqlens[b] : cu_seqlens[b + 1]]; max_seqlen: the longest row's length, 0 for B = 0.
    Rows, slices and padded forms are differentiable with respect to `values`.

    The constructor checks all of this, which on a GPU costs one host read. Objects that the library makes know their
    lengths on the host: nothing here synchronises with a device, except where it says so.
    Raises `TypeError` for a wrong type or dtype, `ValueError` for a wrong shape, device or content.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    # cu_seqlens on the host: B + 1 ints.
    _offsets: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Check the invariants and keep the offsets on the host."""
        _check_values(self.values)
        object.__setattr__(self, "_offsets", _checked_offsets(self.values, self.cu_seqlens))
        if isinstance(self.max_seqlen, bool) or not isinstance(self.max_seqlen, int):
            raise TypeError(f"max_seqlen must be an int, got {type(self.max_seqlen).__name__}")
        longest = max(self.host_lengths, default=0)
        if self.max_seqlen != longest:
            raise ValueError(f"max_seqlen must be the longest row's length {longest}, got {self.max_seqlen}")

    @classmethod
    def _make(cls, values: Tensor, offsets: Sequence[int], cu_seqlens: Tensor | None = None) -> RaggedTokens:
        """Build from offsets that are known on the host, without checks or a synchronisation."""
        self = object.__new__(cls)
        if cu_seqlens is None:
            cu_seqlens = cu_seqlens_from_offsets(offsets, values.device)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "cu_seqlens", cu_seqlens)
        object.__setattr__(self, "_offsets", tuple(offsets))
        object.__setattr__(self, "max_seqlen", max(self.host_lengths, default=0))
        return self

    @classmethod
    def from_padded(cls, padded: Tensor, lengths: Tensor | Sequence[int]) -> RaggedTokens:
        """Keep the first lengths[b] tokens of each row of padded (B, L, d).

        lengths: (B,) integers, 0 <= n <= L; a tensor on a GPU costs one host read, a sequence none.
        Raises `TypeError` or `ValueError` as `ops.pack` does.
        """
        if isinstance(padded, Tensor) and padded.dim() != 3:
            raise ValueError(f"padded must have shape (B, L, d), got {tuple(padded.shape)}")
        if isinstance(padded, Tensor):
            lengths = host_lengths(lengths, padded.shape[0], padded.shape[1])
        values, cu_seqlens = pack(padded, lengths)
        return cls._make(values, list(accumulate(lengths, initial=0)), cu_seqlens)

    @classmethod
    def from_rows(cls, rows: Sequence[Tensor]) -> RaggedTokens:
        """Join rows, each (m, d), in order: what `TokenStream` yields, say. All must have one width, dtype and device.

        Raises `ValueError` for no rows or another shape or device, `TypeError` for another dtype or type.
        """
        rows = list(rows)
        if not rows:
            raise ValueError("from_rows needs at least one row, got none")
        for row in rows:
            _check_values(row, "a row", "(m, d)")
            _check_alike(rows[0], row, "from_rows")
        # The offsets first: they refuse a total beyond int32 before anything is copied.
        offsets = list(accumulate((row.shape[0] for row in rows), initial=0))
        cu_seqlens = cu_seqlens_from_offsets(offsets, rows[0].device)
        return cls._make(torch.cat(rows), offsets, cu_seqlens)

    @classmethod
    def cat(cls, batches: Sequence[RaggedTokens]) -> RaggedTokens:
        """Join batches row after row, in order. All must have one width, dtype and device.

        Raises `ValueError` for an empty sequence or another width or device, `TypeError` for another dtype or type.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("cat needs at least one RaggedTokens, got none")
        for item in batches:
            if not isinstance(item, RaggedTokens):
                raise TypeError(f"cat takes RaggedTokens, got {type(item).__name__}")
        first = batches[0].values
        for item in batches[1:]:
            _check_alike(first, item.values, "cat")
        lengths = [length for item in batches for length in item.host_lengths]
        # The offsets first: they refuse a total beyond int32 before anything is copied.
        offsets = list(accumulate(lengths, initial=0))
        cu_seqlens = cu_seqlens_from_offsets(offsets, first.device)
        return cls._make(torch.cat([item.values for item in batches]), offsets, cu_seqlens)

    @classmethod
    def from_nested(cls, nested: Tensor) -> RaggedTokens:
        """Convert a torch nested tensor (B, j, d) of the jagged layout, with or without holes between its rows.

        Shares the values where the rows lie side by side, else copies. One host read on a GPU: the lengths.
        Raises `TypeError` for another layout, `ValueError` for another shape.
        """
        if not isinstance(nested, Tensor) or not nested.is_nested or nested.layout != torch.jagged:
            found = type(nested).__name__ if not isinstance(nested, Tensor) else f"layout {nested.layout}"
            raise TypeError(f"nested must be a nested tensor of layout torch.jagged, got {found}")
        if nested.dim() != 3 or isinstance(nested.shape[2], torch.SymInt):
            raise ValueError(f"nested must have shape (B, j, d) with ragged j, got {tuple(nested.shape)}")
        jagged: Any = nested
        values, starts, holes = jagged.values(), jagged.offsets().tolist(), jagged.lengths()
        lengths = [stop - start for start, stop in pairwise(starts)]
        if holes is not None:
            lengths = holes.tolist()
        offsets = list(accumulate(lengths, initial=0))
        if offsets != starts[: len(offsets)] or offsets[-1] != values.shape[0]:
            rows = [values[start : start + length] for start, length in zip(starts, lengths, strict=False)]
            values = torch.cat([values[:0], *rows])
        return cls._make(values, offsets)

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """The rows' lengths as ints on the host: no synchronisation."""
        return tuple(stop - start for start, stop in pairwise(self._offsets))

    @property
    def lengths(self) -> Tensor:
        """The rows' lengths, (B,) int64 on values' device."""
        return self.cu_seqlens.diff().long()

    def __len__(self) -> int:
        """Return the number of rows B."""
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> RaggedTokens: ...
    def __getitem__(self, index: int | slice) -> Tensor | RaggedTokens:
        """Return row `index` as a (m_i, d) view, or a slice of the rows as RaggedTokens.

        A slice of neighbouring rows shares the values; one with another step copies them.
        """
        if isinstance(index, slice):
            return self._slice(index)
        row = range(len(self))[index]
        return self.values[self._offsets[row] : self._offsets[row + 1]]

    def _slice(self, index: slice) -> RaggedTokens:
        rows = range(len(self))[index]
        if rows.step == 1:
            offsets = self._offsets[rows.start : max(rows.start, rows.stop) + 1]
            values = self.values[offsets[0] : offsets[-1]]
            cu_seqlens = self.cu_seqlens[rows.start : rows.start + len(offsets)] - offsets[0]
            return self._make(values, [offset - offsets[0] for offset in offsets], cu_seqlens)
        parts = [self[row] for row in rows]
        # values[:0] gives no rows a width, a dtype and a place in the graph.
        values = torch.cat([self.values[:0], *parts])
        return self._make(values, list(accumulate((part.shape[0] for part in parts), initial=0)))

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the rows, each a (m_i, d) view."""
        return (self[row] for row in range(len(self)))

    def to_padded(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Return ((B, length, d) with zeros behind each row, lengths (B,) int64); `length` defaults to max_seqlen.

        Raises `ValueError` where `length` is shorter than a row.
        """
        if length is None:
            length = self.max_seqlen
        elif length < self.max_seqlen:
            raise ValueError(f"length must be at least the longest row's {self.max_seqlen}, got {length}")
        return unpack(self.values, self.cu_seqlens, length), self.lengths

    def to_nested(self) -> Tensor:
        """Return a torch nested tensor (B, j, d) of the jagged layout that shares the values."""
        nested: Tensor = torch.nested.nested_tensor_from_jagged(
            self.values,
            offsets=self.cu_seqlens.long(),
            min_seqlen=min(self.host_lengths, default=0),
            max_seqlen=self.max_seqlen,
        )
        return nested

    def to(
        self,
        *targets: torch.device | str | int | torch.dtype,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> RaggedTokens:
        """Move to a device, convert the values to a dtype, or both, as with `Tensor.to`.

        cu_seqlens moves along and stays int32. Returns self where nothing changes.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        place = self.values.device if device is None else device
        values = self.values.to(place, self.values.dtype if dtype is None else dtype, non_blocking=non_blocking)
        if values is self.values:
            return self
        return self._make(values, self._offsets, self.cu_seqlens.to(place, non_blocking=non_blocking))

    def pin_memory(self) -> RaggedTokens:
        """Return a copy in page-locked memory, as a DataLoader with `pin_memory=True` asks for. Needs a GPU."""
        return self._make(self.values.pin_memory(), self._offsets, self.cu_seqlens.pin_memory())

    def __repr__(self) -> str:
        """Return the shape in short."""
        lengths = ", ".join(map(str, self.host_lengths[:8])) + (", .." if len(self) > 8 else "")
        dtype = str(self.values.dtype).removeprefix("torch.")
        return (
            f"RaggedTokens({len(self)} rows, values {tuple(self.values.shape)} {dtype} on {self.values.device}, "
            f"max_seqlen {self.max_seqlen}, lengths [{lengths}])"
        )


def _check_values(values: Tensor, name: str = "values", shape: str = "(total, d)") -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.dim() != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")


def _checked_offsets(values: Tensor, cu_seqlens: Tensor) -> tuple[int, ...]:
    """Return cu_seqlens as host ints, after checking it against values; one host read on a GPU."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != values.device:
        raise ValueError(f"cu_seqlens must be on {values.device} like values, got {cu_seqlens.device}")
    offsets = tuple(cu_seqlens.tolist())
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, got {offsets[0]}")
    for row, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(f"cu_seqlens must not decrease, got {start} and then {stop} in row {row}")
    if offsets[-1] != values.shape[0]:
        raise ValueError(f"cu_seqlens must end with the {values.shape[0]} entries of values, got {offsets[-1]}")
    return offsets


def _check_alike(first: Tensor, other: Tensor, caller: str) -> None:
    if other.shape[1] != first.shape[1]:
        raise ValueError(f"{caller} needs one width, got {first.shape[1]} and {other.shape[1]}")
    if other.dtype != first.dtype:
        raise TypeError(f"{caller} needs one dtype, got {first.dtype} and {other.dtype}")
    if other.device != first.device:
        raise ValueError(f"{caller} needs one device, got {first.device} and {other.device}")
