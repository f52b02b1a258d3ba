"""Logistic regression in blocks against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dove_fast.evaluation import logistic
from dove_fast.evaluation.logistic import StandardRows, fit_logistic

N, DIMENSION, CLASSES = 90, 7, 4
CPU = torch.device("cpu")


class Matrix:
    """Rows in memory, which counts what is read."""

    def __init__(self, values):
        self.values, self.shape, self.read_rows = values, tuple(values.shape), 0

    def read(self, rows):
        self.read_rows += len(rows)
        return self.values[torch.from_numpy(rows)]


@pytest.fixture
def problem():
    """Classes that overlap, features of different sizes, and a constant one."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, N)
    values = random.normal(size=(CLASSES, DIMENSION))[labels] + random.normal(size=(N, DIMENSION))
    values = values * 10.0 ** np.arange(-3, 4)[:DIMENSION] + 5
    values[:, 2] = 3
    return torch.from_numpy(values), torch.from_numpy(labels)


def standardised(values):
    """By scikit-learn, but for the scale of 1 / sqrt(D)."""
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit_transform(values) / DIMENSION**0.5


@pytest.mark.parametrize("penalty", [1e-1, 1e-3, 1e-5])
def test_the_optimum_is_that_of_scikit_learn(problem, penalty, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(logistic, "LEAST_SCALE", 1e-9)
    values, labels = problem
    rows = StandardRows(Matrix(values), np.arange(N), CPU, torch.float64)
    found = fit_logistic(rows, labels, CLASSES, penalty)
    theirs = LogisticRegression(C=1 / (N * penalty), tol=1e-10, max_iter=100000)
    expected = theirs.fit(standardised(values.numpy()), labels.numpy())
    assert found.converged
    assert torch.allclose(found.weight.T, torch.from_numpy(expected.coef_), rtol=1e-3, atol=1e-3)
    # The biases of all classes may be shifted together.
    shift = found.bias - found.bias.mean()
    assert torch.allclose(shift, torch.from_numpy(expected.intercept_ - expected.intercept_.mean()), atol=1e-3)
    assert found.predict(rows).tolist() == expected.predict(standardised(values.numpy())).tolist()


def test_rows_that_are_left_out_have_no_share(problem):
    values, labels = problem
    part = np.flatnonzero(np.arange(N) % 3)
    rows = StandardRows(Matrix(values), np.arange(N), CPU, torch.float64)
    shares = torch.zeros(N)
    shares[torch.from_numpy(part)] = 1 / len(part)
    found = fit_logistic(rows, labels, CLASSES, 1e-2, shares=shares)
    some = StandardRows(Matrix(values), part, CPU, torch.float64, like=rows)
    expected = fit_logistic(some, labels[torch.from_numpy(part)], CLASSES, 1e-2)
    assert torch.allclose(found.weight, expected.weight, atol=1e-4)
    # From another start the same optimum, as there is one.
    again = fit_logistic(some, labels[torch.from_numpy(part)], CLASSES, 1e-2, start=fit_logistic(rows, labels, 4, 1e-4))
    assert torch.allclose(again.weight, expected.weight, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_are_read_again_give_the_same(problem, dtype, monkeypatch):
    values, labels = problem
    whole = Matrix(values)
    expected = fit_logistic(StandardRows(whole, np.arange(N), CPU, dtype), labels, CLASSES, 1e-3)
    # Twice for the moments, once to keep them.
    assert whole.read_rows == 3 * N
    monkeypatch.setattr(logistic, "BLOCK_BYTES", 8 * DIMENSION * 10)
    monkeypatch.setattr(logistic, "KEPT_BYTES", {"cpu": 0})
    rows = StandardRows(Matrix(values), np.arange(N), CPU, dtype)
    assert len(list(rows)) == (9 if dtype == torch.float64 else 5)
    found = fit_logistic(rows, labels, CLASSES, 1e-3)
    assert torch.allclose(found.weight, expected.weight, rtol=1e-2, atol=1e-2)
    assert found.predict(rows).tolist() == expected.predict(rows).tolist()


def test_standard_rows(problem):
    values, _ = problem
    train, test = np.arange(0, N, 2), np.arange(1, N, 2)
    rows = StandardRows(Matrix(values), train, CPU, torch.float64)
    block = torch.cat([block for _, block in rows])
    assert torch.allclose(block.mean(dim=0), torch.zeros(DIMENSION, dtype=torch.float64), atol=1e-12)
    variances = block.var(dim=0, unbiased=False)
    # The largest feature alone is that large: the others hardly vary beside it.
    assert variances[-1].item() == pytest.approx(1 / DIMENSION)
    mean, deviation = values[train].mean(dim=0), values[train].std(dim=0, unbiased=False)
    least = logistic.LEAST_SCALE * deviation.square().mean().sqrt()
    expected = (values[test] - mean) / deviation.clamp(min=least) / DIMENSION**0.5
    found = torch.cat([block for _, block in StandardRows(Matrix(values), test, CPU, torch.float64, like=rows)])
    assert torch.allclose(found, expected)
    constant = StandardRows(Matrix(torch.ones(5, 3)), np.arange(5), CPU)
    assert torch.equal(next(iter(constant))[1], torch.zeros(5, 3))


def test_a_search_that_is_cut_short_says_so(problem, monkeypatch):
    values, labels = problem
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 3)
    rows = StandardRows(Matrix(values), np.arange(N), CPU)
    assert not fit_logistic(rows, labels, CLASSES, 1e-6).converged
