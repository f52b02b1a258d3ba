"""Running moments against numpy, and the Frechet distance against scipy's matrix root and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from dove_fast.evaluation.frechet import Moments, frechet_distances


def features(count: int, dimension: int = 12, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=random, dtype=torch.float64)
    return torch.randn(count, dimension, generator=random, dtype=torch.float64) @ mix + offset


def moments(rows: torch.Tensor, batch: int = 7) -> Moments:
    found = Moments(rows.shape[1])
    for part in rows.split(batch):
        found.add(part)
    return found


def by_matrix_root(first: torch.Tensor, second: torch.Tensor) -> float:
    a, b = first.numpy(), second.numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_moments_are_those_of_all_rows_together(batch):
    # Far from 0, where sums of squares would cancel.
    rows = features(100, offset=1e6)
    found = moments(rows, batch)
    assert found.count == 100
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-7, atol=1e-7)


def test_no_rows_change_nothing():
    found = moments(features(9))
    before = found.mean, found.covariance
    found.add(torch.empty(0, 12))
    assert found.count == 9 and torch.equal(found.mean, before[0]) and torch.equal(found.covariance, before[1])


def test_the_distance_is_that_of_scipy_and_torchmetrics():
    first, others = features(200), [features(150, seed=1), features(300, seed=2, offset=0.5)]
    found = frechet_distances(moments(first), [moments(other) for other in others])
    assert found == pytest.approx([by_matrix_root(first, other) for other in others], rel=1e-9)
    reference = moments(first)
    for distance, other in zip(found, map(moments, others), strict=True):
        theirs = _compute_fid(reference.mean, reference.covariance, other.mean, other.covariance)
        assert distance == pytest.approx(float(theirs), rel=1e-9)


def test_relations():
    first, second = features(50), features(60, seed=3)
    assert frechet_distances(moments(first), [moments(first)])[0] == pytest.approx(0, abs=1e-9)
    there, back = (frechet_distances(moments(a), [moments(b)])[0] for a, b in ((first, second), (second, first)))
    assert there == pytest.approx(back, rel=1e-9)
    # A shift alone is its square.
    assert frechet_distances(moments(first), [moments(first + 2)])[0] == pytest.approx(4 * 12, rel=1e-9)


def test_fewer_rows_than_dimensions():
    """Of a covariance of rank 4, by the eigenvalues of the small matrix that has them all."""
    first, second = features(5), features(5, seed=4)
    a, b = ((rows - rows.mean(0)) / 2 for rows in (first, second))
    # tr (A'A B'B)^(1/2) is the sum of the singular values of A B'.
    common = torch.linalg.svdvals(a @ b.T).sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * common
    assert frechet_distances(moments(first), [moments(second)])[0] == pytest.approx(float(expected), rel=1e-6)


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"features must have shape \(n, 12\), got \(3, 11\)"):
        Moments(12).add(torch.zeros(3, 11))
    with pytest.raises(ValueError, match="dimension must be at least 1, got 0"):
        Moments(0)
    with pytest.raises(ValueError, match="a covariance needs at least 2 rows, got 1"):
        frechet_distances(moments(features(5)), [moments(features(1))])
    with pytest.raises(ValueError, match="must have 12 dimensions, got 3"):
        frechet_distances(moments(features(5)), [moments(features(5, dimension=3))])
