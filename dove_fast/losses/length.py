"""The loss that decides how many tokens an image gets, and the threshold that it compares with.

Shape suffixes: B images, T steps.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["RunningThreshold", "eos_loss"]


def eos_loss(eos_logits: Tensor, lengths: Tensor, errors: Tensor, threshold: float | None) -> Tensor:
    """Return the length loss of each image, (B,) in the logits' dtype but fp32 at least.

    eos_logits: (B, T) floating; what lies behind an image's last token may be anything, NaN included, and gets no
    gradient. lengths: (B,) integers, each image's number of tokens m from 1 to T. errors: (B,) floating, each image's
    mean squared error. threshold: `RunningThreshold.value`; errors and threshold are constants to the gradient.

    With p_i the EOS probability of step i: an image whose error is below the threshold is good enough and is to get
    fewer tokens, mean over i < m - 1 of -log p_i (0 for m = 1); another one is to get more, -log(1 - p_{m-1}) (0 for
    m = T, and for an error that is NaN). 0 for all where the threshold is None, before there was a step. Computed from
    the logits, as softplus: finite for every finite logit, however close to 0 or 1 the probability is.

    Raises `TypeError` for wrong dtypes, `ValueError` for wrong shapes or devices, and on a CPU for lengths outside 1
    to T.
    Source: METHOD section 4.
    """
    _check(eos_logits, lengths, errors)
    logits = eos_logits.to(torch.promote_types(eos_logits.dtype, torch.float32))
    # With a graph, as data parallelism waits for the gradient of every parameter in every step.
    zero = torch.where(torch.zeros_like(logits, dtype=torch.bool), logits, 0.0).sum(dim=1)
    if threshold is None:
        return zero
    last = lengths.long() - 1
    steps = torch.arange(logits.shape[1], device=logits.device)
    # -log p = softplus(-logit), -log(1 - p) = softplus(logit). Masked before and not behind: 0 times NaN is NaN.
    before_eos = steps < last[:, None]
    # logsigmoid is exact in fp64, where torch's softplus gives up at 20.
    fewer = -F.logsigmoid(torch.where(before_eos, logits, torch.inf)).sum(dim=1) / last.clamp(min=1)
    more = -F.logsigmoid(-logits.gather(1, last[:, None]).squeeze(1))
    errors = errors.detach().to(logits.dtype)
    is_full = last == logits.shape[1] - 1
    return zero + torch.where(errors < threshold, fewer, torch.where(is_full | errors.isnan(), 0.0, more))


def _check(eos_logits: Tensor, lengths: Tensor, errors: Tensor) -> None:
    for name, tensor in (("eos_logits", eos_logits), ("lengths", lengths), ("errors", errors)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not eos_logits.is_floating_point() or not errors.is_floating_point():
        raise TypeError(f"eos_logits and errors must be floating, got {eos_logits.dtype} and {errors.dtype}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if eos_logits.dim() != 2 or eos_logits.shape[1] < 1:
        raise ValueError(f"eos_logits must have shape (B, T), got {tuple(eos_logits.shape)}")
    for name, tensor in (("lengths", lengths), ("errors", errors)):
        if tensor.device != eos_logits.device:
            raise ValueError(f"{name} must be on {eos_logits.device} like eos_logits, got {tensor.device}")
        if tensor.shape != eos_logits.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(eos_logits)},), got {tuple(tensor.shape)}")
    if lengths.device.type == "cpu" and lengths.numel():
        least, most = int(lengths.min()), int(lengths.max())
        if least < 1 or most > eos_logits.shape[1]:
            raise ValueError(f"lengths must be from 1 to {eos_logits.shape[1]}, got {least} to {most}")


class RunningThreshold:
    """The mean of the last `window` steps' reconstruction errors: what an image's error is compared with (tau).

    `value` is None before the first `update`. A step compares with the steps before it and is added behind it; under
    data parallelism every rank has to add the same number, the step's mean over all ranks.
    Source: METHOD section 4; paper section 3.
    """

    def __init__(self, window: int = 100) -> None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise TypeError(f"window must be an int, got {window!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self._errors: deque[float] = deque(maxlen=window)

    @property
    def window(self) -> int:
        """How many steps count."""
        return self._errors.maxlen or 0

    @property
    def value(self) -> float | None:
        """The mean of the kept errors, None where there is none."""
        return math.fsum(self._errors) / len(self._errors) if self._errors else None

    def update(self, value: float | Tensor) -> None:
        """Add a step's mean error. Raises `ValueError` for one that is not finite: a step to be skipped."""
        error = float(value)
        if not math.isfinite(error):
            raise ValueError(f"an error must be finite, got {error}")
        self._errors.append(error)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes; JSON can hold it."""
        return {"window": self.window, "errors": list(self._errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with its window."""
        loaded = RunningThreshold(state["window"])
        for error in state["errors"]:
            loaded.update(error)
        self._errors = loaded._errors
