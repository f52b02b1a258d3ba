"""Units that are done again: what they were is kept until they have as many images as before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from dove_fast.atomic import make_directory
from dove_fast.store.layout import records_path, tokens_path
from dove_fast.store.records import Unit, read_unit

__all__ = ["REPLACED_NAME", "set_back", "settle"]

REPLACED_NAME = "replaced"


def set_back(directory: Path, unit: int) -> None:
    """Move a unit's files out of the way, the records first: without them it is not done."""
    kept = directory / REPLACED_NAME
    for path_of in (records_path, tokens_path):
        target = path_of(kept, unit)
        make_directory(kept)
        make_directory(target.parent)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path_of(directory, unit), target)


def settle(directory: Path, units: Mapping[int, Unit]) -> list[int]:
    """Remove what was set back, but for units that have fewer images now than they had; returns these."""
    kept = directory / REPLACED_NAME
    if not kept.exists():
        return []
    fewer = []
    for number, unit in sorted(units.items()):
        before = read_unit(records_path(kept, number))
        if before is not None and before.records > unit.records:
            fewer.append(number)
            continue
        for path_of in (records_path, tokens_path):
            path_of(kept, number).unlink(missing_ok=True)
    if not fewer:
        for folder in (kept / "records", kept / "tokens", kept):
            folder.rmdir()
    return fewer
