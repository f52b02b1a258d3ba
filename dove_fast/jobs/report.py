"""The report of a tokenization job: one HTML file that needs nothing else."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dove_fast.drawing import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, begin_drawing, histogram
from dove_fast.html import begin_page, end_page, png, table, write_page
from dove_fast.jobs.info import length_histogram
from dove_fast.store.layout import flat_settings
from dove_fast.store.reader import TokenStore
from dove_fast.store.records import InputError, read_errors
from dove_fast.words import counted

__all__ = ["Curve", "Extreme", "Extremes", "ReportData", "RunFigures", "store_report", "write_report"]

# Errors that are named; of the others there is a number.
MAX_ERRORS = 100
WAITING = "waiting for images"
NO_PICTURES = "The longest and the shortest images are not shown: the process that wrote this page did not see them."


@dataclass(frozen=True, eq=False)
class Extreme:
    """One of the images with the most, or the fewest, tokens; `pixels`: uint8 (3, S, S) on the CPU."""

    key: str
    length: int
    pixels: Tensor


class Extremes:
    """Keeps the `count` longest and the `count` shortest images of those it is given; of equal ones the earlier."""

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self._count = count
        self._seen = 0
        # Heaps with the next one to go in front. The second number is unique, so images are never compared.
        self._long: list[tuple[int, int, Extreme]] = []
        self._short: list[tuple[int, int, Extreme]] = []

    def add(self, key: str, length: int, pixels: Tensor) -> None:
        """Look at one image, `pixels` uint8 (3, S, S); they are copied if it is kept.

        Raises `TypeError` or `ValueError` for other pixels.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8, got {pixels.dtype}")
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(f"pixels must be (3, S, S), got {tuple(pixels.shape)}")
        self._seen += 1
        places = [
            (heap, number)
            for heap, number in ((self._long, length), (self._short, -length))
            if len(heap) < self._count or (number, -self._seen) > heap[0][:2]
        ]
        if not places:
            return
        kept = Extreme(key, length, pixels.to("cpu", copy=True))
        for heap, number in places:
            entry = (number, -self._seen, kept)
            if len(heap) < self._count:
                heapq.heappush(heap, entry)
            else:
                heapq.heapreplace(heap, entry)

    @property
    def longest(self) -> list[Extreme]:
        """The longest images, the longest first."""
        return [entry[2] for entry in sorted(self._long, reverse=True)]

    @property
    def shortest(self) -> list[Extreme]:
        """The shortest images, the shortest first."""
        return [entry[2] for entry in sorted(self._short, reverse=True)]


class Curve:
    """How many images a run had done when: a point every `spacing` seconds, at most `most` of them.

    Where there would be more, every second one goes and the spacing doubles: a run may take weeks.
    """

    def __init__(self, spacing: float = 1.0, most: int = 2000) -> None:
        self._spacing, self._most = spacing, most
        self._points: list[tuple[float, int]] = [(0.0, 0)]

    def add(self, elapsed: float, images: int) -> None:
        """Remember `images` of the run at `elapsed` seconds, if the point before is far enough."""
        if elapsed - self._points[-1][0] < self._spacing:
            return
        self._points.append((elapsed, images))
        if len(self._points) > self._most:
            self._points = self._points[::2]
            self._spacing *= 2

    def rates(self) -> list[tuple[float, float]]:
        """Return elapsed seconds and the images/s since the point before."""
        return [(end, (after - before) / (end - start)) for (start, before), (end, after) in pairwise(self._points)]


@dataclass(frozen=True, eq=False)
class RunFigures:
    """What a report shows of the run that finished the store.

    It `computed` so many images in `seconds`. `shares`: of these seconds, in which each stage was busy. `throughput`:
    elapsed seconds and images/s, in order of time. `longest` and `shortest`: none where nobody saw the images.
    """

    computed: int
    seconds: float
    device: str
    shares: Mapping[str, float] = field(default_factory=dict)
    throughput: Sequence[tuple[float, float]] = ()
    longest: Sequence[Extreme] = ()
    shortest: Sequence[Extreme] = ()


@dataclass(frozen=True, eq=False)
class ReportData:
    """What a report shows.

    `lengths`: integers (images,), those of all images; `num_tokens`: the most an image can have. `settings` may hold
    mappings; those that are None are left out. `run`: None where the run that finished the store left no figures.
    `quantization_error`: relative, of tokens kept in int8; None where they are kept as they are.
    """

    title: str
    lengths: np.ndarray
    num_tokens: int
    settings: Mapping[str, object] = field(default_factory=dict)
    errors: Sequence[InputError] = ()
    run: RunFigures | None = None
    quantization_error: float | None = None


