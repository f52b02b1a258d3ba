"""The terms that draw codewords and features together.

Shape suffixes: B images, C feature channels, h and w the feature grid's sides, K codewords.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["codebook_terms"]


def codebook_terms(features: Tensor, codes: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codebook term and the commitment term, both () in fp32 at least.

    features: (B, C, h, w) before the codebook. codes: (B, h, w) int64, each feature's codeword. codebook: (K, C). The
    first is the mean squared distance whose gradient goes to the codewords alone, the second the same whose gradient
    goes to the features alone. Raises `ValueError` for shapes that do not fit.
    Source: METHOD section 4; van den Oord et al., Neural Discrete Representation Learning (arXiv 1711.00937).
    """
    if features.dim() != 4 or codebook.dim() != 2 or features.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"features must be (B, C, h, w) and codebook (K, C), got {tuple(features.shape)} and "
            f"{tuple(codebook.shape)}"
        )
    if codes.shape != (len(features), *features.shape[2:]):
        raise ValueError(f"codes must have shape (B, h, w) of {tuple(features.shape)}, got {tuple(codes.shape)}")
    wide = torch.promote_types(features.dtype, torch.float32)
    rows = features.movedim(1, -1).to(wide)
    codewords = F.embedding(codes, codebook).to(wide)
    return F.mse_loss(codewords, rows.detach()), F.mse_loss(rows, codewords.detach())
