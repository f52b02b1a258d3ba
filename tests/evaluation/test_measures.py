"""PSNR and SSIM against straight formulas and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from dove_fast.evaluation.complexity import laplacian_variance
from dove_fast.evaluation.measures import decibels, psnr, spread, ssim, unit_pixels


def pair(batch: int = 3, height: int = 17, width: int = 23, noise: float = 0.1):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=random)
    # From nearly equal to far apart.
    strength = torch.linspace(0.01, 1, batch).view(-1, 1, 1, 1) * noise
    made = (images + strength * torch.randn(images.shape, generator=random)).clamp(0, 1)
    return images, made


def straight_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The similarity of two grey images, window by window."""
    places = np.arange(11) - 5
    weights = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (image[top : top + 11, left : left + 11] for image in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            found.append(
                (2 * mean_a * mean_b + 1e-4)
                * (2 * both + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )
    return float(np.mean(found))


def test_ssim_window_by_window():
    images, made = pair()
    expected = [
        np.mean([straight_ssim(x, y) for x, y in zip(a, b, strict=True)])
        for a, b in zip(images.double().numpy(), made.double().numpy(), strict=True)
    ]
    assert ssim(images.double(), made.double()).tolist() == pytest.approx(expected, rel=1e-9)
    assert ssim(images, made).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [(11, 11), (16, 40), (64, 64)])
def test_ssim_is_that_of_torchmetrics_without_its_borders(size):
    images, made = (pixels.double() for pixels in pair(4, *size, noise=0.5))
    # It reflects the images at their borders, too, and counts the windows there; at 11 x 11 one is whole.
    _, full = structural_similarity_index_measure(
        made, images, data_range=1.0, reduction="none", return_full_image=True
    )
    expected = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert ssim(images, made).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_ssim_is_not_rounded_by_convolutions(monkeypatch):
    """On a GPU a convolution may run in TF32; sums do not."""
    images, made = pair()
    with monkeypatch.context() as patch:
        for name in ("conv2d", "conv1d"):
            patch.setattr(torch.nn.functional, name, lambda *_, **__: pytest.fail("a convolution"))
            patch.setattr(torch, name, lambda *_, **__: pytest.fail("a convolution"))
        ssim(images, made)
        laplacian_variance(images)


def test_relations_of_ssim():
    images, made = pair()
    assert torch.allclose(ssim(images, images), torch.ones(3))
    assert torch.allclose(ssim(images, made), ssim(made, images))
    found = ssim(images, made)
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize(
    "shapes", [((1, 3, 10, 11), (1, 3, 10, 11)), ((1, 3, 12, 12), (2, 3, 12, 12)), ((3, 12, 12),) * 2]
)
def test_shapes_that_ssim_does_not_take(shapes):
    with pytest.raises(ValueError, match=r"one shape \(B, C, H, W\), at least 11 x 11, got"):
        ssim(*map(torch.zeros, shapes))


def test_psnr():
    images, made = pair()
    expected = [
        10 * math.log10(1 / float(((a - b) ** 2).mean())) for a, b in zip(images.double(), made.double(), strict=True)
    ]
    assert psnr(images, made).tolist() == pytest.approx(expected, rel=1e-5)
    assert psnr(images, images).tolist() == pytest.approx([100] * 3)
    assert decibels(torch.tensor([1.0, 0.01])).tolist() == pytest.approx([0, 20])


def test_pixels_as_people_see_them():
    assert unit_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert unit_pixels(torch.tensor([-0.5, 0.5, 1.5], dtype=torch.bfloat16)).tolist() == [0, 0.5, 1]
    assert unit_pixels(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert unit_pixels(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("count", [1, 2, 20, 1001])
def test_spread(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1))
    found = spread(values)
    assert found.mean == pytest.approx(values.double().mean().item())
    assert [found.p5, found.p50, found.p95] == pytest.approx(
        np.percentile(values.double().numpy(), [5, 50, 95]).tolist()
    )
