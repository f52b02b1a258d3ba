"""What the tests of group_norm_silu and of its backward share: where they run, their arguments, and the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# Backend and device; conftest skips what this machine cannot run. On the CPU Triton is its interpreter.
every = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("reference", "cpu", id="reference"),
        pytest.param("cpu", "cpu", id="cpu"),
        pytest.param("triton", "cpu", id="triton-interpreted"),
        pytest.param("reference", "cuda", id="reference-gpu", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    ],
)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", channels_last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    weight, bias = torch.randn(2, shape[1], generator=generator)
    if channels_last:
        x = innermost(x)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def truth(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6, activation: str | None = "silu"):
    """The formula, one group of one image after the other, in fp64."""
    x, weight, bias = (t.double().cpu() for t in (x, weight, bias))
    out = torch.empty_like(x)
    width = x.shape[1] // groups
    for image in range(x.shape[0]):
        for group in range(groups):
            some = slice(group * width, (group + 1) * width)
            values = x[image, some]
            normal = (values - values.mean()) / (values.var(correction=0) + eps).sqrt()
            shape = (width, *(1,) * (x.dim() - 2))
            out[image, some] = normal * weight[some].view(shape) + bias[some].view(shape)
    return out * out.sigmoid() if activation == "silu" else out


def gradient_like(x: Tensor, seed: int = 1) -> Tensor:
    """Of a mean that is not 0, so that no term of the gradient is missed."""
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) + 0.25
    return (grad if x.is_contiguous() else innermost(grad)).to(x.device, x.dtype)
