"""vq_lookup: the nearest codeword of each feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dove_fast import native as extension
from dove_fast.ops import registry
from dove_fast.ops.arguments import DTYPE_CODES, check_dtype, check_tensor, dtype_name
from dove_fast.ops.launch import TRITON_TYPES, deferred, why_no_triton
from dove_fast.ops.registry import Implementation
from dove_fast.ops.vq_lookup import native, reference

__all__ = ["codebook_squares", "vq_lookup"]


def vq_lookup(
    x: Tensor, codebook: Tensor, *, codebook_sq: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Replace each feature by its nearest codeword (Euclidean distance, the lowest index among equals).

    x: (..., C) and codebook: (K, C), each float64, float32, bfloat16 or float16, on one device;
    codebook_sq: (K,) float32 or float64, what `codebook_squares` returns, for a caller that keeps it; computed where
    None. It must be the same for identical codewords, which `codebook.square().sum(1)` does not promise.
    Returns codes (...) int64, and quantized (..., C), the codewords in x's dtype. Sums are in fp32 or better; a row of
    x with NaN or infinity gets code 0. "reference" decides near ties in fp64; the others never hold an (n, K)
    matrix and give the fp64 argmin wherever the runner-up is further away than fp32 rounding (and, next to much longer
    codewords, underflow), else one within that (each kernel's file derives its bound).
    Backward: quantized's gradient goes to x unchanged (straight through), and to the chosen codewords where the
    codebook requires it; codes and codebook_sq have none.
    backend: None, "auto", "reference", "cpu", "triton" or "cuda" (fp64 inputs always go to the reference).
    Raises `TypeError` for another type or dtype, `ValueError` for shapes that do not fit or tensors on different
    devices, `BackendError` where the backend cannot run. Source: METHOD section 3, the grid goes through the codebook.
    """
    _check(x, codebook, codebook_sq)
    registry.check_backend("vq_lookup", backend)
    quantized, codes = torch.ops.dove_fast.vq_lookup(x, codebook, codebook_sq, backend)
    return codes, quantized


def codebook_squares(codebook: Tensor) -> Tensor:
    """Sum the squares of each codeword, in one order for all of them: identical codewords have the same sum.

    codebook: (K, C), float64, float32, bfloat16 or float16, K and C at least 1. Returns (K,) |c|^2 on its device,
    float32 (float64 for a float64 codebook): what `vq_lookup` takes as `codebook_sq`.
    Raises `TypeError` for another type or dtype, `ValueError` for another shape.
    """
    _check_codebook(codebook)
    return reference.codebook_squares(codebook)


def _check_codebook(codebook: Tensor) -> None:
    check_tensor("codebook", codebook)
    check_dtype("codebook", codebook)
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook must have shape (K, C) with K and C at least 1, got {tuple(codebook.shape)}")


def _check(x: Tensor, codebook: Tensor, codebook_sq: Tensor | None) -> None:
    check_tensor("x", x)
    check_dtype("x", x)
    _check_codebook(codebook)
    if x.dim() < 1 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(f"x must have shape (..., {codebook.shape[1]}) like the codebook, got {tuple(x.shape)}")
    if codebook.device != x.device:
        raise ValueError(f"codebook must be on {x.device} like x, got {codebook.device}")
    if codebook_sq is None:
        return
    check_tensor("codebook_sq", codebook_sq)
    if codebook_sq.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"codebook_sq must be float32 or float64, got {dtype_name(codebook_sq.dtype)}")
    if codebook_sq.shape != codebook.shape[:1]:
        raise ValueError(f"codebook_sq must have shape ({codebook.shape[0]},), got {tuple(codebook_sq.shape)}")
    if codebook_sq.device != x.device:
        raise ValueError(f"codebook_sq must be on {x.device} like x, got {codebook_sq.device}")


# quantized comes first here: opcheck adds the outputs up, in the first one's dtype.
_LIBRARY = torch.library.Library("dove_fast", "FRAGMENT")
_LIBRARY.define(
    "vq_lookup(Tensor x, Tensor codebook, Tensor? codebook_sq=None, str? backend=None)"
    " -> (Tensor quantized, Tensor codes)"
)


def _vq_lookup(
    x: Tensor, codebook: Tensor, codebook_sq: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    codes, quantized = registry.implementation("vq_lookup", backend, x)(x, codebook, codebook_sq)
    return quantized, codes


_LIBRARY.impl("vq_lookup", _vq_lookup, "CompositeExplicitAutograd")


@torch.library.register_fake("dove_fast::vq_lookup", lib=_LIBRARY)
def _fake(
    x: Tensor, codebook: Tensor, codebook_sq: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, codebook, _, _ = inputs
    _, codes = output
    ctx.mark_non_differentiable(codes)
    ctx.save_for_backward(codes)
    ctx.codebook_shape, ctx.codebook_dtype = codebook.shape, codebook.dtype


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        wide = torch.promote_types(torch.promote_types(grad.dtype, ctx.codebook_dtype), torch.float32)
        zeros = torch.zeros(ctx.codebook_shape, dtype=wide, device=grad.device)
        rows = grad.reshape(-1, grad.shape[-1]).to(wide)
        grad_codebook = zeros.index_add(0, codes.reshape(-1), rows).to(ctx.codebook_dtype)
    return grad if ctx.needs_input_grad[0] else None, grad_codebook, None, None


torch.library.register_autograd("dove_fast::vq_lookup", _backward, setup_context=_save, lib=_LIBRARY)

registry.register(
    "vq_lookup",
    cpu=Implementation(
        native.vq_lookup_cpu, missing=extension.why_no_native, dtypes=frozenset((*DTYPE_CODES, torch.float64))
    ),
    triton=Implementation(
        deferred("dove_fast.ops.vq_lookup.triton_kernel", "vq_lookup"),
        missing=why_no_triton,
        dtypes=frozenset((*TRITON_TYPES, torch.float64)),
    ),
    # Behind Triton until both have been timed on a GPU.
    cuda=Implementation(
        native.vq_lookup_cuda, missing=extension.why_no_cuda, dtypes=frozenset((*DTYPE_CODES, torch.float64))
    ),
    reference=Implementation(reference.vq_lookup),
)
