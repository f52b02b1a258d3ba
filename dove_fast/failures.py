"""Failures that are not the input's: a full disk, too little memory; what a long job says when it has to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dove_fast.errors import BackendError, DoveError

__all__ = ["JobError", "stopping"]


class JobError(DoveError):
    """A job stopped at a failure that was not the input's; what it had finished is intact."""


@contextlib.contextmanager
def stopping(remedy: str) -> Iterator[None]:
    """Turn a failing disk, or too little memory, into `JobError`: one sentence that ends with `remedy`.

    Anything that says "wrong use" in the middle of a job becomes a `RuntimeError`.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise JobError(f"out of memory; a smaller batch needs less; {remedy}") from error
    except OSError as error:
        what = error.strerror or str(error)
        where = f": {error.filename}" if error.filename else ""
        raise JobError(f"{what}{where}; {remedy}") from error
    except (TypeError, ValueError, BackendError) as error:
        # What the user gave was checked before: this is no wrong use, and its trace is worth having.
        raise RuntimeError(f"{type(error).__name__} in the middle of the job: {error}") from error
