"""A light patch discriminator and its hinge losses.

Shape suffixes: B images of H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PatchDiscriminator", "hinge_loss"]

NORM_GROUPS = 16


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image: convolutions of stride 2, and one score a patch.

    The form is that of pix2pix and of VQGANs (Isola et al. 2017; Esser et al. 2021), with GroupNorm in the place of
    BatchNorm: an image's scores do not depend on the others of its batch. `channels` of the first layer, doubled by
    each of `layers` - 1 more, at most eight times. Weights are random, from torch's seed.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if channels < NORM_GROUPS or channels % NORM_GROUPS:
            raise ValueError(f"channels must be a multiple of {NORM_GROUPS}, got {channels}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        widths = [channels * min(2**level, 8) for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            parts += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Score the patches of images (B, 3, H, W) in [0, 1] -> (B, 1, h, w): high for real ones."""
        scores: Tensor = self.layers(2 * images - 1)
        return scores


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """Return the discriminator's loss (): its scores of real patches are to be above 1, of made ones below -1.

    In fp32 at least.
    """
    wide = torch.promote_types(real.dtype, torch.float32)
    return 0.5 * (F.relu(1 - real.to(wide)).mean() + F.relu(1 + made.to(wide)).mean())
