"""What TiTok and ALIT share: the transformer that both took from CLIP's image encoder, and a codebook by cosine.

Shape suffixes: B images, P positions, W width, M tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CosineCodebook", "Transformer", "random_positions"]


class TransformerBlock(nn.Module):
    """Attention and an MLP of four times the width with GELU, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, W) -> (B, P, W); every position sees every other."""
        # Three of (B, heads, P, W / heads).
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention_out(attended)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class Transformer(nn.Sequential):
    """A stack of blocks: (B, P, W) -> (B, P, W)."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__(*(TransformerBlock(width, heads) for _ in range(layers)))


class CosineCodebook(nn.Module):
    """Codewords that are found by the angle to them, as both publish it (`use_l2_norm`)."""

    def __init__(self, codewords: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codewords, width)

    def codes(self, features: Tensor) -> Tensor:
        """(..., width) in any floating dtype -> (...) int64; the search is in fp32."""
        directions = F.normalize(self.embedding.weight.float(), dim=-1)
        return (F.normalize(features.float(), dim=-1) @ directions.T).argmax(dim=-1)

    def codewords(self, codes: Tensor) -> Tensor:
        """(...) int64 -> (..., width), of length 1."""
        return F.normalize(self.embedding(codes), dim=-1)


def random_positions(count: int, width: int) -> nn.Parameter:
    """Return (count, width) as both start what they learn at every position."""
    return nn.Parameter(width**-0.5 * torch.randn(count, width))
