"""Where an image's tokens end: the EOS rule, in this one place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["eos_lengths"]


def eos_lengths(eos_logits: Tensor, threshold: float) -> Tensor:
    """Return each image's number of tokens (B,) int64, from 1 to T, for the EOS logits (B, T) fp32 of all its steps.

    The first step whose logit exceeds logit(threshold) is EOS, and the state at EOS is kept, so m = i + 1.
    Without EOS, m = T. [reading] METHOD section 3: the figure draws the state at EOS feeding the token decoder;
    to drop it, return `first` instead of `first + 1`.
    """
    num_steps = eos_logits.shape[1]
    stops = eos_logits > math.log(threshold / (1.0 - threshold))
    # argmax of a boolean row is its first True; rows without one end at the last step.
    first = torch.where(stops.any(dim=1), stops.to(torch.uint8).argmax(dim=1), num_steps - 1)
    return first + 1
