"""The optimiser, the averaged weights, and codewords that nothing uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dove_fast.training.config import OptimizerConfig
from dove_fast.training.distributed import is_distributed

__all__ = ["CodebookUse", "average_into", "make_optimizer"]

# Rows of these are codewords and word vectors, which weight decay would draw to 0 whether they are used or not.
EMBEDDINGS = ("quantize.embedding.weight", "embed_in.weight")


def make_optimizer(
    parameters: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig, learning_rate: float
) -> torch.optim.AdamW:
    """Return AdamW with fused kernels; weight decay for matrices and kernels alone.

    Raises `ValueError` if nothing is trained.
    """
    if not parameters:
        raise ValueError("no parameter is trained")
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        (decayed if parameter.dim() > 1 and not name.endswith(EMBEDDINGS) else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


@torch.no_grad()
def average_into(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's by 1 - decay, and by more in the first steps.

    The decay is at most (1 + step) / (10 + step), so that the random start is soon forgotten.
    Weights that are not trained are the same in both and stay.
    """
    pairs = [
        (mean, value)
        for mean, value in zip(averaged.parameters(), model.parameters(), strict=True)
        if value.requires_grad
    ]
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([mean for mean, _ in pairs], [value.detach() for _, value in pairs], share)


class CodebookUse:
    """Counts which codewords features came to, and sets the others to features of the batch, every so many steps.

    A codebook starts far from the features (`VectorQuantizer`), and what is never the nearest gets no gradient.
    Source: random restarts, Dhariwal et al., Jukebox (arXiv 2005.00341, appendix B).
    """

    def __init__(self, codebook: Tensor, every: int) -> None:
        self.codebook, self.every = codebook, every
        self.counts = torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device)

    def count(self, codes: Tensor) -> None:
        """Add a batch's codes (B, h, w), all processes' together; every one calls it."""
        found = torch.zeros_like(self.counts)
        flat = codes.flatten()
        found.scatter_add_(0, flat, torch.ones_like(flat))
        if is_distributed():
            dist.all_reduce(found)
        self.counts += found

    @torch.no_grad()
    def restart(
        self, step: int, grid: Tensor, optimizer: torch.optim.Optimizer, copies: Iterable[Tensor] = ()
    ) -> int | None:
        """After optimiser step `step`, counted from 0: set unused codewords to features of grid (B, C, h, w).

        `copies` of the codebook, averaged ones, are set too, and the optimiser forgets its moments. Returns how many
        codewords were in use, None where this step restarts none. Which of the features of all processes are taken
        follows from the step.
        """
        if self.every == 0 or (step + 1) % self.every:
            return None
        features = grid.movedim(1, -1).reshape(-1, grid.shape[1]).to(self.codebook.dtype).contiguous()
        if is_distributed():
            shares = [torch.empty_like(features) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, features)
            features = torch.cat(shares)
        unused = (self.counts == 0).nonzero().squeeze(1)
        # On the CPU: the same draw on every device.
        random = torch.Generator().manual_seed(step)
        chosen = torch.randperm(len(features), generator=random)[: len(unused)].to(features.device)
        unused = unused[: len(chosen)]
        for table in (self.codebook, *copies):
            table[unused] = features[chosen]
        for moment in optimizer.state[self.codebook].values():
            if moment.shape == self.codebook.shape:
                moment[unused] = 0
        used = int((self.counts > 0).sum())
        self.counts.zero_()
        return used
