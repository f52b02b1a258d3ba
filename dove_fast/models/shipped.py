"""The trained checkpoints that come with the package, found by name."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SHIPPED", "is_shipped", "shipped_directory"]

# By name. Half precision on the disk, to keep the package small; made to be loaded in float32.
SHIPPED = {"tiny": Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"}


def shipped_directory(name: str | os.PathLike[str]) -> Path | None:
    """Return the directory of the shipped checkpoint of this name; None for any other, and where a path has the name.

    What is on the disk goes first, so that nobody's own `tiny/` is passed over in silence. A `Path` is never a name.
    """
    return SHIPPED.get(name) if isinstance(name, str) and not Path(name).exists() else None


def is_shipped(directory: str | os.PathLike[str]) -> bool:
    """Tell whether a directory is that of a shipped checkpoint."""
    return Path(directory).resolve() in SHIPPED.values()
