"""The length loss against a straight-line NumPy version, at its edges, and the threshold that it compares with."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import RELATIVE, assert_close

from dove_fast.losses import RunningThreshold, eos_loss


def plain(logits: np.ndarray, lengths: list[int], errors: list[float], threshold: float | None) -> list[float]:
    """METHOD section 4, line by line, with probabilities; fp64."""
    losses = []
    for row, m, error in zip(logits, lengths, errors, strict=True):
        p = 1 / (1 + np.exp(-row))
        if threshold is None:
            losses.append(0.0)
        elif error < threshold:
            losses.append(float(np.mean([-math.log(p[i]) for i in range(m - 1)])) if m > 1 else 0.0)
        else:
            losses.append(-math.log(1 - p[m - 1]) if m < len(row) else 0.0)
    return losses


@settings(deadline=None, max_examples=100)
@given(data=st.data(), steps=st.integers(1, 9), batch=st.integers(0, 6))
def test_is_the_method(data, steps, batch):
    random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    logits = random.normal(0, 3, (batch, steps))
    lengths = [data.draw(st.integers(1, steps)) for _ in range(batch)]
    errors = [data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.7])) for _ in range(batch)]
    threshold = data.draw(st.sampled_from([None, 0.1, 0.6]))
    loss = eos_loss(torch.tensor(logits), torch.tensor(lengths, dtype=torch.int32), torch.tensor(errors), threshold)
    expected = plain(logits, lengths, errors, threshold)
    assert loss.shape == (batch,) and loss.dtype == torch.float64
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), RELATIVE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finite_at_probabilities_of_zero_and_one(dtype):
    logits = torch.tensor([[-3e4, 3e4, -3e4, 3e4], [3e4, -3e4, 3e4, -3e4]], dtype=dtype, requires_grad=True)
    assert set(logits.detach().sigmoid().flatten().tolist()) == {0.0, 1.0}
    for errors in ([0.0, 0.0], [9.0, 9.0]):
        for m in (1, 2, 3, 4):
            loss = eos_loss(logits, torch.tensor([m, m]), torch.tensor(errors), 1.0)
            assert loss.dtype == torch.float32 and loss.isfinite().all()
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient.isfinite().all() and gradient.abs().max() <= 1


def test_what_lies_behind_the_last_token_does_not_count():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    lengths, errors = torch.tensor([1, 3, 3, 6]), torch.tensor([0.0, 0.0, 9.0, 9.0], dtype=torch.float64)
    behind = torch.arange(6) >= lengths[:, None]
    expected = eos_loss(logits, lengths, errors, 1.0)
    for filling in (float("nan"), float("inf"), -1e30):
        loss = eos_loss(logits.masked_fill(behind, filling), lengths, errors, 1.0)
        assert torch.equal(loss, expected)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all() and not gradient[behind].any()


def test_directions_of_the_gradient():
    """Good enough: arrows up on every step before EOS. Not yet: one down at EOS."""
    logits = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    loss = eos_loss(logits, torch.tensor([4, 4]), torch.tensor([0.0, 9.0]), 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    # Descent goes against the gradient.
    assert gradient[0].tolist() == pytest.approx([-1 / 6] * 3 + [0, 0])
    assert gradient[1].tolist() == [0, 0, 0, 0.5, 0]


def test_gradients():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    lengths, errors = torch.tensor([1, 3, 4, 5]), torch.tensor([0.0, 0.0, 9.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: eos_loss(t, lengths, errors, 1.0), logits)


def test_an_error_that_is_nan_asks_for_nothing():
    loss = eos_loss(torch.randn(2, 5), torch.tensor([3, 3]), torch.tensor([float("nan"), 9.0]), 1.0)
    assert loss[0] == 0 and loss[1] > 0


def test_no_loss_has_a_graph_all_the_same():
    """Data parallelism waits for every parameter's gradient in every step, the first one too."""
    logits = torch.tensor([[1.0, float("nan")], [2.0, float("inf")]], requires_grad=True)
    loss = eos_loss(logits, torch.tensor([1, 1]), torch.zeros(2), None)
    assert loss.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.tolist() == [[0, 0], [0, 0]]


def test_errors_are_constants():
    errors = torch.tensor([0.5], requires_grad=True)
    loss = eos_loss(torch.randn(1, 5, requires_grad=True), torch.tensor([3]), errors, 1.0)
    loss.sum().backward()
    assert errors.grad is None


def test_refusals():
    logits, lengths, errors = torch.zeros(2, 5), torch.tensor([1, 2]), torch.zeros(2)
    for arguments, error, message in (
        (([[0.0]], lengths, errors), TypeError, "eos_logits must be a tensor, got list"),
        ((logits.long(), lengths, errors), TypeError, "eos_logits and errors must be floating, got torch.int64"),
        ((logits, lengths.float(), errors), TypeError, r"lengths must be integers, got torch\.float32"),
        ((logits[0], lengths, errors), ValueError, r"eos_logits must have shape \(B, T\), got \(5,\)"),
        ((logits, lengths[:1], errors), ValueError, r"lengths must have shape \(2,\), got \(1,\)"),
        ((logits, lengths, errors[:1]), ValueError, r"errors must have shape \(2,\), got \(1,\)"),
        ((logits, lengths.to("meta"), errors), ValueError, "lengths must be on cpu like eos_logits, got meta"),
        ((logits, torch.tensor([0, 5]), errors), ValueError, "lengths must be from 1 to 5, got 0 to 5"),
        ((logits, torch.tensor([1, 6]), errors), ValueError, "lengths must be from 1 to 5, got 1 to 6"),
    ):
        with pytest.raises(error, match=message):
            eos_loss(*arguments, 1.0)


def test_running_threshold():
    threshold = RunningThreshold(window=3)
    assert threshold.value is None and threshold.window == 3
    for value, expected in ((1.0, 1.0), (torch.tensor(3.0), 2.0), (5.0, 3.0), (7.0, 5.0)):
        threshold.update(value)
        assert threshold.value == expected
    with pytest.raises(ValueError, match="an error must be finite, got nan"):
        threshold.update(float("nan"))
    again = RunningThreshold()
    again.load_state_dict(json.loads(json.dumps(threshold.state_dict())))
    for one in (threshold, again):
        one.update(9.0)
        assert one.value == 7.0 and one.window == 3
    for window, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="window must be"):
            RunningThreshold(window)
