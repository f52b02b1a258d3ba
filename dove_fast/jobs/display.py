"""What people see in the terminal: the progress bar of a job, and the tables of `info`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dove_fast.jobs.info import CheckpointSummary, StoreSummary, describe_default_backend, length_histogram
from dove_fast.jobs.progress import OnProgress, Progress, TimeLeft, describe_seconds
from dove_fast.store.layout import flat_settings
from dove_fast.words import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dove_fast.training import TrainProgress

    OnTrainProgress = Callable[[TrainProgress], None]

__all__ = [
    "TokenizeSummary",
    "describe_shares",
    "progress_bar",
    "show_checkpoint",
    "show_installation",
    "show_store",
    "show_tokenize_summary",
    "training_bar",
]

BAR_WIDTH = 40


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[OnProgress | None]:
    """Show a job's bar on stderr while the block runs; None where stderr is no terminal.

    Beside it stand what is done, images/s, mean tokens, the time that is left and the shard, below it the stages.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich import progress
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[text]}"),
    )
    bar = progress.Progress(*columns, console=console)
    task = bar.add_task(label, total=None, text="")
    pace = _Pace()
    with Live(bar, console=console, transient=True) as live:

        def show(state: Progress) -> None:
            completed, total = state.extent
            bar.update(task, completed=completed, total=total, text=pace.describe(state))
            if state.stages:
                live.update(Group(bar, Text(describe_shares(state.stages), style="dim", no_wrap=True)))

        yield show


class _Pace:
    """Puts the figures of a state into words, with speeds since this was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._left = TimeLeft()

    def describe(self, state: Progress) -> str:
        now = time.perf_counter()
        left = self._left.after(state, now)
        count = str(state.done) if state.total is None else f"{state.done}/{state.total}"
        rate = state.images / max(now - self._start, 1e-9)
        parts = [count, f"{rate:.1f} images/s", f"{state.tokens / max(state.images, 1):.1f} tokens"]
        if state.extent[1] is not None:
            parts.append("-:--:--" if left is None else describe_seconds(left))
        if state.units > 1:
            parts.append(f"shard {state.units_done}/{state.units}")
        return " ".join(parts)


def describe_shares(shares: Mapping[str, float]) -> str:
    """Put the shares of a job's stages into words: decode 35% encode 50%."""
    return " ".join(f"{stage} {share:.0%}" for stage, share in shares.items())


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
        progress.TextColumn("error {task.fields[error]:.5f}"),
        progress.TextColumn("{task.fields[length]:.1f} tokens"),
        progress.TextColumn("{task.fields[rate]:.1f} images/s"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("train", total=None, error=0.0, length=0.0, rate=0.0)

        def show(state: TrainProgress) -> None:
            bar.update(
                task,
                completed=state.step,
                total=state.steps,
                error=state.error,
                length=state.length,
                rate=state.images_per_second,
            )

        yield show


def show_store(summary: StoreSummary, name: str, console: Console) -> None:
    """Print a store's table and the histogram of its lengths."""
    settings = summary.settings
    table = _table(f"Token store {name}")
    if not summary.complete:
        units = f"{summary.units_done:,} of {counted(summary.units, 'unit')}"
        _row(table, "not complete", f"{units}; its job runs, or was stopped and goes on by the same command")
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
    if summary.quantization_error is not None:
        _row(table, "int8 error", f"{summary.quantization_error:.2e}")
    if summary.codes:
        _row(table, "codes", f"{summary.config.num_features:,} an image")
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


@dataclass(frozen=True)
class TokenizeSummary:
    """What a run of `tokenize` came to: `images`, `set_aside` and `tokens` are what the store holds now.

    `computed`: images of this run, which took `seconds`. `stages`: the share of these that each stage was busy.
    `quantization_error`: relative, of tokens kept in int8; None where they are kept as they are.
    """

    images: int
    set_aside: int
    tokens: int
    computed: int
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    quantization_error: float | None = None


def show_tokenize_summary(summary: TokenizeSummary, name: str, console: Console) -> None:
    """Print what a run of `tokenize` came to."""
    table = _table("Tokenized")
    # Not in the title, which would be folded to the width of the figures.
    _row(table, "store", name)
    _row(table, "images", f"{summary.images:,}")
    if summary.computed != summary.images:
        _row(table, "of this run", f"{summary.computed:,}")
    _row(table, "set aside", f"{summary.set_aside:,}")
    _row(table, "tokens", f"{summary.tokens:,}")
    if summary.images:
        _row(table, "mean length", f"{summary.tokens / summary.images:.2f}")
    _row(table, "seconds", f"{summary.seconds:.1f}")
    if summary.computed and summary.seconds > 0:
        _row(table, "images/s", f"{summary.computed / summary.seconds:.1f}")
    for stage, share in summary.stages.items():
        _row(table, stage, f"{share:.1%}")
    if summary.quantization_error is not None:
        _row(table, "int8 error", f"{summary.quantization_error:.2e}")
    console.print(table)


def show_checkpoint(summary: CheckpointSummary, name: str, console: Console) -> None:
    """Print a checkpoint's configuration, and its weights by part."""
    table = _table(f"Checkpoint {name}")
    for setting, value in flat_settings(summary.config.to_dict()):
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
