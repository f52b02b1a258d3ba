"""The files of an evaluation, in a directory of their own."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dove_fast.atomic import is_temporary, make_directory, replacing
from dove_fast.evaluation.plots import PLOTS, draw_plots
from dove_fast.evaluation.results import EVALUATION_NAME, Evaluation, write_evaluation
from dove_fast.evaluation.table import markdown
from dove_fast.failures import stopping
from dove_fast.jobs.info import is_checkpoint, is_store
from dove_fast.store.layout import ERRORS_NAME
from dove_fast.store.records import InputError

__all__ = ["TABLE_NAME", "check_output", "made_output", "write_errors", "write_outputs"]

TABLE_NAME = "evaluation.md"
# What an evaluation that ended early may have left.
OWN = {TABLE_NAME, ERRORS_NAME, *PLOTS}


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse a place that is not an evaluation's, with `ValueError`.

    That is a file, a token store, a checkpoint, a directory with other things in it, and, unless `overwrite`, one that
    holds an evaluation.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} exists and is not a directory; choose another output")
    if not directory.is_dir():
        return
    for what, looks_so in (("token store", is_store), ("checkpoint", is_checkpoint)):
        if looks_so(directory):
            raise ValueError(f"{directory} is a {what}; choose another output")
    if (directory / EVALUATION_NAME).exists():
        if not overwrite:
            raise ValueError(f"{directory} holds an evaluation already; choose another output, or --overwrite it")
        return
    others = sorted(name for name in os.listdir(directory) if name not in OWN and not is_temporary(name))
    if others:
        raise ValueError(f"{directory} holds no evaluation, but {others[0]!r}; choose another output, or empty it")


@contextlib.contextmanager
def made_output(directory: Path) -> Iterator[None]:
    """Make a directory, and a file in it for a moment, before the work in the block; empty, it goes where that fails.

    Raises `OSError` where it cannot be made or written to.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    make_directory(directory)
    with tempfile.TemporaryFile(dir=directory):
        pass
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def write_errors(directory: Path, errors: Sequence[InputError]) -> None:
    """Write `ERRORS_NAME`, by temporary file and rename; no errors remove it. Raises `OSError`."""
    if not errors:
        (directory / ERRORS_NAME).unlink(missing_ok=True)
        return
    with replacing(directory / ERRORS_NAME) as file:
        for error in errors:
            file.write(json.dumps(asdict(error), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def write_outputs(
    directory: Path, evaluation: Evaluation, errors: Sequence[InputError] = (), *, plots: bool = True
) -> None:
    """Write the plots, `TABLE_NAME`, `ERRORS_NAME` where there are any, and last `EVALUATION_NAME`.

    Each by temporary file and rename; what an earlier evaluation left is replaced or removed. Raises `JobError` where
    the disk fails, `ImportError` for plots without matplotlib.
    """
    with stopping("choose another output, the evaluation has to be run again"):
        make_directory(directory)
        # While its other files change, the directory holds no evaluation.
        (directory / EVALUATION_NAME).unlink(missing_ok=True)
        if plots:
            draw_plots(directory, evaluation)
        else:
            for name in PLOTS:
                (directory / name).unlink(missing_ok=True)
        with replacing(directory / TABLE_NAME) as file:
            file.write(markdown(evaluation, PLOTS if plots else ()).encode("utf-8", "backslashreplace"))
        write_errors(directory, errors)
        write_evaluation(directory / EVALUATION_NAME, evaluation)
