"""What Triton's interpreter gets wrong, so that tests pass it by in view."""

from __future__ import annotations

import pytest
import torch


def skip_wrong_arithmetic(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skip where Triton's interpreter would compute in bf16: its products and casts are wrong, silently."""
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes wrongly in bf16; a GPU runs this")
