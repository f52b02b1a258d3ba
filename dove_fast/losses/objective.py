"""The whole losses of DOVE and Q-DOVE: reconstruction, regions, and length.

Shape suffixes: B images of H x W pixels, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dove_fast.losses.config import LossConfig
from dove_fast.losses.discriminator import hinge_loss
from dove_fast.losses.length import RunningThreshold, eos_loss
from dove_fast.losses.region import region_mean, region_mse

__all__ = ["DOVELoss", "LossTerms", "QDOVELoss"]

# taming-transformers' bounds of the adaptive factor.
ADAPTIVE_EPS, ADAPTIVE_MOST = 1e-4, 1e4


@dataclass(frozen=True)
class LossTerms:
    """A step's loss and what it is made of; everything but `total` is detached.

    total: () what is minimised. mse, perceptual, adversarial, eos: () means over the images, not weighed; inside their
    regions for Q-DOVE; mse is NaN without a reconstruction. irrelevant: () the reconstruction loss outside the regions,
    weighed within. codebook, commitment: () `codebook_terms`, 0 where they were not given. features: () the token
    decoder's mean squared error in feature space, inside the regions, not weighed; 0 where it is off. eos_weight:
    lambda.
    errors: (B,) each image's mean squared error inside its region, what the threshold learns from; of the features
    without a reconstruction, which the threshold does not learn from; NaN for a region without a pixel.
    """

    total: Tensor
    mse: Tensor
    perceptual: Tensor
    adversarial: Tensor
    irrelevant: Tensor
    codebook: Tensor
    commitment: Tensor
    features: Tensor
    eos: Tensor
    eos_weight: float
    errors: Tensor


class QDOVELoss(nn.Module):
    """The loss of Q-DOVE: reconstruction inside the region that the text points at, and length.

    config: the weights. perceptual: a module of images (B, 3, H, W), reconstructions -> distances (B, 1, H, W), such as
    `LPIPS`; needed where `config.perceptual_weight` is not 0. discriminator: images -> scores, such as
    `PatchDiscriminator`; needed where `config.adversarial_weight` is not 0. Neither is a parameter of the loss.
    `threshold` is tau, part of the state: call `threshold.update` once a step whose lengths EOS chose, behind the
    optimiser's, with `training.mean_over_ranks(LossTerms.errors)`. The discriminator gets no gradient from
    `LossTerms.total`.
    Source: METHOD section 4.
    """

    def __init__(
        self, config: LossConfig, *, perceptual: nn.Module | None = None, discriminator: nn.Module | None = None
    ) -> None:
        super().__init__()
        for name, needed, part in (
            ("perceptual_weight", "perceptual", perceptual),
            ("adversarial_weight", "discriminator", discriminator),
        ):
            weight = getattr(config, name)
            if weight and part is None:
                raise ValueError(f"LossConfig.{name} is {weight}, which needs `{needed}`; pass one, or a weight of 0")
        self.config = config
        self.threshold = RunningThreshold(config.threshold_window)
        # In a tuple, so that their weights are not this module's: they have checkpoints and optimisers of their own.
        self._parts = (perceptual, discriminator)

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor | None,
        eos_logits: Tensor,
        lengths: Tensor,
        *,
        step: int,
        mask: Tensor | None = None,
        forced: bool = False,
        codebook: tuple[Tensor, Tensor] | None = None,
        features: tuple[Tensor, Tensor] | None = None,
        last_layer: Tensor | None = None,
    ) -> LossTerms:
        """Return the loss of a batch.

        images, reconstruction: (B, 3, H, W) in [0, 1], the second with a graph, or None where lengths are forced and
        features are all that is compared: pixels are then not made. eos_logits (B, T), lengths (B,): as in
        `eos_loss`. step: optimiser steps before this one. mask: (B, 1, H, W) bool, the regions; None where there is
        no text: the whole image. forced: the lengths were given and not found, so they teach EOS nothing.
        codebook: what `codebook_terms` returns, needed where their weights are not 0. features: the VQGAN's features
        and those that the token decoder makes, (B, C, h, w) both, h and w divisors of H and W; needed where
        `config.feature_weight` is not 0. A feature counts by the share of its pixels that the region has; the
        VQGAN's get no gradient.
        last_layer: the weight that the adaptive factor is measured at, needed where `config.adaptive_adversarial`.
        """
        config = self.config
        if codebook is None and (config.codebook_weight or config.commitment_weight):
            raise ValueError("LossConfig.codebook_weight or commitment_weight is not 0, which needs `codebook`")
        if features is None and config.feature_weight:
            raise ValueError("LossConfig.feature_weight is not 0, which needs `features`")
        if reconstruction is None and (not forced or config.weighs_pixels or not config.feature_weight):
            raise ValueError("reconstruction can be None only where lengths are forced, and features alone are weighed")
        perceptual, discriminator = self._parts
        if reconstruction is None:
            mse = images.new_full((len(images),), float("nan"), dtype=torch.float32)
            relevant = irrelevant = torch.zeros_like(mse)
        else:
            mse, mse_outside = region_mse(images, reconstruction, mask)
            relevant, irrelevant = config.mse_weight * mse, config.mse_weight * mse_outside
        errors = mse
        zero = mse.new_zeros(())
        seen = zero
        if config.perceptual_weight:
            assert perceptual is not None and reconstruction is not None
            inside, outside = region_mean(perceptual(images, reconstruction).to(mse.dtype), mask)
            relevant = relevant + config.perceptual_weight * inside
            irrelevant = irrelevant + config.perceptual_weight * outside
            seen = inside.mean()
        of_features = zero
        if config.feature_weight:
            assert features is not None
            inside, outside = region_mean(_feature_errors(*features, images.shape[2:]), mask)
            relevant = relevant + config.feature_weight * inside
            irrelevant = irrelevant + config.feature_weight * outside
            of_features = inside.mean()
            errors = inside if reconstruction is None else mse
        fooled = zero
        total = relevant.mean()
        if config.adversarial_weight and step >= config.adversarial_start:
            assert discriminator is not None and reconstruction is not None
            # Of the whole image, whatever the region.
            fooled = -_judge(discriminator, reconstruction).to(mse.dtype).mean()
            weighed = config.adversarial_weight * fooled
            if config.adaptive_adversarial:
                weighed = _adaptive(total, fooled, last_layer) * weighed
            total = total + weighed
        total = total + config.irrelevant_weight * irrelevant.mean()
        of_codebook, of_commitment = (zero, zero) if codebook is None else codebook
        if codebook is not None:
            total = total + config.codebook_weight * of_codebook + config.commitment_weight * of_commitment
        eos_weight = config.eos_weight(step)
        errors = errors.detach()
        if mask is not None:
            # A region that lost all its pixels is no perfect image: it asks for nothing and teaches tau nothing.
            errors = errors.masked_fill(~mask.flatten(1).any(dim=1), float("nan"))
        eos = eos_loss(eos_logits, lengths, errors, None if forced else self.threshold.value).mean()
        total = total + eos_weight * eos
        return LossTerms(
            total=total,
            mse=mse.mean().detach(),
            perceptual=seen.detach(),
            adversarial=fooled.detach(),
            irrelevant=irrelevant.mean().detach(),
            codebook=of_codebook.detach(),
            commitment=of_commitment.detach(),
            features=of_features.detach(),
            eos=eos.detach(),
            eos_weight=eos_weight,
            errors=errors,
        )

    def discriminator_loss(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Return what the discriminator minimises, (); its images carry no graph."""
        _, discriminator = self._parts
        if discriminator is None:
            raise ValueError("this loss was made without a discriminator")
        return hinge_loss(discriminator(images.detach()), discriminator(reconstruction.detach()))

    def move_to(self, device: torch.device) -> None:
        """Move the networks that the loss calls to a device; `to` leaves them, as they are not its own."""
        for part in self._parts:
            if part is not None:
                part.to(device)

    def get_extra_state(self) -> dict[str, Any]:
        """Return tau's window: `state_dict` holds it."""
        return self.threshold.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with tau's window of a checkpoint."""
        self.threshold.load_state_dict(state)


