"""vq_lookup in the native module: fused, in fp32.

`csrc/cpu/vq_lookup.cpp` and `csrc/cuda/vq_lookup.cu` derive how far from fp64 they can be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast import native
from dove_fast.ops.arguments import DTYPE_CODES, as_float32, as_rows
from dove_fast.ops.vq_lookup import reference
from dove_fast.ops.vq_lookup.ranges import range_size


def vq_lookup_cpu(
    x: Tensor, codebook: Tensor, codebook_sq: Tensor | None = None, *, _isa: str = ""
) -> tuple[Tensor, Tensor]:
    """As `reference.vq_lookup`, for CPU tensors. `_isa` names the instruction set, for tests; "" is the best one.

    fp64 inputs go to the reference, as do the rows whose fp32 scores could overflow.
    """
    if torch.float64 in (x.dtype, codebook.dtype):
        return reference.vq_lookup(x, codebook, codebook_sq)
    rows, words, squares = _inputs(x, codebook, codebook_sq)
    codes = torch.empty(x.shape[:-1], dtype=torch.int64)
    quantized = torch.empty(x.shape, dtype=x.dtype)
    num_undecided = native.load().vq_lookup_cpu(
        rows.data_ptr(),
        rows.stride(0),
        words.data_ptr(),
        squares.data_ptr(),
        codes.data_ptr(),
        quantized.data_ptr(),
        rows.shape[0],
        *words.shape,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        _isa,
    )
    if num_undecided:
        undecided = codes < 0
        codes[undecided], quantized[undecided] = reference.vq_lookup(x[undecided], codebook, codebook_sq)
    return codes, quantized


def _inputs(x: Tensor, codebook: Tensor, codebook_sq: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (n, C) with adjacent elements, codewords (K, C) and their norms (K,), contiguous and in fp32."""
    words = as_float32(codebook)
    squares = reference.codebook_squares(words) if codebook_sq is None else codebook_sq
    return as_rows(x), words, as_float32(squares)


def vq_lookup_cuda(x: Tensor, codebook: Tensor, codebook_sq: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.vq_lookup`, for CUDA tensors; fp64 inputs go there. Nothing is read by the host."""
    if torch.float64 in (x.dtype, codebook.dtype):
        return reference.vq_lookup(x, codebook, codebook_sq)
    rows, words, squares = _inputs(x, codebook, codebook_sq)
    codes = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    module = native.load()
    blocks = max(1, -(-rows.shape[0] // module.vq_lookup_rows_a_block))
    ranges = -(-words.shape[0] // range_size(blocks, words.shape[0], module.vq_lookup_words_a_tile, x.device))
    scratch = torch.empty(module.vq_lookup_scratch_bytes(rows.shape[0], ranges), dtype=torch.uint8, device=x.device)
    module.vq_lookup_cuda(
        rows.data_ptr(),
        rows.stride(0),
        words.data_ptr(),
        squares.data_ptr(),
        codes.data_ptr(),
        quantized.data_ptr(),
        rows.shape[0],
        *words.shape,
        DTYPE_CODES[x.dtype],
        codebook.dtype == torch.float32,
        ranges,
        scratch.data_ptr(),
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return codes, quantized
