"""Reading a token store: memory-mapped shards, opened when they are needed."""

from __future__ import annotations

import bisect
import json
import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dove_fast.config import DOVEConfig
from dove_fast.errors import StoreError
from dove_fast.ragged import RaggedTokens
from dove_fast.store.layout import METADATA_KEY, TOKEN_DTYPES, read_manifest, records_path, settings_id, tokens_path
from dove_fast.store.sampling import batches_by_length, windows

if TYPE_CHECKING:
    import pyarrow

__all__ = ["TokenRecord", "TokenStore"]

# Shards kept open: each costs a mapping and its records, not its tokens.
MAX_OPEN_SHARDS = 16


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """One image of a store.

    `tokens` (length, d), a copy in the store's dtype, fp32 where that is int8; `key`; `source`, the file it came from;
    `width` and `height` of the upright original in pixels; `eos_probability` at the last token; `extra`, what came with
    it (labels, captions, boxes), None for nothing; `codes` (N,) int64 of the VQGAN, None where the store has none.
    """

    key: str
    tokens: Tensor
    length: int
    source: str
    width: int
    height: int
    eos_probability: float
    extra: dict[str, Any] | None = None
    codes: Tensor | None = None


class TokenStore:
    """A token store, read memory-mapped; a map-style dataset for torch's `DataLoader`.

    `manifest` is the content of manifest.json. Shards are opened when they are first needed; an instance may be used
    from several threads, and in forked or spawned workers.
    Raises `FileNotFoundError` for no such directory; `StoreError` for one that is no store, is not complete, is
    damaged (there or when the damaged shard is first read), or was written by a later version.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Read the manifest."""
        self.directory = Path(directory)
        self.manifest: dict[str, Any] = read_manifest(self.directory)
        if not self.manifest["complete"]:
            raise StoreError(
                f"{self.directory} is not complete: the job that writes it is still running or was stopped; "
                "run the same dove-fast tokenize command again to finish it"
            )
        settings = self.manifest["settings"]
        self._id = settings_id(settings)
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        try:
            counts = [(int(shard["first"]), int(shard["records"]), int(shard["tokens"])) for shard in self._shards]
            names = {shard[name] for shard in self._shards for name in ("tokens_file", "records_file")}
            self._empty = torch.empty((0, int(settings["width"])), dtype=TOKEN_DTYPES[settings["dtype"]])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.directory} has a damaged manifest: {error!r}") from error
        self._firsts = [first for first, _, _ in counts]
        self._size = sum(records for _, records, _ in counts)
        starts = [0, *accumulate(records for _, records, _ in counts)]
        if self._firsts != starts[:-1] or len(names) != 2 * len(counts):
            raise StoreError(f"{self.directory} has a damaged manifest: its shards do not follow each other")
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Leave mappings and lock behind: a worker opens its own."""
        dropped = ("_open", "_lock", "_process", "lengths")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore without opening anything."""
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        """Return the directory and the counts."""
        return f"TokenStore({str(self.directory)!r}, images={self._size}, tokens={self.manifest['totals']['tokens']})"

    @cached_property
    def config(self) -> DOVEConfig:
        """The configuration of the model that made the tokens."""
        try:
            return DOVEConfig.from_dict(self.manifest["settings"]["config"])
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.directory} has a damaged manifest: {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that tokens are given in: the store's, fp32 where that is int8."""
        return torch.float32 if self._empty.dtype == torch.int8 else self._empty.dtype

    @property
    def has_codes(self) -> bool:
        """Whether the VQGAN's codes were kept."""
        return bool(self.manifest["settings"].get("codes", False))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each image, int32 (len(self),), from the records."""
        return self._column("length").astype(np.int32)

    @property
    def keys(self) -> list[str]:
        """The keys of all images, in order, read from the records at each use."""
        return list(self._column("key"))

    def _column(self, name: str) -> np.ndarray:
        from dove_fast.store.records import read_table

        parts = []
        for number, shard in enumerate(self._shards):
            path = records_path(self.directory, number)
            column = read_table(path, [name]).column(name)
            if len(column) != shard["records"]:
                raise StoreError(f"{path} has {len(column)} records, the manifest says {shard['records']}")
            parts.append(column.to_numpy())
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def __len__(self) -> int:
        """Return the number of images."""
        return self._size

    def __getitem__(self, index: int) -> TokenRecord:
        """Return the record at `index`, counted from the end when negative.

        Raises `IndexError` out of range, `TypeError` for anything but an integer: several images are `ragged(indices)`.
        """
        shard, row = self._locate(index)
        return shard.record(row)

    def __iter__(self) -> Iterator[TokenRecord]:
        """Iterate over the records in order."""
        return (self[index] for index in range(self._size))

    def codes(self, index: int) -> Tensor:
        """Return the VQGAN's codes (N,) int64 of the image at `index`, without reading its tokens.

        Raises `ValueError` for a store without codes, `IndexError` and `TypeError` as indexing does.
        """
        if not self.has_codes:
            raise ValueError(f"{self.directory} has no codes; dove-fast tokenize --codes makes a store that has them")
        shard, row = self._locate(index)
        codes = shard.codes(row)
        if codes is None:
            raise StoreError(f"{self.directory} has a damaged manifest: it says codes, and a shard has none")
        return codes

    def shuffled(self, seed: int) -> Iterator[TokenRecord]:
        """Iterate over all records in an order that `seed` decides, with at most `MAX_OPEN_SHARDS` shards open.

        Shards come in random order, that many at a time, and the records of these in random order.
        """
        return (self[index] for window in self._windows(seed) for index in window.tolist())

    def _windows(self, seed: int | None) -> Iterator[np.ndarray]:
        return windows(self._firsts, self._size, window=MAX_OPEN_SHARDS, seed=seed)

    def length_batches(
        self, *, max_tokens: int | None = None, batch_size: int | None = None, seed: int | None = None
    ) -> Iterator[list[int]]:
        """Iterate over batches of indices for `ragged`, of images with similar lengths; every image comes once.

        A batch has at most `max_tokens` tokens in all, and at most `batch_size` images; one of the two is needed.
        `seed` shuffles shards and batches; None takes the store's order. The images of a batch, and of those after it,
        come from the same `MAX_OPEN_SHARDS` shards, so that each is opened once; from more where these give too few.
        Raises `ValueError` for neither, for less than 1, and for `max_tokens` below the longest image's.
        """
        if max_tokens is None and batch_size is None:
            raise ValueError("max_tokens or batch_size must be given")
        for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        longest = int(self.lengths.max()) if self._size else 0
        if max_tokens is not None and max_tokens < longest:
            raise ValueError(f"max_tokens must be at least {longest}, the longest image's, got {max_tokens}")
        parts = self._windows(seed)
        return batches_by_length(self.lengths, parts, max_tokens=max_tokens, batch_size=batch_size, seed=seed)

    def ragged(self, indices: Iterable[int]) -> RaggedTokens:
        """Return the tokens of the images at `indices`, in that order, as `RaggedTokens` on the CPU.

        Raises `IndexError` and `TypeError` as indexing does.
        """
        parts = []
        for index in indices:
            shard, row = self._locate(index)
            parts.append(shard.tokens(row))
        lengths = [part.shape[0] for part in parts]
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
        values = torch.cat(parts) if parts else self._empty.to(self.dtype)
        return RaggedTokens(values, cu_seqlens, max(lengths, default=0))

    def _locate(self, index: int) -> tuple[_Shard, int]:
        try:
            wanted = operator.index(index)
        except TypeError:
            raise TypeError(
                f"an index must be an integer, got {type(index).__name__}; use ragged(indices) for several images"
            ) from None
        position = wanted + self._size if wanted < 0 else wanted
        if not 0 <= position < self._size:
            raise IndexError(f"index {wanted} is out of range for a store of {self._size} images")
        # The last shard that starts at or before the position: shards without records share their start with the next.
        number = bisect.bisect_right(self._firsts, position) - 1
        return self._shard(number), position - self._firsts[number]

    def _shard(self, number: int) -> _Shard:
        if self._process != os.getpid():
            # Forked: the parent's lock may have been held at that moment.
            self._forget()
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                shard = self._open[number] = _Shard(self.directory, self._shards[number], number, self._id, self._empty)
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return shard


class _Shard:
    """One open shard: a mapping of its values, its offsets, and its records once they are asked for."""

    def __init__(self, directory: Path, entry: dict[str, Any], number: int, store: str, empty: Tensor) -> None:
        # The manifest's file names are for other readers; a damaged one must not lead out of the store.
        self._path = tokens_path(directory, number)
        self._records_path = records_path(directory, number)
        self._table: pyarrow.Table | None = None
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                # A view of the mapped file: rows are read from the disk when they are used.
                self._values = file.get_tensor("values")
                offsets = file.get_tensor("cu_seqlens")
                names = set(file.keys())
                self._scales = file.get_tensor("scales") if "scales" in names else None
                self._codes = file.get_tensor("codes") if "codes" in names else None
        except FileNotFoundError:
            raise StoreError(f"{self._path} is missing") from None
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise StoreError(f"{self._path} is damaged: {error}") from error
        self._offsets: list[int] = offsets.tolist()
        if (metadata.get("store"), metadata.get("shard")) != (store, number):
            raise StoreError(f"{self._path} belongs to another store or to another place in this one")
        shape, expected = tuple(self._values.shape), (entry["tokens"], empty.shape[1])
        if shape != expected or self._values.dtype != empty.dtype:
            raise StoreError(
                f"{self._path} holds {self._values.dtype} values {shape}, the manifest says {empty.dtype} {expected}"
            )
        if (
            len(self._offsets) != entry["records"] + 1
            or self._offsets[0] != 0
            or self._offsets[-1] != shape[0]
            or not bool((offsets[1:] >= offsets[:-1]).all())
            or (self._scales is None) != (empty.dtype != torch.int8)
            or (self._scales is not None and self._scales.shape[0] != shape[0])
            or (self._codes is not None and self._codes.shape[0] != entry["records"])
        ):
            raise StoreError(f"{self._path} is damaged: its tensors do not fit {shape[0]} tokens")

    def tokens(self, row: int) -> Tensor:
        """Return tokens (length, d): a view of the mapping, or where they are int8 a copy in fp32."""
        rows = slice(self._offsets[row], self._offsets[row + 1])
        view: Tensor = self._values[rows]
        return view if self._scales is None else view * self._scales[rows, None]

    def codes(self, row: int) -> Tensor | None:
        """Return codes (N,) int64, None where there are none."""
        return None if self._codes is None else self._codes[row].to(torch.int64)

    def record(self, row: int) -> TokenRecord:
        """Return the record at `row`."""
        table = self._records()
        field = {name: table.column(name)[row].as_py() for name in ("key", "source", "width", "height")}
        # A copy: writing into it must not change what the next reader of the mapping sees.
        tokens = self.tokens(row).clone()
        probability = table.column("eos_probability")[row].as_py()
        extra = table.column("extra")[row].as_py() if "extra" in table.column_names else None
        return TokenRecord(
            tokens=tokens,
            length=tokens.shape[0],
            eos_probability=probability,
            extra=None if extra is None else json.loads(extra),
            codes=self.codes(row),
            **field,
        )

    def _records(self) -> pyarrow.Table:
        if self._table is None:
            from dove_fast.store.records import read_table

            table = read_table(self._records_path)
            lengths = np.diff(np.asarray(self._offsets))
            if table.num_rows != len(lengths) or not np.array_equal(table.column("length").to_numpy(), lengths):
                raise StoreError(f"{self._records_path} and {self._path} do not belong together: other lengths")
            self._table = table
        return self._table