class DOVELoss(QDOVELoss):
    """The loss of DOVE: `QDOVELoss` without regions, over whole images."""

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor | None,
        eos_logits: Tensor,
        lengths: Tensor,
        *,
        step: int,
        mask: Tensor | None = None,
        forced: bool = False,
        codebook: tuple[Tensor, Tensor] | None = None,
        features: tuple[Tensor, Tensor] | None = None,
        last_layer: Tensor | None = None,
    ) -> LossTerms:
        """Return the loss of a batch; arguments as in `QDOVELoss.forward`, without a mask."""
        if mask is not None:
            raise ValueError("DOVELoss has no regions, got a mask; QDOVELoss takes one")
        return super().forward(
            images,
            reconstruction,
            eos_logits,
            lengths,
            step=step,
            forced=forced,
            codebook=codebook,
            features=features,
            last_layer=last_layer,
        )


def _feature_errors(features: Tensor, made: Tensor, size: torch.Size) -> Tensor:
    """Return the squared errors of features, (B, 1, H, W) in fp32 at least: each one's at all the pixels it covers."""
    if features.shape != made.shape or features.dim() != 4:
        raise ValueError(
            f"features must have one shape (B, C, h, w), got {tuple(features.shape)} and {tuple(made.shape)}"
        )
    repeats = [pixels // cells for pixels, cells in zip(size, features.shape[2:], strict=True)]
    if [count * cells for count, cells in zip(repeats, features.shape[2:], strict=True)] != list(size):
        raise ValueError(
            f"images of {tuple(size)} pixels are not whole multiples of {tuple(features.shape[2:])} features"
        )
    dtype = torch.promote_types(torch.promote_types(features.dtype, made.dtype), torch.float32)
    errors = (made.to(dtype) - features.detach().to(dtype)).square().mean(dim=1, keepdim=True)
    return errors.repeat_interleave(repeats[0], dim=2).repeat_interleave(repeats[1], dim=3)


def _judge(discriminator: nn.Module, images: Tensor) -> Tensor:
    """Return the discriminator's scores, whose gradient goes to the images and not to its parameters."""
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    scores: Tensor = torch.func.functional_call(discriminator, fixed, (images,))
    return scores


def _adaptive(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
    """Return how much larger the reconstruction's gradient is at the last layer than the adversarial one's."""
    if last_layer is None:
        raise ValueError("LossConfig.adaptive_adversarial needs `last_layer`, the weight of the decoder's last layer")
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + ADAPTIVE_EPS)).clamp(0, ADAPTIVE_MOST).detach()
