"""layer_norm_pair: the residual sum of a parallel-residual layer, and the two LayerNorms that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dove_fast import native as extension
from dove_fast.ops import registry
from dove_fast.ops.arguments import DTYPE_CODES, check_dtype, check_number, check_parameter, check_tensor, dtype_name
from dove_fast.ops.launch import TRITON_TYPES, deferred, why_no_triton
from dove_fast.ops.layer_norm_pair import native, reference
from dove_fast.ops.registry import Implementation

__all__ = ["layer_norm_pair"]


def layer_norm_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    addends: Sequence[Tensor] = (),
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add up to two terms to x and take two LayerNorms of the sum, over its last dimension, in one pass.

    x: (..., d) float64, float32, bfloat16 or float16, any strides, d at least 1; addends: none, one or two tensors of
    x's shape and dtype; weight1, bias1, weight2, bias2: (d,) in x's dtype or float32. weight2 and bias2 are both None
    for a single norm. All on one device.
    Returns (total, y1, y2) like x: total = (addends[0] + addends[1]) + x, in this order, or x itself where there are no
    addends; y1 and y2 its norms, y2 None for a single one. Of a 16-bit dtype the sum is taken in fp32 and rounded once,
    and the norms read it rounded: they are those of the total that is returned, bit for bit. Mean and variance (biased,
    `eps` added) are in fp32 or better, the variance from differences to the mean, so that a mean far from 0 costs no
    precision. A row depends on nothing but itself; NaN or infinity in it makes its norms NaN.
    Bytes, with R and W one read and one write of x's size: a layer's sum of three terms takes 4 R + 2 W and two norms
    2 R + 2 W, together 6 R + 4 W; this takes 3 R + 3 W. The MLP's bias and GELU are not joined with anything: the bias
    is in its matrix product's epilogue already, and GELU alone is one pass, which only a fused matrix product saves.
    Everything but eps has gradients.
    backend: None, "auto", "reference", "cpu" or "triton" (float64 always goes to the reference).
    Raises `TypeError` for another type or dtype, `ValueError` for shapes that do not fit, more than two addends, one of
    weight2 and bias2 alone or tensors on different devices, `BackendError` where the backend cannot run.
    Source: METHOD section 2, GPT-NeoX with its parallel residual; Ba, Kiros, Hinton, Layer Normalization
    (arXiv 1607.06450).
    """
    if not isinstance(addends, Sequence):
        raise TypeError(f"addends must be a sequence of at most two tensors, got {type(addends).__name__}")
    addends = tuple(addends)
    _check(x, weight1, bias1, weight2, bias2, addends)
    check_number("eps", eps)
    registry.check_backend("layer_norm_pair", backend)
    y1: Tensor
    y2: Tensor
    total: Tensor
    if addends:
        total, y1, y2, _, _ = torch.ops.dove_fast.add_layer_norm_pair(
            x, addends[0], addends[1] if len(addends) == 2 else None, weight1, bias1, weight2, bias2, eps, backend
        )
    else:
        total = x
        y1, y2, _, _ = torch.ops.dove_fast.layer_norm_pair(x, weight1, bias1, weight2, bias2, eps, backend)
    return total, y1, None if weight2 is None else y2


def _check(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    addends: tuple[Tensor, ...],
) -> None:
    parameters = {"weight1": weight1, "bias1": bias1}
    if weight2 is not None or bias2 is not None:
        if weight2 is None or bias2 is None:
            alone = "weight2" if bias2 is None else "bias2"
            raise ValueError(f"a second norm is weight2 and bias2 together, got {alone} alone")
        parameters |= {"weight2": weight2, "bias2": bias2}
    terms = {f"addends[{index}]": addend for index, addend in enumerate(addends)}
    for name, tensor in {"x": x, **parameters, **terms}.items():
        check_tensor(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    check_dtype("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., d) with d at least 1, got {tuple(x.shape)}")
    for name, tensor in parameters.items():
        check_parameter(name, tensor, "x", x.dtype)
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},), got {tuple(tensor.shape)}")
    if len(addends) > 2:
        raise ValueError(f"addends must be at most two tensors, got {len(addends)}")
    for name, tensor in terms.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {dtype_name(x.dtype)} like x, got {dtype_name(tensor.dtype)}")
        if tensor.shape != x.shape:
            raise ValueError(f"{name} must have shape {tuple(x.shape)} like x, got {tuple(tensor.shape)}")


# Two ops, as an op may not return its input: total is x where nothing is added. y2 is empty for a single norm. mean and
# rstd (...) are what the backward keeps.
_PARAMETERS = "Tensor weight1, Tensor bias1, Tensor? weight2, Tensor? bias2, float eps, str? backend=None"
_NORMS = "Tensor y1, Tensor y2, Tensor mean, Tensor rstd"
_LIBRARY = torch.library.Library("dove_fast", "FRAGMENT")
_LIBRARY.define(f"layer_norm_pair(Tensor x, {_PARAMETERS}) -> ({_NORMS})")
_LIBRARY.define(
    f"add_layer_norm_pair(Tensor x, Tensor addend1, Tensor? addend2, {_PARAMETERS}) -> (Tensor total, {_NORMS})"
)


