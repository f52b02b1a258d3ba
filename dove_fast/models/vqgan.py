"""The VQGAN that DOVE wraps, in readable torch; names and mathematics are those of a diffusers `VQModel`.

Shape suffixes: B images, C feature channels, h and w the feature grid's sides, H and W an image's.

Activations and convolutions' weights are channels-last, in memory (B, H, W, C): what the convolutions of oneDNN and
cuDNN read without a copy, and what attention and the codebook see as rows of C. Every layer keeps its input's layout.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dove_fast import ops
from dove_fast.config import VQGANConfig
from dove_fast.models.derived import Derived

__all__ = ["VQGAN", "VectorQuantizer"]

GROUP_NORM_EPS = 1e-6


def _group_norm(config: VQGANConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=GROUP_NORM_EPS)


def _normalise(norm: nn.GroupNorm, x: Tensor, activation: Literal["silu"] | None = "silu") -> Tensor:
    """Normalise x (B, C, *) with the parameters of `norm`, then apply SiLU; the result has x's memory layout."""
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=activation)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class ResnetBlock(nn.Module):
    """Two rounds of GroupNorm, SiLU and a 3x3 convolution, added to the input (through a 1x1 if widths differ)."""

    def __init__(self, config: VQGANConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(config, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        hidden = self.conv1(_normalise(self.norm1, x))
        hidden = self.conv2(_normalise(self.norm2, hidden))
        # In place: a convolution's backward does not read its result.
        hidden += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden


class SpatialAttention(nn.Module):
    """One head of self-attention over all grid positions, added to the input."""

    def __init__(self, config: VQGANConfig, channels: int) -> None:
        super().__init__()
        self.group_norm = _group_norm(config, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list, because diffusers' checkpoints call the projection `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        batch, channels, height, width = x.shape
        hidden = _normalise(self.group_norm, x.reshape(batch, channels, height * width), None).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            self.to_q(hidden).unsqueeze(1), self.to_k(hidden).unsqueeze(1), self.to_v(hidden).unsqueeze(1)
        ).squeeze(1)
        # (B, h w, C) seen as (B, C, h, w) is channels-last. In place: a linear layer's backward does not read its
        # result.
        out: Tensor = self.to_out[0](attended).transpose(1, 2).unflatten(2, (height, width))
        out += x
        return out


class Downsample(nn.Module):
    """Halves the resolution: one row and one column of zeros at the far edges, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, h / 2, w / 2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, 2 h, 2 w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if asked, then a change of resolution."""

    def __init__(
        self, config: VQGANConfig, in_channels: int, out_channels: int, num_blocks: int, *, attention: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.resnets = nn.ModuleList(ResnetBlock(config, before, after) for before, after in pairwise(widths))
        self.attentions = (
            nn.ModuleList(SpatialAttention(config, out_channels) for _ in range(num_blocks)) if attention else None
        )
        # At most one of these two is set by the owner; the names are diffusers'.
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h', w')."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions is not None:
                x = self.attentions[index](x)
        for resample in self.downsamplers or self.upsamplers or ():
            x = resample(x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them if the configuration says so."""

    def __init__(self, config: VQGANConfig, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, channels) for _ in range(2))
        self.attentions = (
            nn.ModuleList([SpatialAttention(config, channels)]) if config.mid_block_add_attention else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        out: Tensor = self.resnets[1](x)
        return out


class Encoder(nn.Module):
    """Image to latent: one level per entry of `block_out_channels`, each but the last halving the resolution."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            block = Level(
                config,
                before,
                after,
                config.layers_per_block,
                attention=config.down_block_types[level].startswith("Attn"),
            )
            if level < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Downsample(after)])
            self.down_blocks.append(block)
        self.mid_block = MidBlock(config, widths[-1])
        self.conv_norm_out = _group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, latent_channels, h, w), channels-last."""
        x = self.conv_in(_channels_last(images))
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(_normalise(self.conv_norm_out, x))
        return out


class Decoder(nn.Module):
    """Latent to image: the encoder's levels in reverse, with one more residual block in each."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config, widths[0])
        self.up_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            block = Level(
                config,
                before,
                after,
                config.layers_per_block + 1,
                attention=config.up_block_types[level].startswith("Attn"),
            )
            if level < len(widths) - 1:
                block.upsamplers = nn.ModuleList([Upsample(after)])
            self.up_blocks.append(block)
        self.conv_norm_out = _group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, 3, H, W), channels-last."""
        x = self.mid_block(self.conv_in(_channels_last(latents)))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(_normalise(self.conv_norm_out, x))
        return out


class VectorQuantizer(nn.Module):
    """The codebook: replaces each feature by its nearest codeword."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_vq_embeddings, config.vq_embed_dim)
        # diffusers' own start: codewords far smaller than the features.
        nn.init.uniform_(self.embedding.weight, -1.0 / config.num_vq_embeddings, 1.0 / config.num_vq_embeddings)
        self._squares = Derived(ops.codebook_squares)

    def refresh(self) -> None:
        """Forget the codewords' norms, which are kept until the codebook changes.

        Needed only after a write that torch does not count, through `embedding.weight.data`.
        """
        self._squares.refresh()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise features (B, C, h, w) -> (codewords (B, C, h, w), codes (B, h, w) int64).

        The gradient passes straight through to the features. Source: METHOD section 3.
        """
        # [reading] METHOD section 4: the straight-through gradient goes to the features alone; a codebook that is
        # trained gets its own from the codebook loss.
        weight = self.embedding.weight
        squares = self._squares(weight)
        codes, quantized = ops.vq_lookup(features.permute(0, 2, 3, 1), weight.detach(), codebook_sq=squares)
        return quantized.permute(0, 3, 1, 2), codes

    def codes(self, features: Tensor) -> Tensor:
        """Return the nearest codeword of each feature: (..., C) -> (...) int64."""
        weight = self.embedding.weight
        return ops.vq_lookup(features, weight.detach(), codebook_sq=self._squares(weight))[0]


class VQGAN(nn.Module):
    """Convolutional encoder, codebook and decoder; `state_dict` keys are those of a diffusers `VQModel`.

    Works on images in the range it was trained on (`DOVEConfig.image_range`); `DOVE` converts from [0, 1].
    Takes any memory layout; results and the convolutions' weights are channels-last (`weight.contiguous()` where a file
    format wants them otherwise).
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.vq_embed_dim, 1)
        self.quantize = VectorQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.vq_embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        # Once: `to` and `load_state_dict` keep it. Contiguous weights work too, and are copied in every call.
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = _channels_last(parameter.data)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) -> features (B, C, h, w), before the codebook."""
        features: Tensor = self.quant_conv(self.encoder(images))
        return features

    def decode(self, features: Tensor) -> Tensor:
        """Decode features (B, C, h, w) -> images (B, 3, H, W); the codebook is the caller's step (`quantize`)."""
        images: Tensor = self.decoder(self.post_quant_conv(_channels_last(features)))
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images (B, 3, H, W) through the codebook, as the VQGAN alone does."""
        quantized, _ = self.quantize(self.encode(images))
        return self.decode(quantized)
