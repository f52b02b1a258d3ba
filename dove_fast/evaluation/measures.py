"""How near a reconstruction is to its image: PSNR and SSIM, of each image alone.

Shape suffixes: B images of H x W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dove_fast.evaluation.results import Measure, Spread
from dove_fast.failures import JobError
from dove_fast.losses.region import region_mse

__all__ = ["PSNR", "SSIM", "WINDOW", "check_finite", "decibels", "psnr", "spread", "ssim", "unit_pixels"]

# A mean squared error below this is taken for it: equal images have 100 dB and not infinitely many.
LEAST_MSE = 1e-10
# The Gaussian window of SSIM, and what keeps its quotients finite; for images in [0, 1].
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2

PSNR = Measure("PSNR", "dB, of RGB in [0, 1]; reconstructions clamped, not rounded to 8 bits; the mean of the images'")
SSIM = Measure(
    "SSIM",
    f"Gaussian window of {WINDOW} x {WINDOW}, sigma {SIGMA}, K1 0.01, K2 0.03, range 1, population covariance, the "
    "mean over RGB and the windows that lie in the image whole (as Wang et al. and scikit-image; torchmetrics counts "
    "reflected borders too); reconstructions clamped",
)


def unit_pixels(images: Tensor) -> Tensor:
    """Return images, uint8 or floating in [0, 1], as fp32 (wider floats as they are) clamped to [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.to(torch.promote_types(images.dtype, torch.float32)).clamp(0, 1)


def decibels(mse: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of mean squared errors of images in [0, 1], at most 100."""
    return -10 * mse.clamp(min=LEAST_MSE).log10()


def psnr(images: Tensor, made: Tensor) -> Tensor:
    """Return each image's peak signal-to-noise ratio in dB, (B,), at most 100; both (B, 3, H, W) in [0, 1]."""
    return decibels(region_mse(images, made)[0])


def ssim(images: Tensor, made: Tensor) -> Tensor:
    """Return each image's structural similarity, (B,), 1 for equal ones; both floating (B, C, H, W) in [0, 1].

    By a Gaussian window, over the windows that lie in the image whole, the mean over channels and windows.
    Raises `ValueError` for shapes that differ, or images smaller than the window of 11 x 11.
    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (2004).
    """
    if images.dim() != 4 or images.shape != made.shape or min(images.shape[2:]) < WINDOW:
        raise ValueError(
            f"images and made must have one shape (B, C, H, W), at least {WINDOW} x {WINDOW}, got "
            f"{tuple(images.shape)} and {tuple(made.shape)}"
        )
    heights = [math.exp(-0.5 * ((place - WINDOW // 2) / SIGMA) ** 2) for place in range(WINDOW)]
    weights = [height / sum(heights) for height in heights]
    x, y = images, made
    mean_x, mean_y, xx, yy, xy = (_windows(values, weights) for values in (x, y, x * x, y * y, x * y))
    variances = xx - mean_x.square() + yy - mean_y.square()
    covariance = xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _windows(values: Tensor, weights: list[float]) -> Tensor:
    """Return the means of values (B, C, H, W) over all windows in them, weighted along rows and along columns.

    By shifted sums: a convolution on a GPU may round to TF32, which the differences of squares do not forgive.
    """
    for dim in (2, 3):
        size = values.shape[dim] - len(weights) + 1
        total = weights[0] * values.narrow(dim, 0, size)
        for offset, weight in enumerate(weights[1:], start=1):
            total.add_(values.narrow(dim, offset, size), alpha=weight)
        values = total
    return values


def check_finite(made: Tensor, what: str, kind: str = "pictures") -> None:
    """Raise `JobError` where decoded `made`, not clamped yet, hold NaN or infinity: overflow, or a model not sound."""
    if not bool(made.isfinite().all()):
        raise JobError(
            f"{what}: the {kind} hold NaN or infinity in {str(made.dtype).removeprefix('torch.')}; if the model is "
            "sound, another --dtype (bfloat16, float32) holds them"
        )


def spread(values: Tensor) -> Spread:
    """Return the mean and the 5th, 50th and 95th percentile (linear between values) of values (n,), n at least 1."""
    wide = values.double()
    shares = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64, device=wide.device)
    return Spread(float(wide.mean()), *(_quantile(wide, float(share)) for share in shares))


def _quantile(values: Tensor, share: float) -> float:
    # torch.quantile refuses more than 2^24 values.
    ordered, place = values.sort().values, share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return float(torch.lerp(ordered[below], ordered[above], place - below))