def _layer_norm_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = registry.implementation("layer_norm_pair", backend, x)
    _, *norms = run(x, (), weight1, bias1, weight2, bias2, eps)
    y1, y2, mean, rstd = norms
    return y1, y2, mean, rstd


def _add_layer_norm_pair(
    x: Tensor,
    addend1: Tensor,
    addend2: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = registry.implementation("layer_norm_pair", backend, x)
    addends = (addend1,) if addend2 is None else (addend1, addend2)
    total, y1, y2, mean, rstd = run(x, addends, weight1, bias1, weight2, bias2, eps)
    return total, y1, y2, mean, rstd


_LIBRARY.impl("layer_norm_pair", _layer_norm_pair, "CompositeExplicitAutograd")
_LIBRARY.impl("add_layer_norm_pair", _add_layer_norm_pair, "CompositeExplicitAutograd")


@torch.library.register_fake("dove_fast::layer_norm_pair", lib=_LIBRARY)
def _fake(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty((0,) if weight2 is None else x.shape),
        x.new_empty(x.shape[:-1], dtype=statistics),
        x.new_empty(x.shape[:-1], dtype=statistics),
    )


@torch.library.register_fake("dove_fast::add_layer_norm_pair", lib=_LIBRARY)
def _fake_add(x: Tensor, addend1: Tensor, addend2: Tensor | None, *parameters: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_fake(x, *parameters)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight1, bias1, weight2, bias2, _, _ = inputs
    _keep(ctx, x, (weight1, bias1, weight2, bias2), output)


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, weight1, bias1, weight2, bias2, _, _ = inputs
    total, *norms = output
    _keep(ctx, total, (weight1, bias1, weight2, bias2), tuple(norms))


def _keep(ctx: Any, total: Tensor, parameters: tuple[Tensor | None, ...], norms: tuple[Tensor, ...]) -> None:
    _, y2, mean, rstd = norms
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, *((y2,) if parameters[2] is None else ()))
    ctx.save_for_backward(total, mean, rstd, *parameters)


def _norms_backward(
    ctx: Any, needed: Sequence[bool], grad1: Tensor | None, grad2: Tensor | None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return what the total and weight1, bias1, weight2, bias2 get from y1 and y2; `needed` of the five says which."""
    total, mean, rstd, *parameters = ctx.saved_tensors
    # aten takes the total and the parameters in the statistics' dtype alone, on some devices.
    rows = total.to(mean.dtype)
    grad_rows: Tensor | None = None
    grads: list[Tensor | None] = []
    for index, grad in enumerate((grad1, grad2)):
        weight, bias = parameters[2 * index : 2 * index + 2]
        if grad is None:
            grads += [None, None]
            continue
        of_rows, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            grad.to(mean.dtype),
            rows,
            rows.shape[-1:],
            mean[..., None],
            rstd[..., None],
            weight.to(mean.dtype),
            bias.to(mean.dtype),
            [needed[0], needed[1 + 2 * index], needed[2 + 2 * index]],
        )
        if needed[0]:
            grad_rows = of_rows if grad_rows is None else grad_rows + of_rows
        grads.append(of_weight.to(weight.dtype) if needed[1 + 2 * index] else None)
        grads.append(of_bias.to(bias.dtype) if needed[2 + 2 * index] else None)
    return grad_rows, grads


def _backward(ctx: Any, grad1: Tensor | None, grad2: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_rows, grads = _norms_backward(ctx, ctx.needs_input_grad[:5], grad1, grad2)
    grad_x = None if grad_rows is None else grad_rows.to(ctx.saved_tensors[0].dtype)
    return grad_x, *grads, None, None


def _backward_add(
    ctx: Any, grad_total: Tensor | None, grad1: Tensor | None, grad2: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    terms = ctx.needs_input_grad[:3]
    grad_rows, grads = _norms_backward(ctx, (any(terms), *ctx.needs_input_grad[3:7]), grad1, grad2)
    if grad_rows is not None:
        dtype = ctx.saved_tensors[0].dtype
        grad_total = (grad_rows if grad_total is None else grad_rows + grad_total).to(dtype)
    return *(grad_total if needed else None for needed in terms), *grads, None, None


torch.library.register_autograd("dove_fast::layer_norm_pair", _backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("dove_fast::add_layer_norm_pair", _backward_add, setup_context=_save_add, lib=_LIBRARY)

registry.register(
    "layer_norm_pair",
    cpu=Implementation(
        native.layer_norm_pair_cpu,
        missing=extension.why_no_native,
        dtypes=frozenset((*DTYPE_CODES, torch.float64)),
    ),
    triton=Implementation(
        deferred("dove_fast.ops.layer_norm_pair.triton_kernel", "layer_norm_pair"),
        missing=why_no_triton,
        dtypes=frozenset((*TRITON_TYPES, torch.float64)),
    ),
    reference=Implementation(reference.layer_norm_pair),
)
