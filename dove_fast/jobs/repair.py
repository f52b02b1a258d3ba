"""Doing the damaged units of a store again, with the settings in its manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dove_fast.errors import StoreError
from dove_fast.jobs.loading import LoadedModel
from dove_fast.jobs.progress import OnProgress
from dove_fast.jobs.queries import Ids
from dove_fast.jobs.tokenize import TokenizeOptions, TokenizeReport, located, tokenize
from dove_fast.store.layout import read_manifest

__all__ = ["options_of", "repair", "source_of"]


def options_of(manifest: Mapping[str, Any]) -> TokenizeOptions:
    """Return the options that a store was made with, by its manifest; those of its last run where they may differ."""
    settings, ran = manifest["settings"], manifest["environments"][-1]
    source = settings["source"]
    return TokenizeOptions(
        length=settings["length"],
        max_length=settings["max_length"],
        eos_threshold=settings["eos_threshold"] if settings["length"] is None else None,
        batch_size=ran["batch_size"],
        shard_size=settings["shard_size"] or TokenizeOptions.shard_size,
        prefix_keys=source.get("prefix_keys", False),
        image_column=source.get("image_column"),
        key_column=source.get("key_column"),
        reduced="least_side" in settings["transform"],
        token_dtype=settings["dtype"],
        codes=settings["codes"],
    )


def source_of(manifest: Mapping[str, Any]) -> str:
    """Return where a store's images came from in its last run: as it was given, where that is the same place from here.

    Records have the paths as they were given.
    """
    environment = manifest["environments"][-1]
    place, given = str(environment["source"]), str(environment.get("source_as_given", ""))
    return given if given and located(given) == place else place


def repair(
    directory: str | os.PathLike[str],
    units: list[int],
    loaded: LoadedModel,
    *,
    source: str | os.PathLike[str] | None = None,
    queries: Mapping[str, Ids | str] | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> TokenizeReport:
    """Do `units` of a complete store again; `source` None reads from where its last run did.

    Everything is checked before: the same inputs, model and settings. On the device, with the versions and the number
    of threads of the first time the bytes are the same again, too. What the units were is kept if they had more images.
    Raises what `tokenize` raises.
    """
    manifest = read_manifest(Path(directory))
    options = replace(options_of(manifest), workers=workers)
    origin = source_of(manifest) if source is None else source
    try:
        return tokenize(origin, directory, loaded, options, queries=queries, again=units, on_progress=on_progress)
    except FileNotFoundError as error:
        if source is not None:
            raise
        raise StoreError(
            f"{directory} was made from {origin}: {error}; say where its images are now (--input)"
        ) from error
