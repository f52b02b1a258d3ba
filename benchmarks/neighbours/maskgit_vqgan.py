"""MaskGIT's VQGAN as a shape: what ALIT starts from, and what it compares its own pictures by.

Source: Chang et al., MaskGIT (arXiv 2202.04200, 2022), as github.com/ShivamDuggal4/adaptive-length-tokenizer has it:
base_tokenizers/configs/vqgan.yaml for the sizes, base_tokenizers/taming for the structure. No attention, no biases in
the residual blocks; the encoder halves by averages.
Shape suffixes: B images of S x S pixels, C channels of a feature, h x w its grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MaskGITVQGAN", "VQGANSizes"]

GROUPS = 32
EPS = 1e-6


@dataclass(frozen=True)
class VQGANSizes:
    """Channels of each resolution, residual blocks in it, and a codebook of `codewords` x `channels`."""

    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    channels: int = 256
    codewords: int = 1024

    @property
    def stride(self) -> int:
        """Pixels that a feature spans in each direction."""
        return 2 ** (len(self.widths) - 1)


class ResidualBlock(nn.Module):
    """Twice GroupNorm, SiLU and a 3x3 convolution, added to the input.

    Where the width changes, what they are added to is a 1x1 convolution of their own result, as published.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, before, eps=EPS)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, after, eps=EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = None if before == after else nn.Conv2d(after, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) -> (B, after, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(hidden))


class MaskGITVQGAN(nn.Module):
    """Convolutional encoder, codebook and decoder, with random weights: a shape, not a trained model.

    Left out: the quantizer's losses, and its product of one-hot rows with the codebook, which is a lookup here.
    """

    def __init__(self, sizes: VQGANSizes) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*_encoder(sizes))
        self.codebook = nn.Embedding(sizes.codewords, sizes.channels)
        self.decoder = nn.Sequential(*_decoder(sizes))

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) in [0, 1] -> features (B, C, h, w), before the codebook."""
        return self.encoder(images)

    def codes(self, features: Tensor) -> Tensor:
        """Find the nearest codewords of features (B, C, h, w) -> (B, h w) int64; the search is in fp32."""
        rows = features.flatten(2).transpose(1, 2).float()
        codebook = self.codebook.weight.float()
        return (codebook.square().sum(1) - 2 * rows @ codebook.T).argmin(dim=-1)

    def decode(self, codewords: Tensor) -> Tensor:
        """Decode codewords, or mixtures of them, (B, C, h, w) -> images (B, 3, S, S)."""
        return self.decoder(codewords)


def _encoder(sizes: VQGANSizes) -> Iterator[nn.Module]:
    widths, last = sizes.widths, sizes.widths[-1]
    yield nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    for level, (before, after) in enumerate(pairwise((widths[0], *widths))):
        if level:
            yield nn.AvgPool2d(2)
        yield from _level(before, after, sizes.blocks)
    yield from (ResidualBlock(last, last) for _ in range(2))
    yield from (nn.GroupNorm(GROUPS, last, eps=EPS), nn.SiLU(), nn.Conv2d(last, sizes.channels, 1))


def _decoder(sizes: VQGANSizes) -> Iterator[nn.Module]:
    widths = sizes.widths[::-1]
    yield nn.Conv2d(sizes.channels, widths[0], 3, padding=1)
    yield from (ResidualBlock(widths[0], widths[0]) for _ in range(2))
    for level, (before, after) in enumerate(pairwise((widths[0], *widths))):
        if level:
            yield from (nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(before, before, 3, padding=1))
        yield from _level(before, after, sizes.blocks)
    yield from (nn.GroupNorm(GROUPS, widths[-1], eps=EPS), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))


def _level(before: int, after: int, blocks: int) -> Iterator[nn.Module]:
    for width in (before, *(after,) * (blocks - 1)):
        yield ResidualBlock(width, after)


def mixture(codebook: Tensor, logits: Tensor) -> Tensor:
    """Return what logits (B, h w, K) expect of codewords (K, C), on a square grid: (B, C, h, w)."""
    side = round(logits.shape[1] ** 0.5)
    return (torch.softmax(logits, dim=-1) @ codebook).transpose(1, 2).unflatten(2, (side, side))
