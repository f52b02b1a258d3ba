"""Files that appear whole or not at all, also after a power failure."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["is_temporary", "make_directory", "remove_temporaries", "replacing", "sync_directory"]

_TEMPORARY = re.compile(r"\.dove-[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; at the end of the block it is synced and renamed to `path`.

    If the block raises, `path` is left as it was and the temporary file is removed. Raises `OSError`.
    `durable=False` leaves it to the system when the bytes reach the disk, for files that are easily made again.
    """
    # Not named after `path`, whose name may be as long as a name can be.
    temporary = path.with_name(f".dove-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the renames in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, durably; one that exists is left as it is."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def is_temporary(name: str) -> bool:
    """Tell whether a file name is one that `replacing` makes."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(directory: Path) -> None:
    """Remove what a killed run of `replacing` left in a directory; no such directory is nothing to do."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            if is_temporary(name):
                os.unlink(directory / name)
