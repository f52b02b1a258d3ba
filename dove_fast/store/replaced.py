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
    """Move a unit's files out of the way, the records first: without them it is not done.

    Of two that were set back one after the other, the one with more images stays.
    """
    kept = directory / REPLACED_NAME
    before, now = (read_unit(records_path(place, unit)) for place in (kept, directory))
    worse = before is not None and (now is None or now.records < before.records)
    for path_of in (records_path, tokens_path):
        path, target = path_of(directory, unit), path_of(kept, unit)
        make_directory(target.parent)
        if worse:
            path.unlink(missing_ok=True)
            continue
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, target)


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
            # Another job may do the same, and a folder that stays harms nobody.
            with contextlib.suppress(OSError):
                folder.rmdir()
    return fewer
