"""The one table of tolerances. A test is never loosened elsewhere.

"Relative" is ||a - b|| / ||b|| over the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Two orders of summation differ by about sqrt(n) eps a reduction; over the few dozen reductions (n <= 7000) of the
# deepest path that is some 1e-6 in fp32. 1e-5 is the project's promise. In bf16 every intermediate result is rounded
# to 8 bits, 2^-9 relative each, and about 50 of them add up as a random walk: 50^0.5 2^-9 = 1.4e-2; fp16 has three
# bits more.
RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

# Another library's fp64 model with fp32 parts: transformers' eager attention takes its softmax in fp32, 2^-24 = 6e-8
# relative for each probability, which six layers can add up to a few 1e-7.
FP32_SOFTMAX_IN_FP64 = 1e-6

# An image whose EOS logit passes this close to the threshold's may get another length by rounding (fp32).
EOS_LOGIT_MARGIN = 1e-4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||, in fp64; 0 for two empty tensors."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).norm()
    scale = expected.double().norm()
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / scale)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Assert that the relative error is within `tolerance`, by default that of the coarser dtype of the two."""
    if tolerance is None:
        tolerance = max(RELATIVE[actual.dtype], RELATIVE[expected.dtype])
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e} exceeds {tolerance:.0e}"
