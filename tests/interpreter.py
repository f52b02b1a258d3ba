"""What Triton's interpreter gets wrong, so that tests pass it by in view."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def skip_wrong_arithmetic(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skip where Triton's interpreter would compute in bf16: its products and casts are wrong, silently."""
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes wrongly in bf16; a GPU runs this")


def uniform_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum every element of `tl.dot` in one order, column after column, as tensor cores do.

    NumPy's matrix product sums the elements at a matrix's edge in another order than those inside, so that equal
    columns give unequal results.
    """
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        total = d.data.copy()
        for column in range(a.data.shape[-1]):
            total += a.data[:, column, None].astype(total.dtype) * b.data[None, column].astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def silent_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let floats overflow and become NaN without NumPy's warnings while a kernel runs, as they do on a GPU.

    Kernels are meant to meet such numbers, and what comes of them is tested.
    """
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def run_in_silence(self: Any, *args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return run(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_in_silence)
