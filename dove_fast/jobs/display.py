"""What people see in the terminal: the progress bar of a job, and the tables of `info`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dove_fast.jobs.info import CheckpointSummary, StoreSummary, describe_default_backend, length_histogram
from dove_fast.jobs.progress import OnProgress, Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dove_fast.training import TrainProgress

    OnTrainProgress = Callable[[TrainProgress], None]

__all__ = ["progress_bar", "show_checkpoint", "show_installation", "show_store", "training_bar"]

BAR_WIDTH = 40


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[OnProgress | None]:
    """Show a bar with images/s and mean tokens on stderr while the block runs; None where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]:.1f} images/s"),
        progress.TextColumn("{task.fields[mean]:.1f} tokens"),
        progress.TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None, rate=0.0, mean=0.0)

        def show(state: Progress) -> None:
            rate = state.images / max(time.perf_counter() - start, 1e-9)
            mean = state.tokens / max(state.images, 1)
            bar.update(task, completed=state.done, total=state.total, rate=rate, mean=mean)

        yield show


@contextlib.contextmanager
def training_bar(*, enabled: bool) -> Iterator[OnTrainProgress | None]:
    """Show a bar with a run's error, mean length and images/s on stderr; None where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield None
        return
    from rich import progress

    columns = (
        progress.TextColumn("train"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("mse {task.fields[mse]:.5f}"),
        progress.TextColumn("{task.fields[length]:.1f} tokens"),
        progress.TextColumn("{task.fields[rate]:.1f} images/s"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("train", total=None, mse=0.0, length=0.0, rate=0.0)

        def show(state: TrainProgress) -> None:
            bar.update(
                task,
                completed=state.step,
                total=state.steps,
                mse=state.mse,
                length=state.length,
                rate=state.images_per_second,
            )

        yield show


def show_store(summary: StoreSummary, name: str, console: Console) -> None:
    """Print a store's table and the histogram of its lengths."""
    settings = summary.settings
    table = _table(f"Token store {name}")
    _row(table, "images", f"{summary.images:,}")
    _row(table, "set aside", f"{summary.errors:,}")
    _row(table, "tokens", f"{summary.tokens:,}")
    if summary.images:
        _row(table, "mean length", f"{summary.mean:.2f}")
        _row(table, "shortest, longest", f"{summary.lengths.min()}, {summary.lengths.max()}")
        for percent, value in summary.percentiles().items():
            _row(table, f"percentile {percent}", str(value))
    _row(table, "most tokens an image", str(summary.config.num_tokens))
    for setting in ("length", "max_length", "eos_threshold"):
        if settings[setting] is not None:
            _row(table, setting, str(settings[setting]))
    _row(table, "values", f"{settings['dtype']}, width {settings['width']}")
    _row(table, "transform", f"{settings['transform']['name']}, {settings['transform']['size']} pixels")
    _row(table, "checkpoint", settings["fingerprint"])
    console.print(table)
    if summary.images:
        console.print("tokens   images")
        for line in _bars(length_histogram(summary.lengths, summary.config.num_tokens), console):
            console.print(line, markup=False, highlight=False, no_wrap=True)


def _bars(histogram: list[tuple[int, int, int]], console: Console) -> Iterator[str]:
    tallest = max(count for _, _, count in histogram)
    # Eighths of a block where the output can hold them, whole signs elsewhere.
    full, parts = ("#", ("",) * 8) if console.options.ascii_only else ("█", ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉"))
    for first, last, count in histogram:
        # At least one eighth for a range that is not empty.
        eighths = -(-count * BAR_WIDTH * 8 // tallest)
        bar = full * (eighths // 8) + parts[eighths % 8]
        yield f"{first:>4}-{last:<4}{count:>7,} {bar}"


def show_checkpoint(summary: CheckpointSummary, name: str, console: Console) -> None:
    """Print a checkpoint's configuration, and its weights by part."""
    table = _table(f"Checkpoint {name}")
    for setting, value in _flat(summary.config.to_dict()):
        _row(table, setting, str(value))
    console.print(table)
    weights = _table(f"Parameters, {', '.join(summary.dtypes)}")
    for part, count in summary.parameters.items():
        _row(weights, part, f"{count:,}")
    _row(weights, "all", f"{sum(summary.parameters.values()):,}")
    console.print(weights)


def show_installation(console: Console) -> None:
    """Print what the native module was built with, the default backend, and the backends of each op that work here."""
    from dove_fast import available_backends, build_info

    table = _table("dove_fast")
    for name, value in build_info().items():
        _row(table, name, ", ".join(value) if isinstance(value, list) else str(value))
    _row(table, "default backend", describe_default_backend())
    for op, backends in available_backends().items():
        _row(table, f"{op} runs on", ", ".join(backends))
    console.print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _table(title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _row(table: Table, name: str, value: str) -> None:
    from rich.text import Text

    # Text, because a path may hold what rich takes for markup.
    table.add_row(Text(name), Text(value))
