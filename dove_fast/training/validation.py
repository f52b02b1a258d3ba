"""Losses and lengths on pictures that are not trained on, and signs that the lengths went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dove_fast.losses import region_mse
from dove_fast.models.dove import DOVE
from dove_fast.training.batches import TrainingBatch

__all__ = ["Validation", "length_warning", "spread", "validate"]

# Share of the images from which on all of them are taken to have the same length.
COLLAPSED = 0.99


@dataclass(frozen=True, eq=False)
class Validation:
    """mse: (n,) each picture's error, in its region for Q-DOVE. lengths: (n,) int64 tokens, None for a VQGAN alone.

    images, reconstructions: (k, 3, S, S) the first pictures, in [0, 1].
    """

    mse: Tensor
    lengths: Tensor | None
    images: Tensor
    reconstructions: Tensor

    @property
    def psnr(self) -> float:
        """The mean over the pictures of the peak signal-to-noise ratio, in dB."""
        return float((-10 * self.mse.clamp(min=1e-12).log10()).mean())


@torch.no_grad()
def validate(model: DOVE, batches: Iterable[TrainingBatch], *, stage: str, show: int) -> Validation:
    """Reconstruct every batch, clamped to [0, 1] as people see it, and keep the first `show` pictures.

    stage: as in `RunConfig`.
    """
    errors: list[Tensor] = []
    lengths: list[Tensor] = []
    shown: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        images = batch.images.to(model.device)
        if stage == "vqgan":
            features = model.encode(images)
            side = model.config.grid_size
            found = model.render(features.transpose(1, 2).unflatten(2, (side, side)))
        else:
            found, tokens = model.reconstruct(images, list(batch.queries))
            lengths.append(tokens.lengths.cpu())
        found, images = found.float().clamp(0, 1), images.float() / 255
        mask = None if batch.mask is None else batch.mask.to(model.device)
        errors.append(region_mse(images, found, mask)[0].cpu())
        if sum(len(pair[0]) for pair in shown) < show:
            shown.append((images.cpu(), found.cpu()))
    return Validation(
        torch.cat(errors),
        torch.cat(lengths) if lengths else None,
        torch.cat([pair[0] for pair in shown])[:show],
        torch.cat([pair[1] for pair in shown])[:show],
    )


def length_warning(lengths: Tensor, most: int, *, ramp_over: bool) -> str | None:
    """Say what is wrong with lengths (n,), or None: nearly all of them 1, or, once lambda has grown, all of them T."""
    shortest, longest = (float((lengths == value).float().mean()) for value in (1, most))
    if shortest >= COLLAPSED and most > 1:
        return (
            f"{shortest:.0%} of the pictures get one token: the length loss outweighs the reconstruction; lower [loss] "
            f"eos_weight_end, or let it grow over more steps"
        )
    if ramp_over and longest >= COLLAPSED:
        return (
            f"{longest:.0%} of the pictures get all {most} tokens although lambda has grown: raise [loss] "
            f"eos_weight_end, or train on; with every picture at the same error there is nothing to tell apart"
        )
    return None


def spread(lengths: Tensor) -> dict[str, float]:
    """Return the mean and quartiles of lengths (n,), for a log."""
    values = lengths.float()
    quartiles = values.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist() if len(values) else [math.nan] * 5
    names = ("length_min", "length_q1", "length_median", "length_q3", "length_max")
    return {"length_mean": float(values.mean()), **dict(zip(names, quartiles, strict=True))}
