"""The block schedule: least expected time, and never worse than any fixed block by its own reckoning."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dove_fast.generation.schedule import CostModel, LengthHistogram, plan, stream_block

STEPS = 16
PREFIX = 20

costs = st.builds(
    CostModel,
    block=st.sampled_from([0.0, 1.0, 20.0, 1000.0]),
    position=st.sampled_from([0.5, 1.0]),
    pair=st.sampled_from([0.0, 1e-3]),
)
seen = st.lists(st.integers(1, STEPS), max_size=30)


def expected_time(sizes, survival, cost, rows):
    """What a sequence of blocks costs on the average, told apart by whether any row is alive."""
    total, step = 0.0, 0
    for size in sizes:
        some = 1 - (1 - survival[step]) ** rows
        if some > 0:
            total += some * cost.time(rows * survival[step] / some, PREFIX + step, size)
        step += size
    return total


def compositions(total):
    """Every sequence of positive numbers with this sum."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        marks = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), total]
        yield [b - a for a, b in itertools.pairwise(marks)]


@settings(deadline=None, max_examples=20)
@given(lengths=seen, cost=costs, rows=st.sampled_from([1, 3, 50]))
def test_no_sequence_of_blocks_is_better(lengths, cost, rows):
    survival = LengthHistogram(10, [min(n, 10) for n in lengths]).survival()
    chosen = expected_time(plan(survival, cost, rows, PREFIX), survival, cost, rows)
    best = min(expected_time(sizes, survival, cost, rows) for sizes in compositions(10))
    assert chosen == pytest.approx(best, rel=1e-9)


@given(lengths=seen, cost=costs, rows=st.integers(1, 40), step=st.integers(0, STEPS - 1))
def test_blocks_reach_the_end(lengths, cost, rows, step):
    sizes = plan(LengthHistogram(STEPS, lengths).survival(), cost, rows, PREFIX, step)
    assert all(size >= 1 for size in sizes) and sum(sizes) == STEPS - step


@given(lengths=seen, cost=costs, most=st.integers(1, STEPS))
def test_blocks_end_with_the_longest_allowed(lengths, cost, most):
    assert sum(plan(LengthHistogram(STEPS, lengths).survival(most), cost, 4, PREFIX)) == most


def test_extremes():
    free, dear = CostModel(0.0, 1.0, 0.0), CostModel(1e6, 1.0, 0.0)
    even = LengthHistogram(STEPS).survival()
    assert plan(even, free, 8, PREFIX) == (1,) * STEPS
    assert plan(even, dear, 8, PREFIX) == (STEPS,)
    # Where every row has 5 tokens, one block of 5 does nearly all.
    always_five = LengthHistogram(STEPS, [5] * 10000).survival()
    assert plan(always_five, CostModel(1.0, 1.0, 0.0), 8, PREFIX)[0] == 5
    assert stream_block(always_five, CostModel(1.0, 1.0, 0.0), 8, PREFIX) == 5
    assert stream_block(even, free, 8, PREFIX) == 1
    assert stream_block(even, dear, 8, PREFIX) == STEPS


@given(lengths=seen)
def test_survival(lengths):
    survival = LengthHistogram(STEPS, lengths).survival()
    assert survival.shape == (STEPS + 1,) and survival[0] == 1 and survival[-1] == 0
    assert (np.diff(survival) <= 0).all()
    weight = len(lengths) + 1
    for i in range(STEPS):
        more = sum(n > i for n in lengths) + (STEPS - i) / STEPS
        assert survival[i] == pytest.approx(more / weight)


def test_histogram_learns_and_forgets():
    histogram = LengthHistogram(STEPS, memory=100)
    assert histogram.mean == pytest.approx((STEPS + 1) / 2) and histogram.weight == 0
    histogram.update([3] * 80)
    assert histogram.weight == 80
    for _ in range(20):
        histogram.update([9] * 50)
    assert histogram.weight == pytest.approx(100)
    assert 8.8 < histogram.mean < 9.1
    histogram.update([5] * 1000)
    assert histogram.survival()[5] < 0.01 < histogram.survival()[4]
    for again in (copy.deepcopy(histogram), pickle.loads(pickle.dumps(histogram))):
        assert (again.survival() == histogram.survival()).all()
        again.update([1])
        assert again.weight != histogram.weight


def test_refusals():
    with pytest.raises(ValueError, match=f"lengths must be from 1 to {STEPS}, got 0 to 3"):
        LengthHistogram(STEPS, [0, 3])
    with pytest.raises(ValueError, match="num_tokens and memory must be at least 1, got 0"):
        LengthHistogram(0)
    with pytest.raises(ValueError, match=r"position above 0, got 1\.0, 0\.0, 0\.0 and 0\.0"):
        CostModel(1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        plan(LengthHistogram(STEPS).survival(), CostModel(1.0, 1.0, 0.0), 0, PREFIX)
