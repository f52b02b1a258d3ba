"""One forward from a batch to its loss: what data-parallel training wraps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dove_fast.losses import LossTerms, QDOVELoss, codebook_terms
from dove_fast.models.dove import DOVE
from dove_fast.training.forward import training_forward

__all__ = ["Objective", "StepResult", "freeze"]


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a batch came to.

    terms: the losses. reconstruction: (B, 3, S, S), detached; None where no loss reads it and lengths are forced.
    lengths: (B,) int64; 1 for the VQGAN alone, which has none. codes: (B, h, w) int64, where the terms of the codebook
    are weighed. grid: (B, C, h, w), detached, what was quantised. positions: the generator's that were computed with
    gradients, and those of the plain forward.
    """

    terms: LossTerms
    reconstruction: Tensor | None
    lengths: Tensor
    codes: Tensor | None
    grid: Tensor
    positions: tuple[int, int]


class Objective(nn.Module):
    """A model and its loss. stage: "vqgan" reconstructs through the VQGAN alone, "dove" through tokens.

    `recompute` as in `training_forward`. The loss's networks and its threshold are not this module's: they have
    optimisers and checkpoints of their own.
    """

    def __init__(self, model: DOVE, loss: QDOVELoss, *, stage: str = "dove", recompute: bool = False) -> None:
        super().__init__()
        self.model = model
        self.stage, self.recompute = stage, recompute
        self._loss = (loss,)

    @property
    def loss(self) -> QDOVELoss:
        """The loss."""
        return self._loss[0]

    def forward(
        self,
        images: Tensor,
        queries: Sequence[Tensor],
        mask: Tensor | None,
        *,
        step: int,
        lengths: Sequence[int] | None = None,
    ) -> StepResult:
        """Return the loss of a batch, images (B, 3, S, S) uint8; `lengths` forces them."""
        model, config = self.model, self.loss.config
        targets, features = images.to(model.dtype) / 255, None
        reconstruction: Tensor | None
        if self.stage == "vqgan":
            grid = model.encode(images).transpose(1, 2).unflatten(2, (model.config.grid_size, model.config.grid_size))
            reconstruction = model.render(grid)
            counts = torch.ones(len(images), dtype=torch.int64, device=images.device)
            logits = grid.new_zeros((len(images), 1), dtype=torch.float32)
            positions = 0, 0
        else:
            found = training_forward(
                model,
                images,
                queries,
                lengths=lengths,
                recompute=self.recompute,
                reconstruct=self._reconstruct(forced=lengths is not None),
            )
            grid, reconstruction, counts, logits = found.grid, found.reconstruction, found.lengths, found.eos_logits
            positions = found.positions_computed, found.positions_of_all
            features = found.features.transpose(1, 2).unflatten(2, grid.shape[2:]), grid
        codes, terms = None, None
        if config.codebook_weight or config.commitment_weight:
            _, codes = model.vqgan.quantize(grid.detach())
            terms = codebook_terms(grid, codes, model.vqgan.quantize.embedding.weight)
        losses = self.loss(
            targets,
            None if reconstruction is None else reconstruction.float(),
            logits,
            counts,
            step=step,
            mask=mask,
            forced=lengths is not None or self.stage == "vqgan",
            codebook=terms,
            features=features,
            last_layer=model.vqgan.decoder.conv_out.weight if config.adaptive_adversarial else None,
        )
        shown = None if reconstruction is None else reconstruction.detach().float()
        return StepResult(losses, shown, counts, codes, grid.detach(), positions)

    def _reconstruct(self, *, forced: bool) -> Literal["graph", "values", "no"]:
        """Say what is made of the pixels: the threshold reads their error where EOS decides, whatever the loss."""
        if self.loss.config.weighs_pixels:
            return "graph"
        return "no" if forced and self.loss.config.feature_weight else "values"


def freeze(model: DOVE, stage: str, frozen: str, *, codebook: bool, texts: bool) -> list[tuple[str, nn.Parameter]]:
    """Switch off the gradients of what is not trained, and return the names and parameters of what is.

    stage and frozen: as in `RunConfig`. codebook: whether it is trained. texts: whether there are any, for the
    embedding of their ids.
    """
    vqgan = model.vqgan
    model.requires_grad_(stage == "dove")
    vqgan.requires_grad_(stage == "vqgan" or frozen != "vqgan")
    if stage == "dove" and frozen == "encoder":
        vqgan.encoder.requires_grad_(False)
        vqgan.quant_conv.requires_grad_(False)
    vqgan.quantize.requires_grad_(codebook)
    if model.generator.embed_in is not None:
        model.generator.embed_in.requires_grad_(stage == "dove" and texts)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
