"""Summaries of a token store and of a checkpoint directory, as data."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dove_fast.config import DOVEConfig
from dove_fast.errors import CheckpointError, StoreError
from dove_fast.models.checkpoint import CONFIG_NAME, read_config, weight_files
from dove_fast.ops import registry
from dove_fast.store.layout import FORMAT_VERSION, MANIFEST_NAME, StoreSettings, read_manifest
from dove_fast.store.reader import TokenStore
from dove_fast.store.writer import StoreWriter

__all__ = [
    "CheckpointSummary",
    "StoreSummary",
    "describe_default_backend",
    "is_checkpoint",
    "is_store",
    "length_histogram",
    "summarize_checkpoint",
    "summarize_store",
]

PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, eq=False)
class StoreSummary:
    """A store in numbers: `lengths` int32 (images,), what its manifest says, and how many of its units are done.

    `complete`: whether it is whole and can be read, which takes more than all units. `codes`: the VQGAN's are kept.
    `quantization_error`: relative, of tokens kept in int8; None where they are kept as they are.
    """

    images: int
    tokens: int
    errors: int
    lengths: np.ndarray
    config: DOVEConfig
    settings: dict[str, Any]
    units: int
    units_done: int
    complete: bool = True
    codes: bool = False
    quantization_error: float | None = None

    @property
    def mean(self) -> float:
        """Mean tokens an image, NaN without images."""
        return self.tokens / self.images if self.images else float("nan")

    def percentiles(self) -> dict[int, int]:
        """Return tokens at each of `PERCENTILES`, each a length that occurs; empty without images."""
        if not self.images:
            return {}
        values = np.percentile(self.lengths, PERCENTILES, method="nearest")
        return {percent: int(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def summarize_store(directory: str | os.PathLike[str]) -> StoreSummary:
    """Read a store's manifest and the lengths in its records.

    Of a store that a job is still writing, or was stopped in, it is the units that are done. Raises what `TokenStore`
    raises, but not for that.
    """
    manifest = read_manifest(Path(directory))
    if not manifest["complete"] and manifest["format_version"] == FORMAT_VERSION:
        return _summarize_unfinished(Path(directory), manifest["settings"])
    store = TokenStore(directory)
    return StoreSummary(
        images=len(store),
        tokens=int(store.lengths.sum(dtype=np.int64)),
        errors=store.manifest["totals"]["errors"],
        lengths=store.lengths,
        config=store.config,
        settings=store.manifest["settings"],
        units=len(store.manifest["shards"]),
        units_done=len(store.manifest["shards"]),
        codes=store.has_codes,
        quantization_error=store.manifest["totals"].get("quantization_error"),
    )


def _summarize_unfinished(directory: Path, settings: dict[str, Any]) -> StoreSummary:
    try:
        store = StoreWriter(directory, StoreSettings(**settings), environment={})
        config = DOVEConfig.from_dict(settings["config"])
    except (TypeError, ValueError) as error:
        raise StoreError(f"{directory} has a damaged manifest: {error}") from error
    rows = [np.array(column, np.int32) for _, column in store.done_column("length")]
    lengths = np.concatenate(rows) if rows else np.empty(0, np.int32)
    if len(lengths) != store.records:
        raise StoreError(f"{directory} has records of {len(lengths)} images, its units say {store.records}")
    return StoreSummary(
        images=store.records,
        tokens=store.tokens,
        errors=store.error_count,
        lengths=lengths,
        config=config,
        settings=settings,
        units=store.settings.units,
        units_done=store.units_done,
        complete=False,
        codes=store.settings.codes,
        quantization_error=store.quantization_error,
    )


def length_histogram(lengths: np.ndarray, most: int, bins: int = 16) -> list[tuple[int, int, int]]:
    """Count lengths from 1 to `most` in at most `bins` ranges of one width: (first, last, images) each."""
    width = -(-most // bins)
    counts = Counter(((lengths.astype(np.int64) - 1) // width).tolist())
    return [
        (index * width + 1, min((index + 1) * width, most), counts.get(index, 0)) for index in range(-(-most // width))
    ]


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint's configuration, its weights by part, and the dtypes that they are kept in."""

    config: DOVEConfig
    parameters: dict[str, int]
    dtypes: tuple[str, ...]


def is_checkpoint(directory: Path) -> bool:
    """Tell whether a directory looks like a checkpoint."""
    return (directory / CONFIG_NAME).is_file()


def is_store(directory: Path) -> bool:
    """Tell whether a directory looks like a token store."""
    return (directory / MANIFEST_NAME).is_file()


def summarize_checkpoint(directory: str | os.PathLike[str]) -> CheckpointSummary:
    """Read a checkpoint's configuration and the headers of its weights, not the weights.

    Raises `FileNotFoundError` for no such directory, `CheckpointError` for one that cannot be read.
    """
    config = read_config(directory)
    parameters: Counter[str] = Counter()
    dtypes: set[str] = set()
    for file_path in weight_files(directory):
        try:
            with safe_open(file_path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_slice(name)
                    parameters[name.split(".")[0]] += int(np.prod(tensor.get_shape(), dtype=np.int64))
                    dtypes.add(tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file_path} is truncated or not a safetensors file: {error}") from error
    return CheckpointSummary(config, dict(sorted(parameters.items())), tuple(sorted(dtypes)))


def describe_default_backend() -> str:
    """Say which backend calls run on that name none, and where this comes from."""
    name, from_environment = registry.default_backend()
    if not from_environment:
        return f"auto ({registry.ENVIRONMENT} is not set)"
    origin = f"from {registry.ENVIRONMENT}"
    valid = ("auto", *registry.BACKENDS)
    if name not in valid:
        return f"{name} ({origin}), which is unknown: every op will refuse it; valid: {', '.join(valid)}"
    lacking = [op for op, backends in registry.available_backends().items() if name not in ("auto", *backends)]
    if lacking:
        return f"{name} ({origin}), which cannot run {', '.join(lacking)} here"
    return f"{name} ({origin})"
