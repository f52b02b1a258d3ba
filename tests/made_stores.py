"""Small stores, written with the real writer from made-up tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from dove_fast import DOVEConfig, RaggedTokens
from dove_fast.data.sources import hash_keys
from dove_fast.store.layout import DTYPES, StoreSettings
from dove_fast.store.records import InputError, RecordRow
from dove_fast.store.writer import StoreWriter

WIDTH = DOVEConfig.tiny().generator.hidden_size


def settings(inputs: int, **changes) -> StoreSettings:
    """Return the settings of a store of `inputs` inputs, three a shard."""
    fields = {
        "config": DOVEConfig.tiny().to_dict(),
        "fingerprint": "sha256:0",
        "transform": {"name": "t/1", "size": 64},
        "source": {"kind": "files"},
        "dtype": "float32",
        "width": WIDTH,
        "codes": False,
        "length": None,
        "max_length": None,
        "eos_threshold": 0.5,
        "queries_sha256": None,
        "shard_size": 3,
        "units": -(-inputs // changes.get("shard_size", 3)),
        "inputs": inputs,
        "inputs_sha256": hash_keys(f"k{index}" for index in range(inputs)),
    }
    return StoreSettings(**{**fields, **changes})


def image(index: int, dtype: str, width: int) -> tuple[torch.Tensor, RecordRow]:
    """Return input `index`'s tokens, 1 to 5 of them, and its record."""
    length = index * 7 % 5 + 1
    values = torch.randn(length, width, generator=torch.Generator().manual_seed(index)).to(DTYPES[dtype])
    return values, RecordRow(f"k{index}", f"in/k{index}", length, 10 + index, 20 + index, index / 16)


def ragged(rows: list[torch.Tensor]) -> RaggedTokens:
    """Join rows."""
    lengths = [row.shape[0] for row in rows]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return RaggedTokens(torch.cat(rows), offsets, max(lengths))


def fill(writer: StoreWriter, bad: frozenset[int] = frozenset(), only: list[int] | None = None) -> None:
    """Write the units that are missing, or `only` some, in batches of two; inputs in `bad` are set aside."""
    size, count = writer.settings.shard_size, writer.settings.inputs
    for unit in writer.missing if only is None else only:
        with writer.shard(unit) as shard:
            inputs = range(unit * size, min((unit + 1) * size, count))
            for index in bad.intersection(inputs):
                shard.set_aside(InputError(f"k{index}", f"in/k{index}", "broken"))
            good = [image(index, writer.settings.dtype, writer.settings.width) for index in inputs if index not in bad]
            for first in range(0, len(good), 2):
                values, rows = zip(*good[first : first + 2], strict=True)
                shard.append(ragged(list(values)), list(rows))


def write(directory: Path, inputs: int = 8, bad: frozenset[int] = frozenset(), **changes) -> Path:
    """Write a complete store."""
    writer = StoreWriter(directory, settings(inputs, **changes), {"torch": "test"})
    writer.begin()
    fill(writer, bad)
    writer.finish()
    return directory
