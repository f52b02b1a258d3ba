"""Reconstruction errors inside and outside of a region.

Shape suffixes: B images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["region_mean", "region_mse"]


def region_mean(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each image's mean of values (B, 1, H, W) inside and outside its region, both (B,); an empty side is 0.

    mask: (B, 1, H, W) bool, True inside; None for the whole image, whose outside is 0. What is on the other side of the
    mask, NaN included, does not count and gets no gradient.
    Raises `TypeError` for another dtype, `ValueError` for another shape.
    """
    if values.dim() != 4 or values.shape[1] != 1:
        raise ValueError(f"values must have shape (B, 1, H, W), got {tuple(values.shape)}")
    return _both_sides(lambda side: values if side is None else torch.where(side, values, 0.0), values, mask)


def region_mse(x: Tensor, x_hat: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each image's mean squared error inside and outside its region, both (B,), in fp32 at least.

    x, x_hat: (B, C, H, W); the mean is over pixels and channels. mask and empty sides: as in `region_mean`.
    Raises `TypeError` or `ValueError` that says what came. Source: METHOD section 4.
    """
    for name, images in (("x", x), ("x_hat", x_hat)):
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if x.dim() != 4 or x.shape != x_hat.shape:
        raise ValueError(f"x and x_hat must have one shape (B, C, H, W), got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    if x.device != x_hat.device:
        raise ValueError(f"x and x_hat must be on one device, got {x.device} and {x_hat.device}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, x_hat.dtype), torch.float32)
    difference = x_hat.to(dtype) - x.to(dtype)

    def squares(side: Tensor | None) -> Tensor:
        # Masked before the square: the gradient of what does not count would be 0 times NaN.
        counted = difference if side is None else torch.where(side, difference, 0.0)
        return counted.square().mean(dim=1, keepdim=True)

    return _both_sides(squares, difference[:, :1], mask)


def _both_sides(
    values_of: Callable[[Tensor | None], Tensor], like: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the means of values_of(side), (B, 1, H, W) and 0 beyond the side, over the mask and over the rest."""
    if mask is None:
        return values_of(None).mean(dim=(1, 2, 3)), like.new_zeros(len(like))
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape != like.shape:
        raise ValueError(f"mask must have shape {tuple(like.shape)}, got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"mask must be on {like.device} like the images, got {mask.device}")
    inside, outside = (
        values_of(side).sum(dim=(1, 2, 3)) / side.sum(dim=(1, 2, 3)).clamp(min=1) for side in (mask, ~mask)
    )
    return inside, outside
