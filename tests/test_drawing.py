"""Charts: values are where the axes say, and texts are no markup."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from dove_fast.drawing import Axis, Chart, begin_drawing, tick_values


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.37, 0.53, [0.4, 0.45, 0.5]),
        (-3, 70, [0, 20, 40, 60]),
        (15.24, 25.96, [16, 18, 20, 22, 24]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    found = tick_values(low, high)
    assert found[: len(expected)] == pytest.approx(expected)
    assert all(low <= tick <= high for tick in found) and 2 <= len(found) <= 7


def test_an_axis_has_its_values_inside():
    axis = Axis.around("x", [3.0, 8.0, 5.0])
    assert 0 < axis.share(3) < axis.share(5) < axis.share(8) < 1
    assert axis.share(axis.low) == axis.share(-100) == 0 and axis.share(axis.high) == axis.share(100) == 1
    one = Axis.around("x", [5.0])
    assert 0 < one.share(5) < 1
    zero = Axis.around("x", [0.0])
    assert 0 < zero.share(0) < 1
    logarithmic = Axis.around("x", [0.01, 1, 100], log=True)
    assert logarithmic.ticks == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert logarithmic.share(1) == pytest.approx(0.5)
    # No power of ten, or one, lies within.
    assert Axis.around("x", [220, 900], log=True).ticks == pytest.approx([200, 500, 1000])
    assert Axis.around("x", [15, 60], log=True).ticks == pytest.approx([20, 50])
    assert len(Axis.around("x", [30], log=True).ticks) >= 2
    with pytest.raises(ValueError, match="an axis must go up, got 1 to 1"):
        Axis("x", 1, 1)
    with pytest.raises(ValueError, match="from above 0, got 0 to 1"):
        Axis("x", 0, 1, log=True)


def test_a_drawings_texts_are_no_markup():
    drawn = "".join(begin_drawing("<a>", "<b>", '"c"&'))
    assert all(text in drawn for text in ("&lt;a&gt;", "&lt;b&gt;", "&quot;c&quot;&amp;")) and "<a>" not in drawn


def test_a_chart():
    chart = Chart("a <chart>", Axis("x <x>", 0, 10, [0, 5, 10]), Axis("y", 0, 1, [0, 1]), width=200, height=100)
    drawn = "".join(
        [
            *chart.begin(),
            *chart.line([(0, 0), (5, 0.5), (10, 1)]),
            *chart.level(0.25, "<half>"),
            *chart.dot(5, 0.5, "<t>"),
            *chart.dot(10, 1),
            *chart.end(),
        ]
    )
    assert (
        "<x>" not in drawn and "&lt;x&gt;" in drawn and "&lt;half&gt;" in drawn and "<title>&lt;t&gt;</title>" in drawn
    )
    assert drawn.startswith('<svg viewBox="0 0 200 100" role="img" aria-label="a &lt;chart&gt;">')
    line, level = re.findall(r'<polyline class="(?:line|level)" points="([^"]*)"', drawn)
    points = [tuple(map(float, place.split(","))) for place in line.split()]
    assert all(0 <= x <= 200 and 0 <= y <= 100 for x, y in points)
    # Even steps, to the right and upwards.
    (first, second) = [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(points)]
    assert first == pytest.approx(second, abs=0.11) and min(first) > 0
    (start, end) = [tuple(map(float, place.split(","))) for place in level.split()]
    assert start[1] == end[1] == pytest.approx((3 * points[0][1] + points[2][1]) / 4, abs=0.11)
    dots = re.findall(r'cx="([^"]*)" cy="([^"]*)"', drawn)
    assert [tuple(map(float, dot)) for dot in dots] == points[1:]
