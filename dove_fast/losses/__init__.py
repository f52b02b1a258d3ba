"""The losses that DOVE and Q-DOVE are trained with."""

from dove_fast.losses.codebook import codebook_terms
from dove_fast.losses.config import LossConfig
from dove_fast.losses.discriminator import PatchDiscriminator, hinge_loss
from dove_fast.losses.length import RunningThreshold, eos_loss
from dove_fast.losses.objective import DOVELoss, LossTerms, QDOVELoss
from dove_fast.losses.perceptual import LPIPS
from dove_fast.losses.region import region_mean, region_mse

__all__ = [
    "LPIPS",
    "DOVELoss",
    "LossConfig",
    "LossTerms",
    "PatchDiscriminator",
    "QDOVELoss",
    "RunningThreshold",
    "codebook_terms",
    "eos_loss",
    "hinge_loss",
    "region_mean",
    "region_mse",
]
