"""What the ranks of data-parallel training share beside the gradients that DDP averages."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dove_fast.errors import BackendError

__all__ = [
    "Ranks",
    "any_over_ranks",
    "average_gradients",
    "is_distributed",
    "mean_over_ranks",
    "process_group",
    "sum_over_ranks",
]


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all of them do."""
        return self.rank == 0

    def alone(self) -> Ranks:
        """Return this process without the others."""
        return Ranks(0, 1, self.device)


def is_distributed() -> bool:
    """Tell whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(device: str | None = None) -> Iterator[Ranks]:
    """Join the group that `torchrun` started, or be alone, until the block ends.

    device: "cpu" or "cuda", None for a GPU where there is one; every process takes the GPU of its local rank. Raises
    `BackendError` for one that is not here.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if kind == "cuda" and local >= count:
        raise BackendError(f"device cuda:{local} is not here: torch sees {count} CUDA devices; use --device cpu")
    here = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, here)
        return
    if kind == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), here)
    finally:
        dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> float:
    """Return the mean of all ranks' values (n,) that are not NaN, however many each has, or of this process's alone.

    For `RunningThreshold.update`, whose threshold has to be the same on all ranks: every rank calls it, once a step.
    NaN where there are no values at all. Source: METHOD section 4.
    """
    wide = values.detach().double()
    both = torch.stack([wide.nansum(), (~wide.isnan()).sum().double()])
    if is_distributed():
        dist.all_reduce(both)
    total, count = both.tolist()
    return total / count if count else float("nan")


def any_over_ranks(flag: bool, device: torch.device) -> bool:
    """Tell whether any rank's flag is set, alike on all ranks; every rank calls it."""
    if not is_distributed():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def sum_over_ranks(counts: Counter[str]) -> Counter[str]:
    """Return the sum of all ranks' counts; every rank calls it."""
    if not is_distributed():
        return counts
    shares: list[Counter[str]] = [Counter() for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, counts)
    return sum(shares, Counter())


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over the ranks, in one message: for what is too small to be worth DDP."""
    if not is_distributed():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
