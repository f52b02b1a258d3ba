"""Errors inside and outside of regions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import RELATIVE, assert_close

from dove_fast.losses import region_mean, region_mse


def masks(kind: str) -> torch.Tensor:
    mask = torch.zeros(3, 1, 6, 8, dtype=torch.bool)
    if kind == "boxes":
        mask[0, :, 1:4, 2:7] = True
        mask[1, :, 0:2, 0:2] = mask[1, :, 1:5, 1:5] = True
        mask[2, :, 5:, 7:] = True
    elif kind == "whole":
        mask[:] = True
    return mask


@pytest.mark.parametrize("kind", ["boxes", "whole", "none"])
def test_is_the_mean_over_pixels_and_channels(kind):
    x, x_hat = torch.rand(2, 3, 3, 6, 8, dtype=torch.float64)
    mask = masks(kind)
    inside, outside = region_mse(x, x_hat, mask)
    squares = (x - x_hat).square().numpy()
    for row in range(3):
        chosen = np.broadcast_to(mask[row].numpy(), squares[row].shape)
        for side, found in ((chosen, inside), (~chosen, outside)):
            expected = squares[row][side].mean() if side.any() else 0.0
            assert float(found[row]) == pytest.approx(expected, rel=RELATIVE[torch.float64])


def test_without_a_mask_all_is_inside():
    x, x_hat = torch.rand(2, 3, 3, 6, 8)
    inside, outside = region_mse(x, x_hat)
    assert_close(inside, (x - x_hat).square().mean(dim=(1, 2, 3)))
    assert not outside.any()
    assert torch.allclose(region_mse(x, x_hat, masks("whole"))[0], inside)


def test_the_other_side_does_not_count():
    mask = masks("boxes")
    x, x_hat = torch.rand(2, 3, 3, 6, 8, dtype=torch.float64)
    expected, _ = region_mse(x, x_hat, mask)
    holed = x_hat.masked_fill(~mask, float("nan")).requires_grad_()
    inside, outside = region_mse(x, holed, mask)
    assert torch.equal(inside, expected) and outside.isnan().all()
    (gradient,) = torch.autograd.grad(inside.sum(), holed)
    counts = mask.expand_as(gradient)
    assert gradient.isfinite().all() and gradient[counts].any() and not gradient[~counts].any()


def test_gradients():
    x, x_hat = torch.rand(2, 3, 3, 6, 8, dtype=torch.float64)
    x_hat.requires_grad_()
    for mask in (masks("boxes"), masks("none"), None):
        assert torch.autograd.gradcheck(lambda t, mask=mask: region_mse(x, t, mask), x_hat)


def test_half_precision_is_summed_in_fp32():
    x, x_hat = torch.rand(2, 3, 3, 6, 8).bfloat16()
    inside, _ = region_mse(x, x_hat)
    assert inside.dtype == torch.float32
    assert_close(inside, (x.double() - x_hat.double()).square().mean(dim=(1, 2, 3)), RELATIVE[torch.float32])


def test_refusals():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"x_hat must be a floating tensor, got torch\.uint8"):
        region_mse(x, x.to(torch.uint8))
    with pytest.raises(ValueError, match=r"one shape \(B, C, H, W\), got \(2, 3, 4, 4\) and \(2, 3, 4, 5\)"):
        region_mse(x, torch.zeros(2, 3, 4, 5))
    with pytest.raises(TypeError, match=r"mask must be bool, got torch\.float32"):
        region_mse(x, x, torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 1, 4, 4\), got \(2, 4, 4\)"):
        region_mse(x, x, torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        region_mse(x, x, [True])
    for images, mask in ((x.to("meta"), None), (x, torch.ones(2, 1, 4, 4, dtype=torch.bool, device="meta"))):
        with pytest.raises(ValueError, match=r"on one device|must be on cpu like the images, got meta"):
            region_mse(x, images, mask)
    with pytest.raises(ValueError, match=r"values must have shape \(B, 1, H, W\)"):
        region_mean(x)
