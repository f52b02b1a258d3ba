"""The weights of the losses, each with where its default comes from."""

from __future__ import annotations

from dataclasses import dataclass

from dove_fast.fields import check_fields

__all__ = ["LossConfig"]


@dataclass(frozen=True)
class LossConfig:
    """What each term of the losses weighs, and when. The paper gives the last two values alone.

    Raises `TypeError` or `ValueError` that names the field. Source: METHOD section 4.
    """

    # The pixels' squared error is the unit that the others are weighed against. [reading]
    mse_weight: float = 1.0
    # As VQGANs are trained (Esser et al. 2021, taming-transformers). 0: LPIPS is not needed. [reading]
    perceptual_weight: float = 1.0
    # Small, so that the model does not hallucinate detail; taming-transformers takes 0.8 with an adaptive factor. 0: no
    # discriminator. [reading]
    adversarial_weight: float = 0.1
    # Steps before the adversarial term counts: the discriminator of an untrained model teaches noise. [reading]
    adversarial_start: int = 10_000
    # Scale the adversarial gradient to the reconstruction's at the decoder's last layer (taming-transformers).
    adaptive_adversarial: bool = False
    # The usual terms of a codebook that is trained (van den Oord et al. 2017, with weights of 1 and 0.25); 0: it is
    # frozen, and the straight-through gradient goes to the features alone. [reading]
    codebook_weight: float = 0.0
    commitment_weight: float = 0.0
    # The squared error of the token decoder's features against the VQGAN's: it teaches tokens what they are to carry
    # without the VQGAN's decoder, which is most of a step. Not in the paper; 0: off. [reading]
    feature_weight: float = 0.0
    # lambda: log-linear from the first to the second value over so many steps, then constant. "Extremely small" and
    # growing in the paper, without values. [reading]
    eos_weight_start: float = 1e-8
    eos_weight_end: float = 1e-2
    eos_weight_steps: int = 50_000
    # w_irr, Q-DOVE's weight of what the text does not ask for: the paper's value.
    irrelevant_weight: float = 1e-10
    # Steps whose mean error is the threshold: the paper's value.
    threshold_window: int = 100

    def __post_init__(self) -> None:
        check_fields(self, "LossConfig.")
        for name in ("eos_weight_start", "eos_weight_end", "eos_weight_steps", "threshold_window"):
            if getattr(self, name) <= 0:
                raise ValueError(f"LossConfig.{name} must be above 0, got {getattr(self, name)}")

    @property
    def weighs_pixels(self) -> bool:
        """Whether any term reads the reconstruction; without one the VQGAN's decoder learns nothing."""
        return bool(self.weighs_images or self.adversarial_weight)

    @property
    def weighs_images(self) -> bool:
        """Whether any term compares the reconstruction with its image."""
        return bool(self.mse_weight or self.perceptual_weight)

    def eos_weight(self, step: int) -> float:
        """Return lambda at an optimiser step, counted from 0."""
        share = min(max(step, 0) / self.eos_weight_steps, 1.0)
        return float(self.eos_weight_start ** (1 - share) * self.eos_weight_end**share)
