"""The files of an evaluation, in a directory of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dove_fast.atomic import make_directory, replacing
from dove_fast.evaluation.plots import draw_plots
from dove_fast.evaluation.results import EVALUATION_NAME, Evaluation, write_evaluation
from dove_fast.evaluation.table import markdown
from dove_fast.failures import stopping
from dove_fast.store.layout import ERRORS_NAME
from dove_fast.store.records import InputError

__all__ = ["TABLE_NAME", "check_output", "write_outputs"]

TABLE_NAME = "evaluation.md"


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse a directory that holds an evaluation, unless `overwrite`, and one that is a file, with `ValueError`."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} exists and is not a directory; choose another output")
    if not overwrite and (directory / EVALUATION_NAME).exists():
        raise ValueError(f"{directory} holds an evaluation already; choose another output, or --overwrite it")


def write_outputs(
    directory: Path, evaluation: Evaluation, errors: Sequence[InputError] = (), *, plots: bool = True
) -> None:
    """Write the plots, `TABLE_NAME`, `ERRORS_NAME` where there are any, and last `EVALUATION_NAME`.

    Each by temporary file and rename. Raises `JobError` where the disk fails, `ImportError` for plots without
    matplotlib.
    """
    with stopping("choose another output, the evaluation has to be run again"):
        make_directory(directory)
        # While its other files change, the directory holds no evaluation.
        (directory / EVALUATION_NAME).unlink(missing_ok=True)
        if plots:
            draw_plots(directory, evaluation)
        with replacing(directory / TABLE_NAME) as file:
            file.write(markdown(evaluation).encode("utf-8", "backslashreplace"))
        if errors:
            with replacing(directory / ERRORS_NAME) as file:
                for error in errors:
                    file.write(json.dumps(asdict(error), ensure_ascii=False).encode() + b"\n")
        else:
            (directory / ERRORS_NAME).unlink(missing_ok=True)
        write_evaluation(directory / EVALUATION_NAME, evaluation)
