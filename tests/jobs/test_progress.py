"""How far a job is, and how long it still takes."""

from __future__ import annotations

import pytest

from dove_fast.jobs.estimate import Estimate
from dove_fast.jobs.progress import Progress, TimeLeft, describe_seconds


@pytest.mark.parametrize(
    ("progress", "extent"),
    [
        (Progress(60, 200, 38, 475, units_done=3, units=10), (60, 200)),
        (Progress(60, None, 38, 475, units_done=3, units=10), (3, 10)),
        # A single unit is done at the end only.
        (Progress(60, None, 38, 475, units_done=0, units=1), (0, None)),
        (Progress(60, None, 38, 475), (0, None)),
    ],
)
def test_the_extent_is_in_inputs_or_else_in_units(progress, extent):
    assert progress.extent == extent


def test_the_time_left_goes_by_what_was_done_since_the_first_state():
    left = TimeLeft()
    # 100 were done by an earlier run, in no time of this one.
    assert left.after(Progress(100, 400, 0, 0), 7.0) is None
    assert left.after(Progress(100, 400, 0, 0), 17.0) is None
    assert left.after(Progress(150, 400, 50, 50), 27.0) == 100.0
    assert left.after(Progress(400, 400, 300, 300), 37.0) == 0.0
    # Inputs that came meanwhile.
    assert left.after(Progress(500, 400, 400, 400), 47.0) == 0.0


def test_the_time_left_goes_by_units_where_inputs_are_not_counted():
    left = TimeLeft()
    assert left.after(Progress(40, None, 0, 0, units_done=2, units=10), 0.0) is None
    assert left.after(Progress(65, None, 25, 50, units_done=4, units=10), 10.0) == 30.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0:00:00"), (34.6, "0:00:35"), (7380.0, "2:03:00"), (99990.0, "1 day, 3:46:30")]
)
def test_spans_of_time_in_words(seconds, words):
    assert describe_seconds(seconds) == words


def test_an_estimate_tells_time_as_the_bar_does():
    estimate = Estimate(
        inputs=10**6,
        units=977,
        units_done=0,
        tried=64,
        failed=0,
        images_per_second=10.0,
        mean_tokens=12.0,
        bytes_per_image=1024.0,
    )
    assert "that is 1 day, 3:46:40 or less for what is left" in estimate.text()
