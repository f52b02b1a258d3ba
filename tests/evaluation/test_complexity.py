"""The complexity of images, and rank correlation, against straight formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dove_fast.evaluation import laplacian_variance, rank_correlation


def straight(image):
    """The variance of the Laplacian of one image (3, H, W) in [0, 255], pixel by pixel."""
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    height, width = grey.shape
    values = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, height - 1)
        for x in range(1, width - 1)
    ]
    return np.var(values)


def test_laplacian_variance():
    images = torch.randint(0, 256, (3, 3, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [straight(image.numpy().astype(np.float64)) for image in images]
    assert laplacian_variance(images).tolist() == pytest.approx(expected, rel=1e-5)
    assert laplacian_variance(images.float() / 255).tolist() == pytest.approx(expected, rel=1e-4)
    assert laplacian_variance(torch.full((1, 3, 5, 5), 0.25)).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"at least 3 x 3, got \(1, 3, 2, 5\)"):
        laplacian_variance(torch.zeros(1, 3, 2, 5))


def test_rank_correlation():
    x = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    # Ranks 3, 1.5, 4, 1.5, 5 and 2, 4, 1, 3, 5.
    y = torch.tensor([2, 8, 1, 5, 9])
    ranks = np.corrcoef([3, 1.5, 4, 1.5, 5], [2, 4, 1, 3, 5])[0, 1]
    assert rank_correlation(x, y) == pytest.approx(ranks)
    assert math.isnan(rank_correlation(x, torch.ones(5)))
    with pytest.raises(ValueError, match="n at least 2"):
        rank_correlation(x[:1], y[:1])
