"""group_norm_silu: group normalisation and SiLU in one pass, in the layout that the input has."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dove_fast import native as extension
from dove_fast.ops import registry
from dove_fast.ops.arguments import DTYPE_CODES, check_dtype, check_int, check_number, check_parameter, check_tensor
from dove_fast.ops.group_norm_silu import native, reference
from dove_fast.ops.launch import TRITON_TYPES, deferred, why_no_triton
from dove_fast.ops.registry import Implementation

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    activation: Literal["silu"] | None = "silu",
    backend: str | None = None,
) -> Tensor:
    """Normalise groups of channels to mean 0 and variance 1, scale and shift each channel, then apply SiLU.

    x: (B, C, *) float64, float32, bfloat16 or float16, any number of dimensions behind C; weight and bias: (C,) in x's
    dtype or float32, on x's device; C is a multiple of `num_groups`. Returns a tensor of x's shape and dtype:
    channels-last where x is (in memory (B, *, C)), else contiguous; an x that is neither is copied first.
    `activation=None` leaves SiLU out.
    The mean and variance are those of each image's group (biased variance, `eps` added to it), summed in fp32 around a
    value of the data, so that a mean far from 0 costs no precision; an image's result depends on neither the rest of
    the batch nor the number of threads, bit for bit. NaN or infinity in a group makes the group NaN.
    Memory traffic: x is read twice, the second time from the cache where a group (contiguous) or an image
    (channels-last) fits there; the result is written once; nothing else of x's size is allocated.
    Backward for x, weight and bias keeps x and the statistics, and computes the normalised activations again. On the
    CPU that too is two passes that allocate nothing else of x's size; sums are in fp32 over parts of an image, which
    the shape decides, and in fp64 over parts and images in their order: threads do not matter, nor, for x's gradient,
    does the rest of the batch. In Triton x is read three times, the gradient twice, and all sums are in fp32.
    A second derivative is not implemented: asking for one raises `RuntimeError`.
    backend: None, "auto", "reference", "cpu" or "triton" (float64 always goes to the reference).
    Raises `TypeError` for other types or dtypes, `ValueError` for shapes that do not fit, an unknown activation or
    tensors on different devices, `BackendError` where the backend cannot run.
    Source: METHOD section 1, the VQGAN's GroupNorm(32) + SiLU; Wu and He, Group Normalization (arXiv 1803.08494).
    """
    _check(x, num_groups, weight, bias, activation)
    check_number("eps", eps)
    registry.check_backend("group_norm_silu", backend)
    out, _, _ = torch.ops.dove_fast.group_norm_silu(x, num_groups, weight, bias, eps, activation, backend)
    return out


def _check(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, activation: str | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        check_tensor(name, tensor)
    check_dtype("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (B, C, ...), got {tuple(x.shape)}")
    channels = x.shape[1]
    check_int("num_groups", num_groups, 1)
    if channels < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_parameter(name, tensor, "x", x.dtype)
        if tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


_LIBRARY = torch.library.Library("dove_fast", "FRAGMENT")
_LIBRARY.define(
    "group_norm_silu(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, str? activation,"
    " str? backend=None) -> (Tensor out, Tensor mean, Tensor rstd)"
)
_LIBRARY.define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
    " str? activation, str? backend=None) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def _group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    function = registry.implementation("group_norm_silu", backend, x)
    out, mean, rstd = function(x, num_groups, weight, bias, eps, activation)
    return out, mean, rstd


def _group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    function = registry.implementation("group_norm_silu_backward", backend, x)
    grad_x, grad_weight, grad_bias = function(grad, x, mean, rstd, weight, bias, activation)
    return grad_x, grad_weight, grad_bias


_LIBRARY.impl("group_norm_silu", _group_norm_silu, "CompositeExplicitAutograd")
_LIBRARY.impl("group_norm_silu_backward", _group_norm_silu_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("dove_fast::group_norm_silu", lib=_LIBRARY)
def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty((x.shape[0], num_groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(reference.dense(x)), statistics, torch.empty_like(statistics)


@torch.library.register_fake("dove_fast::group_norm_silu_backward", lib=_LIBRARY)
def _fake_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(reference.dense(x))
    return grad_x, mean.new_empty(weight.shape), mean.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx: Any, grad: Tensor, _mean: Tensor | None, _rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    found = torch.ops.dove_fast.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, ctx.activation, ctx.backend)
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
    grad_x, grad_weight, grad_bias = (
        g.to(tensor.dtype) if wanted else None
        for g, tensor, wanted in zip(found, (x, weight, bias), needed, strict=True)
    )
    return grad_x, None, grad_weight, grad_bias, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "group_norm_silu has no second derivative: use F.silu(F.group_norm(...)) where a gradient is differentiated"
    )


torch.library.register_autograd("dove_fast::group_norm_silu", _backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(
    "dove_fast::group_norm_silu_backward", _no_second_derivative, setup_context=_save_nothing, lib=_LIBRARY
)

registry.register(
    "group_norm_silu",
    cpu=Implementation(
        native.group_norm_silu_cpu, missing=extension.why_no_native, dtypes=frozenset((*DTYPE_CODES, torch.float64))
    ),
    triton=Implementation(
        deferred("dove_fast.ops.group_norm_silu.triton_kernel", "group_norm_silu"),
        missing=why_no_triton,
        dtypes=frozenset((*TRITON_TYPES, torch.float64)),
    ),
    reference=Implementation(reference.group_norm_silu),
)
registry.register(
    "group_norm_silu_backward",
    cpu=Implementation(
        native.group_norm_silu_backward_cpu,
        missing=extension.why_no_native,
        dtypes=frozenset((*DTYPE_CODES, torch.float64)),
    ),
    triton=Implementation(
        deferred("dove_fast.ops.group_norm_silu.triton_kernel", "group_norm_silu_backward"),
        missing=why_no_triton,
        dtypes=frozenset((*TRITON_TYPES, torch.float64)),
    ),
    reference=Implementation(reference.group_norm_silu_backward),
)
