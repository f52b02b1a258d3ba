"""What the ranks of data-parallel training share beside gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_over_ranks"]


def mean_over_ranks(values: Tensor) -> float:
    """Return the mean of all ranks' values (n,) that are not NaN, however many each has, or of this process's alone.

    For `RunningThreshold.update`, whose threshold has to be the same on all ranks: every rank calls it, once a step.
    NaN where there are no values at all. Source: METHOD section 4.
    """
    wide = values.detach().double()
    both = torch.stack([wide.nansum(), (~wide.isnan()).sum().double()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(both)
    total, count = both.tolist()
    return total / count if count else float("nan")
