"""ALIT as a shape: 2D image tokens are distilled into 1D ones in rollouts, each of which adds as many again.

Source: Duggal et al., Adaptive Length Image Tokenization via Recurrent Allocation (arXiv 2411.02393, ICLR 2025);
github.com/ShivamDuggal4/adaptive-length-tokenizer, adaptive_tokenizers/adaptive_vqgan.py and
modules/latent_distillation_modules.py for the structure, adaptive_tokenizers/__init__.py (`alit_small`, ...) and
configs/adaptive_vqgan.yaml for the sizes.
Shape suffixes: B images of S x S pixels, N image tokens, K base codewords, W width, M_k tokens after k rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neighbours.blocks import CosineCodebook, Transformer, random_positions
from neighbours.maskgit_vqgan import MaskGITVQGAN, VQGANSizes, mixture

__all__ = ["ALIT", "ALIT_SIZES", "ALITSizes"]


@dataclass(frozen=True)
class ALITSizes:
    """Sizes of an ALIT tokenizer: its two transformers', `tokens` that each of at most `rollouts` adds, and the rest.

    `halting`: an image token whose base code the decoder finds with more than this probability is masked.
    `threshold`: of the mean absolute error, for choosing an image's length; the published default.
    """

    width: int
    layers: int
    heads: int
    tokens: int = 32
    rollouts: int = 8
    image: int = 256
    codewords: int = 4096
    token_width: int = 12
    halting: float = 0.55
    threshold: float = 0.07
    base: VQGANSizes = field(default_factory=VQGANSizes)

    @property
    def image_tokens(self) -> int:
        """N, the features of the base tokenizer."""
        return (self.image // self.base.stride) ** 2

    def positions(self, rollouts: int, *, decodes: int) -> int:
        """Return the positions of an image in `rollouts` passes of the encoder and `decodes` of the decoder.

        A class token, the image tokens or their masks, and the tokens so far: 1 + N + M_k at rollout k.
        """
        each = [1 + self.image_tokens + self.tokens * (rollout + 1) for rollout in range(rollouts)]
        return sum(each) + sum(each[:decodes])


# As published: alit_small is eight layers of width 1024 with eight heads, and the one trained on all of ImageNet.
ALIT_SIZES = {
    "alit_tiny": ALITSizes(width=512, layers=8, heads=8),
    "alit_small": ALITSizes(width=1024, layers=8, heads=8),
    "alit_base": ALITSizes(width=768, layers=12, heads=12),
}


class ALIT(nn.Module):
    """An ALIT tokenizer on MaskGIT's VQGAN, with random weights: a shape, not a trained model.

    A rollout runs the encoder over the image tokens and the 1D tokens so far, and quantises those. The decoder then
    says how well each base code is found again, because well-found image tokens are masked for the next rollout. The
    published halting masks them in place and so makes nothing shorter; so does this.
    Kinder than what is published, where it matters for time: a fixed number of rollouts does not decode after the
    last; a length that is chosen stops an image at its rollout and takes it from the batch, where the published
    `encode` runs all eight, with eight pictures, before it looks at the first, and takes one decision a batch.
    Left out: losses and discriminators; the draw by which masking is random (here every token above `halting` is
    masked).
    """

    def __init__(self, sizes: ALITSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, seen = sizes.width, 1 + sizes.image_tokens
        self.base = MaskGITVQGAN(sizes.base)
        # What the base's features leave of the width.
        self.to_patches = nn.Conv2d(3, width - sizes.base.channels, sizes.base.stride, stride=sizes.base.stride)
        self.class_token = random_positions(1, width)
        self.image_positions = random_positions(seen, width)
        self.image_mask = random_positions(1, width)
        self.latents = random_positions(sizes.tokens, width)
        self.latent_positions = random_positions(sizes.tokens, width)
        self.rollout_embedding = nn.Parameter(width**-0.5 * torch.randn(sizes.rollouts, sizes.tokens, width))
        self.norm_first, self.norm_again = nn.LayerNorm(width), nn.LayerNorm(width)
        self.encoder = Transformer(width, sizes.layers, sizes.heads)
        self.norm_out = nn.LayerNorm(width)
        self.to_token = nn.Linear(width, sizes.token_width)
        self.codebook = CosineCodebook(sizes.codewords, sizes.token_width)
        self.decoder = DistillationDecoder(sizes)

    def features(
        self,
        images: Tensor,
        rollouts: int | None = None,
        *,
        choose: bool = False,
        imposed: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Encode images (B, 3, S, S) in [0, 1] -> B tensors (M_k, token_width), before the codebook.

        rollouts: the most an image gets, by default all. choose: decode to pixels after each, and stop the images
        whose mean absolute error is below the threshold. imposed: B rollouts, in place of what was so decided; the
        decision is computed and read all the same.
        Raises `ValueError` for rollouts that there are not.
        """
        most = self.sizes.rollouts if rollouts is None else rollouts
        asked = [most, *(imposed or ())]
        if min(asked) < 1 or most > self.sizes.rollouts or max(asked) > most:
            raise ValueError(f"rollouts must be 1 to {self.sizes.rollouts}, those imposed no more, got {asked}")
        if imposed is not None and (not choose or len(imposed) != len(images)):
            raise ValueError(f"imposed needs choose=True and a value for each of {len(images)} images, got {imposed}")
        grid = self.base.encode(images)
        base_codes = self.base.codes(grid)
        seen = self._image_tokens(grid, images)
        new = self.latents + self.latent_positions
        found: dict[int, Tensor] = {}
        rows = torch.arange(len(images))
        states = seen
        for rollout in range(most):
            added = (new + self.rollout_embedding[rollout]).expand(len(states), -1, -1)
            norm = self.norm_again if rollout else self.norm_first
            states = self.encoder(norm(torch.cat([states, added], dim=1)))
            features = self.to_token(self.norm_out(states[:, seen.shape[1] :]))
            stops = torch.full((len(rows),), rollout + 1 == most)
            if choose or rollout + 1 < most:
                logits = self.decoder(self.codebook.codewords(self.codebook.codes(features)).to(features.dtype))
            if choose:
                stops |= self._is_good(logits, images)
                if imposed is not None:
                    stops = torch.tensor([imposed[row] == rollout + 1 for row in rows.tolist()])
            for place in stops.nonzero().flatten().tolist():
                found[int(rows[place])] = features[place]
            if stops.all():
                break
            states = self._mask(states, logits, base_codes)
            if stops.any():
                keep = ~stops
                rows = rows[keep]
                keep = keep.to(images.device)
                states, images, base_codes = states[keep], images[keep], base_codes[keep]
        return [found[row] for row in sorted(found)]

    def tokenize(self, images: Tensor, rollouts: int | None = None, **options: object) -> list[Tensor]:
        """Tokenize images (B, 3, S, S) in [0, 1] -> B codes (M_k,) int64; arguments as for `features`."""
        return [self.codebook.codes(features) for features in self.features(images, rollouts, **options)]

    def _image_tokens(self, grid: Tensor, images: Tensor) -> Tensor:
        """Return the class token, and the base's features beside the patches at each place: (B, 1 + N, W)."""
        tokens = torch.cat([grid, self.to_patches(images)], dim=1).flatten(2).transpose(1, 2)
        tokens = F.normalize(tokens, dim=-1)
        return torch.cat([self.class_token.expand(len(images), -1, -1), tokens], dim=1) + self.image_positions

    def _is_good(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return on the host which images (B, 3, S, S) the decoder's logits give back well enough, (B,) bool."""
        pictures = self.base.decode(mixture(self.base.codebook.weight, logits))
        return ((pictures - images).abs().mean(dim=(1, 2, 3)) < self.sizes.threshold).cpu()

    def _mask(self, states: Tensor, logits: Tensor, base_codes: Tensor) -> Tensor:
        """Mask the image tokens in states (B, 1 + N + M_k, W) whose base codes (B, N) the logits (B, N, K) find."""
        probability = torch.softmax(logits, dim=-1).gather(2, base_codes.unsqueeze(2))
        masks = self.image_positions[1:] + self.image_mask
        end = 1 + self.sizes.image_tokens
        masked = torch.where(probability >= self.sizes.halting, masks, states[:, 1:end])
        return torch.cat([states[:, :1], masked, states[:, end:]], dim=1)


class DistillationDecoder(nn.Module):
    """From 1D tokens to what base code each image token has."""

    def __init__(self, sizes: ALITSizes) -> None:
        super().__init__()
        width = sizes.width
        self.from_token = nn.Linear(sizes.token_width, width)
        self.latent_positions = random_positions(sizes.tokens * sizes.rollouts, width)
        self.class_token = random_positions(1, width)
        self.mask = random_positions(1, width)
        self.mask_positions = random_positions(1 + sizes.image_tokens, width)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(width, sizes.layers, sizes.heads)
        self.norm_out = nn.LayerNorm(width)
        self.head_in = nn.Linear(width, 2 * width)
        self.head_out = nn.Linear(2 * width, sizes.base.codewords)

    def forward(self, codewords: Tensor) -> Tensor:
        """(B, M_k, token_width) -> logits (B, N, K)."""
        count = len(self.mask_positions)
        masks = torch.cat([self.class_token, self.mask.expand(count - 1, -1)]) + self.mask_positions
        latents = self.from_token(codewords) + self.latent_positions[: codewords.shape[1]]
        states = self.norm_in(torch.cat([masks.expand(len(codewords), -1, -1), latents], dim=1))
        states = self.norm_out(self.transformer(states)[:, 1:count])
        return self.head_out(torch.tanh(self.head_in(states)))
