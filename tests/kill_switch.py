"""A process that dies at a chosen disk operation, without dying: from there on nothing reaches the disk any more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of `Exception` sees it."""


class KillSwitch:
    """Counts syncs, renames, unlinks and mkdirs; the one numbered `at` dies, before or after it took effect."""

    def __init__(self, at: int | None, after: bool = False) -> None:
        self.at, self.after, self.count = at, after, 0

    def arm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("fsync", "replace", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, operation):
        def call(*arguments, **options):
            self.count += 1
            if self.at is None or self.count < self.at:
                return operation(*arguments, **options)
            # What the program tries on its way out, such as removing temporary files, is not done either.
            if self.count == self.at and self.after:
                operation(*arguments, **options)
            raise KilledError

        return call


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory, hidden ones too."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
