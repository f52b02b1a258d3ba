"""How complex an image is, and whether lengths follow it.

Shape suffixes: B images of H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEAST_COMPLEXITY", "laplacian_variance", "rank_correlation"]

# What a flat picture's complexity of 0 is drawn as, on a logarithmic axis.
LEAST_COMPLEXITY = 0.01
# ITU-R BT.601, what grey means in Pillow and OpenCV.
LUMA = (0.299, 0.587, 0.114)


def laplacian_variance(images: Tensor) -> Tensor:
    """Return the variance of each image's Laplacian, (B,) fp32: 0 for a flat image, large for one full of detail.

    images: (B, 3, H, W) in [0, 1] or uint8, at least 3 x 3. Of the grey image in [0, 255], by the kernel of four
    neighbours, inside the border: the scale that is usual for this measure.
    Raises `ValueError` for another shape. Source: METHOD section 6.
    """
    if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 3:
        raise ValueError(f"images must have shape (B, 3, H, W), at least 3 x 3, got {tuple(images.shape)}")
    scale = 1.0 if images.dtype == torch.uint8 else 255.0
    weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1) * scale
    grey = (images.float() * weights).sum(dim=1)
    # Not by a convolution, which a GPU may round to TF32.
    neighbours = grey[:, :-2, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] + grey[:, 2:, 1:-1]
    return (neighbours - 4 * grey[:, 1:-1, 1:-1]).flatten(1).var(dim=1, unbiased=False)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of x (n,) and y (n,), equal values having their mean rank.

    NaN where one of them is constant. Raises `ValueError` for other shapes or fewer than two values.
    """
    if x.dim() != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"x and y must have one shape (n,), n at least 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    ranks = torch.stack([_mean_ranks(x), _mean_ranks(y)])
    return float(torch.corrcoef(ranks)[0, 1])


def _mean_ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]
