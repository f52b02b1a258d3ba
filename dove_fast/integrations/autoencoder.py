"""DOVE behind the methods of diffusers' autoencoders. diffusers itself is not needed.

Shape suffixes: B images of S pixels a side, d the tokens' width, T the most tokens an image can have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from dove_fast.models.dove import DOVE
from dove_fast.models.inputs import Query
from dove_fast.ragged import RaggedTokens

__all__ = ["AutoencoderConfig", "DOVEAutoencoder", "DecoderOutput", "EncoderOutput"]


class EncoderOutput(NamedTuple):
    """What `DOVEAutoencoder.encode` returns: `latents`, B rows of 1 to T tokens of width d."""

    latents: RaggedTokens


class DecoderOutput(NamedTuple):
    """What `DOVEAutoencoder.decode` returns: `sample` (B, 3, S, S), about [-1, 1], not clamped."""

    sample: Tensor


@dataclass(frozen=True)
class AutoencoderConfig:
    """The sizes, by the names that diffusers' autoencoders have for them.

    `sample_size` S; `latent_channels` d, a token's width; `max_tokens` T, which diffusers does not have;
    `block_out_channels` the VQGAN's, of which pipelines take the stride, 2^(len - 1); `scaling_factor` 1.
    """

    sample_size: int
    latent_channels: int
    max_tokens: int
    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 1.0


class DOVEAutoencoder(nn.Module):
    """A DOVE where code expects a diffusers `VQModel` or `AutoencoderTiny`.

        vae = DOVEAutoencoder.from_pretrained("tiny")
        latents = vae.encode(images).latents  # images (B, 3, S, S) in [-1, 1]
        images = vae.decode(latents).sample

    The same: the methods and their `return_dict`, `.latents` and `.sample`, images in [-1, 1], `config`, `dtype`,
    `device`, what `nn.Module` has. Different, since tokens are what DOVE is about:

    - latents are `RaggedTokens` and no tensor (B, C, h, w): an image has as many as it needs, and their places mean
      no place in the image. What computes with latents, as a denoiser does, takes `latents.values` (total, d) or
      `latents.to_padded()`;
    - there is no `.latent_dist` to sample from, which `AutoencoderKL` returns: code for it reads `.latents` instead;
    - an image is always S x S, `config.sample_size`;
    - `encode` and `decode` run without gradients (`DOVE.decode_padded` and `dove_fast.training` have them);
    - results are named tuples: `out[0]` and `out.sample`, but not `out["sample"]`; `return_dict=False` gives a tuple
      of one, without the commitment loss that `VQModel.decode` puts behind the images.

    `model` is the DOVE, shared and not copied.
    """

    def __init__(self, model: DOVE) -> None:
        super().__init__()
        if not isinstance(model, DOVE):
            raise TypeError(f"model must be a DOVE, got {type(model).__name__}")
        self.model = model

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, torch_dtype: torch.dtype | None = None
    ) -> DOVEAutoencoder:
        """Load a directory, in evaluation mode; `DOVE.from_pretrained` says what it takes and raises."""
        return cls(DOVE.from_pretrained(directory, dtype=torch_dtype)).eval()

    @property
    def config(self) -> AutoencoderConfig:
        """The sizes, by diffusers' names; `model.config` has all."""
        config = self.model.config
        return AutoencoderConfig(
            sample_size=config.image_size,
            latent_channels=config.generator.hidden_size,
            max_tokens=config.num_tokens,
            block_out_channels=config.vqgan.block_out_channels,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, latents and images."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @overload
    def encode(
        self,
        x: Tensor,
        return_dict: Literal[True] = True,
        *,
        queries: Sequence[Query] | None = None,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
    ) -> EncoderOutput: ...

    @overload
    def encode(
        self,
        x: Tensor,
        return_dict: Literal[False],
        *,
        queries: Sequence[Query] | None = None,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
    ) -> tuple[RaggedTokens]: ...

    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,
        *,
        queries: Sequence[Query] | None = None,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
    ) -> EncoderOutput | tuple[RaggedTokens]:
        """Turn images x (B, 3, S, S) in [-1, 1], floating, on the model's device, into `EncoderOutput`.

        `queries` and what is behind it are options of `DOVE.tokenize`. `return_dict=False` returns `(latents,)`.
        Raises `TypeError` for an x that is not floating, else as `DOVE.tokenize` does.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating tensor in [-1, 1], got {found}")
        latents = self.model.tokenize(
            (x + 1) / 2, queries, length=length, max_length=max_length, eos_threshold=eos_threshold
        )
        return EncoderOutput(latents) if return_dict else (latents,)

    @overload
    def decode(self, z: RaggedTokens, return_dict: Literal[True] = True) -> DecoderOutput: ...

    @overload
    def decode(self, z: RaggedTokens, return_dict: Literal[False]) -> tuple[Tensor]: ...

    def decode(self, z: RaggedTokens, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Turn tokens into `DecoderOutput`, its images (B, 3, S, S) about [-1, 1], not clamped.

        z: B rows of 1 to T tokens of width d. `return_dict=False` returns `(sample,)`.
        Raises `TypeError` and `ValueError` as `DOVE.decode` does.
        """
        sample = self.model.decode(z) * 2 - 1
        return DecoderOutput(sample) if return_dict else (sample,)

    @overload
    def forward(self, sample: Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...

    @overload
    def forward(self, sample: Tensor, return_dict: Literal[False]) -> tuple[Tensor]: ...

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode images (B, 3, S, S) in [-1, 1]."""
        decoded = self.decode(self.encode(sample).latents)
        return decoded if return_dict else (decoded.sample,)