def store_report(directory: Path, run: RunFigures | None) -> ReportData:
    """Return what a report shows of a complete store. Raises what `TokenStore` raises."""
    store = TokenStore(directory)
    return ReportData(
        title=f"Token store {directory.name}",
        lengths=store.lengths,
        num_tokens=store.config.num_tokens,
        settings={name: value for name, value in store.manifest["settings"].items() if name != "config"},
        errors=read_errors(directory),
        run=run,
        quantization_error=store.manifest["totals"].get("quantization_error"),
    )


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write a report as one HTML file, by temporary file and rename; it loads nothing and runs nothing.

    Raises `OSError`.
    """
    write_page(Path(path), _page(data))


def _page(data: ReportData) -> Iterator[str]:
    yield from begin_page(data.title)
    yield from table("Summary", _summary(data))
    if len(data.lengths):
        yield "<h2>Lengths</h2>"
        yield from histogram(length_histogram(data.lengths, data.num_tokens))
    if data.run is not None:
        yield from table("This run", _run(data.run))
        if len(data.run.throughput) > 1:
            yield "<h2>Throughput of this run</h2>"
            yield from _line(data.run.throughput)
        yield from _images("Most tokens of this run", data.run.longest)
        yield from _images("Fewest tokens of this run", data.run.shortest)
    if len(data.lengths) and (data.run is None or not data.run.longest):
        yield f'<p class="faint">{NO_PICTURES}</p>'
    yield from _errors(data.errors)
    settings = [(name, str(value)) for name, value in flat_settings(data.settings) if value is not None]
    yield from table("Settings", settings)
    yield from end_page()


def _summary(data: ReportData) -> Iterator[tuple[str, str]]:
    images, tokens = len(data.lengths), int(data.lengths.sum(dtype=np.int64))
    yield "images", f"{images:,}"
    yield "tokens", f"{tokens:,}"
    if images:
        yield "mean length", f"{tokens / images:.2f}"
    yield "errors", f"{len(data.errors):,}"
    if data.quantization_error is not None:
        yield "int8 error", f"{data.quantization_error:.2e}"


def _run(run: RunFigures) -> Iterator[tuple[str, str]]:
    yield "computed", f"{run.computed:,}"
    yield "seconds", f"{run.seconds:.1f}"
    if run.computed and run.seconds > 0:
        yield "images/s", f"{run.computed / run.seconds:.1f}"
    for stage, share in run.shares.items():
        yield WAITING if stage == "wait" else f"{stage} busy", f"{share:.1%}"
    yield "device", run.device


def _line(points: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Draw images/s over time."""
    longest = max(elapsed for elapsed, _ in points) or 1.0
    fastest = max(rate for _, rate in points) or 1.0
    wide, high = WIDTH - LEFT - 1, HEIGHT - BOTTOM - TOP
    yield from begin_drawing("Images per second over time", f"{fastest:,.1f}", "images/s")
    places = " ".join(
        f"{LEFT + wide * elapsed / longest:.2f},{HEIGHT - BOTTOM - high * rate / fastest:.2f}"
        for elapsed, rate in points
    )
    yield f'<polyline points="{places}"/>'
    yield f'<text x="{LEFT}" y="{HEIGHT - 8}">0 s</text>'
    yield f'<text x="{WIDTH}" y="{HEIGHT - 8}" text-anchor="end">{longest:,.0f} s</text>\n</svg>'


def _images(title: str, extremes: Sequence[Extreme]) -> Iterator[str]:
    if not extremes:
        return
    yield f'<h2>{title}</h2>\n<div class="images">'
    for extreme in extremes:
        key = escape(extreme.key)
        tokens = counted(extreme.length, "token")
        yield (
            f'<figure><img src="{png(extreme.pixels)}" alt="{key}"><figcaption>{key}<br>{tokens}</figcaption></figure>'
        )
    yield "</div>"


def _errors(errors: Sequence[InputError]) -> Iterator[str]:
    yield from table("Errors", [(error.key, error.reason) for error in errors[:MAX_ERRORS]])
    more = len(errors) - MAX_ERRORS
    if more > 0:
        yield f'<p class="faint">and {more:,} more, see errors.jsonl</p>'
