"""Drawings for HTML pages: small SVG pictures without a library, in the colours of `dove_fast.html.STYLE`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["BOTTOM", "HEIGHT", "LEFT", "TOP", "WIDTH", "Axis", "Chart", "begin_drawing", "histogram", "tick_values"]

# The drawings' own units, of which the text is 12 high.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 72, 24, 16


def begin_drawing(label: str, most: str, unit: str, width: int = WIDTH) -> Iterator[str]:
    """Yield the start of a drawing whose vertical axis goes from 0 to `most` `unit`; it ends with `</svg>`.

    `label` says what it shows to those who cannot see it; all three are plain text.
    """
    label, most, unit = escape(label), escape(most), escape(unit)
    yield f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">'
    for y in (TOP, HEIGHT - BOTTOM):
        yield f'<line class="axis" x1="{LEFT}" y1="{y}" x2="{width}" y2="{y}"/>'
    yield f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{most}</text>'
    yield f'<text x="{LEFT - 6}" y="{TOP + 20}" text-anchor="end">{unit}</text>'
    yield f'<text x="{LEFT - 6}" y="{HEIGHT - BOTTOM}" text-anchor="end">0</text>'


def histogram(ranges: Sequence[tuple[int, int, int]], width: int = WIDTH) -> Iterator[str]:
    """Draw lengths by their numbers of images: (first, last, images) a bar, as `length_histogram` counts them."""
    tallest = max(count for _, _, count in ranges) or 1
    step = (width - LEFT) / len(ranges)
    yield from begin_drawing("Images by number of tokens", f"{tallest:,}", "images", width)
    for index, (first, last, count) in enumerate(ranges):
        high = (HEIGHT - BOTTOM - TOP) * count / tallest
        x = LEFT + step * index
        yield (
            f'<rect x="{x + 1:.2f}" y="{HEIGHT - BOTTOM - high:.2f}" width="{step - 2:.2f}" height="{high:.2f}">'
            f"<title>length {_range(first, last)}: {count:,}</title></rect>"
        )
        yield f'<text x="{x + step / 2:.2f}" y="{HEIGHT - 8}" text-anchor="middle">{first}</text>'
    yield "</svg>"
    lengths = ranges[0][1] - ranges[0][0] + 1
    yield f'<p class="faint">Below each bar stands the shortest length that it counts, of {lengths}.</p>'


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along a side of a chart, with marks at `ticks`; `log`: by their logarithms.

    Raises `ValueError` where there is nothing between the ends, or no logarithm.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[float] = ()
    log: bool = False

    def __post_init__(self) -> None:
        """Check the ends."""
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"an axis must go up{', from above 0' if self.log else ''}, got {self.low} to {self.high}")

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, log: bool = False) -> Axis:
        """Return an axis with room for finite values, at least one, and ticks at round numbers."""
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.25, high * 1.25
            return cls(label, low, high, _log_ticks(low, high), log=True)
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
        return cls(label, low, high, tick_values(low, high))

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at `low`, 1 at `high`; one beyond an end lies at it."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def tick_values(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most` steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    # Not step by step: 0.1 three times is not 0.3.
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten from `low` to `high`; of fewer than two, also their doubles and fives, then more."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [factor * power for power in powers for factor in factors if low <= factor * power <= high]
        if len(ticks) >= 2:
            return ticks
    return tick_values(low, high)


class Chart:
    """A drawing with two axes, `width` x `height` units large: its methods yield lines of SVG, `begin` first.

    `label` says what it shows to those who cannot see it, plain text like all others.
    """

    def __init__(self, label: str, x: Axis, y: Axis, *, width: int = 440, height: int = 240) -> None:
        self._label, self.x, self.y = label, x, y
        self._width, self._height = width, height
        self._left, self._right, self._top, self._bottom = 44, width - 10, 22, height - 36

    def begin(self) -> Iterator[str]:
        """Yield the start: the axes, their ticks and labels."""
        left, right, bottom = self._left, self._right, self._bottom
        yield f'<svg viewBox="0 0 {self._width} {self._height}" role="img" aria-label="{escape(self._label)}">'
        for tick in self.y.ticks:
            y = self._at(self.x.low, tick)[1]
            yield f'<line class="axis" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
            yield f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        yield f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
        for tick in self.x.ticks:
            x = self._at(tick, self.y.low)[0]
            yield f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
        yield f'<text x="2" y="12">{escape(self.y.label)}</text>'
        yield f'<text x="{right}" y="{bottom + 32}" text-anchor="end">{escape(self.x.label)}</text>'

    def line(self, points: Sequence[tuple[float, float]], kind: str = "line") -> Iterator[str]:
        """Join points by a line; `kind` is its class in CSS."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self._at(*point) for point in points))
        yield f'<polyline class="{escape(kind)}" points="{places}"/>'

    def level(self, y: float, name: str = "") -> Iterator[str]:
        """Draw a dashed line at one height, with a name above its end."""
        yield from self.line([(self.x.low, y), (self.x.high, y)], "level")
        if not name:
            return
        place = self._at(self.x.high, y)[1]
        yield f'<text class="note" x="{self._right}" y="{place - 4:.1f}" text-anchor="end">{escape(name)}</text>'

    def dot(self, x: float, y: float, title: str | None = None, kind: str = "dot", radius: float = 3) -> Iterator[str]:
        """Draw a dot; `title` is what a pointer on it shows."""
        at_x, at_y = self._at(x, y)
        inner = "" if title is None else f"<title>{escape(title)}</title>"
        yield f'<circle class="{escape(kind)}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="{radius:g}">{inner}</circle>'

    def end(self) -> Iterator[str]:
        """Yield the end."""
        yield "</svg>"

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return (
            self._left + (self._right - self._left) * self.x.share(x),
            self._bottom - (self._bottom - self._top) * self.y.share(y),
        )
