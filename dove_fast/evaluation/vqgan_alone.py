"""The baseline: what the VQGAN makes of an image without any tokens, and whether it is one.

Shape suffixes: B images of S pixels a side, N features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast.models.dove import DOVE

__all__ = ["NO_BASELINE", "decode_codes", "is_no_baseline"]

# So many dB more are no accident of a few images.
CLEARLY = 0.5
NO_BASELINE = (
    "the tokens are clearly better than the VQGAN alone: its decoder seems to have learnt to decode them, and no "
    "longer fits the encoder's own features. It is not the VQGAN that the model was made from, and no baseline; "
    "--vqgan names that one"
)


@torch.no_grad()
def decode_codes(model: DOVE, codes: Tensor) -> Tensor:
    """Decode the VQGAN's codes (B, N), whatever the configuration does to the tokens' grid: (B, 3, S, S), not clamped.

    In chunks of bounded memory. `model.vqgan.quantize.codes(features)` gives the codes of features (B, N, C).
    """
    side = model.config.grid_size
    grid = model.vqgan.quantize.embedding(codes).transpose(1, 2).unflatten(2, (side, side))
    # Where the configuration quantizes, a codeword stays itself.
    return torch.cat([model.render(grid[rows]) for rows in model.chunks(len(codes))])


def is_no_baseline(alone: float, tokens: float, *, own: bool) -> bool:
    """Tell whether a PSNR of tokens is clearly above that of the VQGAN alone, in dB, where that is the model's own."""
    return own and tokens > alone + CLEARLY
