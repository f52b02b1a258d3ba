"""Exceptions of dove_fast: wrong arguments raise `TypeError` or `ValueError`, the rest derives from `DoveError`."""

from __future__ import annotations

__all__ = ["BackendError", "CheckpointError", "DoveError", "StoreError", "first_line"]


class DoveError(Exception):
    """Base class of the errors that are dove_fast's own."""


class BackendError(DoveError):
    """An op was asked to run on a backend that cannot run it here; the message names the reason and the way out."""


class CheckpointError(DoveError):
    """A checkpoint directory is incomplete, damaged, or not one that dove_fast can load."""


class StoreError(DoveError):
    """A token store is incomplete, damaged, or was made with other settings."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
