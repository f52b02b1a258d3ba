"""Checking a store byte by byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dove_fast.errors import StoreError
from dove_fast.store.layout import (
    ERRORS_NAME,
    MANIFEST_NAME,
    hash_file,
    read_manifest,
    records_path,
    settings_id,
    tokens_path,
)
from dove_fast.store.records import InputError, read_errors, read_unit

__all__ = ["Damage", "verify"]

# Format 1 kept no checksums.
FIRST_WITH_CHECKSUMS = 2
NOT_THE_UNITS = "is not what the units say"
# What is compared of each shard that a manifest lists.
COMPARED = ("tokens_sha256", "records_sha256", "records", "tokens")


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written: in `unit`, or, where that is None, beside the units."""

    unit: int | None
    file: str
    reason: str


def verify(
    directory: str | os.PathLike[str], *, on_unit: Callable[[int, int], None] | None = None
) -> tuple[int, list[Damage]]:
    """Read every byte of a complete store, and return how many units it has and what is damaged, in order.

    Every file is compared with the checksum that was taken when it was written; errors.jsonl and the manifest's counts
    with what the units say.
    `on_unit` is called with the units that are checked and all units. Raises `FileNotFoundError` and `StoreError` as
    `TokenStore` does, and `StoreError` for a store that is not complete, or of format 1, which has no checksums.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    if manifest["format_version"] < FIRST_WITH_CHECKSUMS:
        raise StoreError(f"{root} was written in format {manifest['format_version']}, which has no checksums")
    if not manifest["complete"]:
        raise StoreError(f"{root} is not complete; run the command that writes it again to finish it")
    store = settings_id(manifest["settings"])
    shards = manifest["shards"]
    if len(shards) != manifest["settings"]["units"]:
        raise StoreError(
            f"{root} has a damaged manifest: {len(shards)} shards of {manifest['settings']['units']} units"
        )
    for number, entry in enumerate(shards):
        lacking = [name for name in COMPARED if not isinstance(entry, dict) or name not in entry]
        if lacking:
            raise StoreError(f"{root} has a damaged manifest: shard {number} has no {', no '.join(lacking)}")
    found: list[Damage] = []
    errors: list[InputError] = []
    counts: list[tuple[int, int]] = []
    for number, entry in enumerate(shards):
        damage = [
            item
            for item in (
                _check(number, tokens_path(root, number), entry["tokens_sha256"]),
                _check(number, records_path(root, number), entry["records_sha256"]),
            )
            if item is not None
        ]
        unit = None if damage else read_unit(records_path(root, number))
        if unit is not None and (unit.store, unit.shard, unit.tokens_sha256) != (
            store,
            number,
            entry["tokens_sha256"],
        ):
            damage.append(Damage(number, records_path(root, number).name, "belongs to another store or another place"))
        found += damage
        if unit is not None:
            errors += unit.errors
            counts.append((unit.records, unit.tokens))
        if on_unit is not None:
            on_unit(number + 1, len(shards))
    # Where a unit is damaged its errors are not known.
    if not found:
        if _listed_errors(root) != errors:
            found.append(Damage(None, ERRORS_NAME, NOT_THE_UNITS))
        records, tokens = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        totals = manifest["totals"]
        if counts != [(entry["records"], entry["tokens"]) for entry in shards] or (
            totals["records"],
            totals["tokens"],
            totals["errors"],
        ) != (records, tokens, len(errors)):
            found.append(Damage(None, MANIFEST_NAME, NOT_THE_UNITS))
    return len(shards), found


def _check(unit: int, path: Path, expected: str) -> Damage | None:
    try:
        if hash_file(path) == expected:
            return None
        reason = "its bytes are not those that were written"
    except FileNotFoundError:
        reason = "is missing"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    return Damage(unit, f"{path.parent.name}/{path.name}", reason)


def _listed_errors(root: Path) -> list[InputError] | None:
    try:
        return read_errors(root)
    except StoreError:
        return None
