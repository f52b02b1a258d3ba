"""TiTok as a shape: an image's patches and a fixed number of latent tokens through a ViT, and the tokens' codes.

Source: Yu et al., An Image is Worth 32 Tokens for Reconstruction and Generation (arXiv 2406.07550, 2024);
github.com/bytedance/1d-tokenizer, `TiTokEncoder` in modeling/modules/blocks.py, and configs/infer/TiTok/titok_l32.yaml,
titok_b64.yaml and titok_s128.yaml for the sizes.
Shape suffixes: B images of S x S pixels, M tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neighbours.blocks import CosineCodebook, Transformer, random_positions

__all__ = ["TITOK_SIZES", "TiTok", "TiTokSizes"]


@dataclass(frozen=True)
class TiTokSizes:
    """Sizes of a TiTok encoder: those of the ViT, `tokens` an image, and a codebook of `codewords` x `token_width`."""

    width: int
    layers: int
    heads: int
    tokens: int
    image: int = 256
    patch: int = 16
    codewords: int = 4096
    token_width: int = 12

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2

    @property
    def positions(self) -> int:
        """Positions that the ViT computes an image: a class token, the patches, the latent tokens."""
        return 1 + self.patches + self.tokens


# As published; "small" has eight layers of 512, not ViT-S's twelve of 384.
TITOK_SIZES = {
    "TiTok-L-32": TiTokSizes(width=1024, layers=24, heads=16, tokens=32),
    "TiTok-B-64": TiTokSizes(width=768, layers=12, heads=12, tokens=64),
    "TiTok-S-128": TiTokSizes(width=512, layers=8, heads=8, tokens=128),
}


class TiTok(nn.Module):
    """A TiTok tokenizer's encoding side, with random weights: a shape, not a trained model.

    Every weight that `TiTok.encode` reads is there, so the number of parameters is the published encoder's.
    Left out: the decoder and the VQGAN's pixels behind it; the quantizer's losses, which the published `encode`
    computes too; the "legacy" reshape that mixes tokens and channels before the last product, which costs nothing.
    """

    def __init__(self, sizes: TiTokSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.to_patches = nn.Conv2d(3, width, sizes.patch, stride=sizes.patch)
        self.class_token = random_positions(1, width)
        self.patch_positions = random_positions(1 + sizes.patches, width)
        self.latents = random_positions(sizes.tokens, width)
        self.latent_positions = random_positions(sizes.tokens, width)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(width, sizes.layers, sizes.heads)
        self.norm_out = nn.LayerNorm(width)
        self.to_token = nn.Linear(width, sizes.token_width)
        self.codebook = CosineCodebook(sizes.codewords, sizes.token_width)

    def features(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) in [0, 1] -> (B, M, token_width), before the codebook."""
        batch = len(images)
        patches = self.to_patches(images).flatten(2).transpose(1, 2)
        seen = torch.cat([self.class_token.expand(batch, -1, -1), patches], dim=1) + self.patch_positions
        latents = (self.latents + self.latent_positions).expand(batch, -1, -1)
        states = self.transformer(self.norm_in(torch.cat([seen, latents], dim=1)))
        return self.to_token(self.norm_out(states[:, -self.sizes.tokens :]))

    def tokenize(self, images: Tensor) -> Tensor:
        """Tokenize images (B, 3, S, S) in [0, 1] -> codes (B, M) int64."""
        return self.codebook.codes(self.features(images))
