"""How a codebook is used, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dove_fast.evaluation.codebook import CodebookCounter


def test_usage_and_perplexity():
    counter = CodebookCounter("mine", 8)
    counter.add(torch.tensor([[0, 0], [0, 3]]))
    counter.add(torch.tensor([5, 5, 5, 0]))
    found = counter.result()
    shares = np.array([4, 1, 3]) / 8
    assert (found.name, found.codes, found.used, found.size) == ("mine", 8, 3, 8)
    assert found.perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_the_bounds_of_perplexity():
    one, all_ = CodebookCounter("one", 6), CodebookCounter("all", 6)
    one.add(torch.full((9,), 2))
    all_.add(torch.arange(6).repeat(3))
    assert one.result().perplexity == pytest.approx(1) and one.result().used == 1
    assert all_.result().perplexity == pytest.approx(6) and all_.result().used == 6
