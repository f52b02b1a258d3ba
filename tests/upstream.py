"""What the original is built on: diffusers' `VQModel` and transformers' `GPTNeoXModel`, with random weights.

`UpstreamPipeline` is the whole tokenizer written straight down with those modules alone, one image at a time: the
independent truth that dove_fast is compared with, and the baseline of the benchmarks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision_guard  # noqa: F401 - before diffusers and transformers, which import torchvision
from diffusers import VQModel
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXModel

# The aMUSEd VQ model.
AMUSED_VQ = {
    "block_out_channels": (128, 256, 256, 512, 768),
    "layers_per_block": 2,
    "latent_channels": 64,
    "num_vq_embeddings": 8192,
    "mid_block_add_attention": False,
}
# Stride 8, like the tiny preset.
SMALL_VQ = {
    "block_out_channels": (32, 64, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 16,
    "num_vq_embeddings": 512,
    "mid_block_add_attention": False,
}
# Attention in the middle and at the lowest resolution, and a codebook narrower than the latent, as in taming's models.
TAMING_VQ = {
    "block_out_channels": (32, 32, 64, 128),
    "layers_per_block": 2,
    "latent_channels": 32,
    "vq_embed_dim": 8,
    "num_vq_embeddings": 1024,
    "mid_block_add_attention": True,
    "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
}
PYTHIA_70M = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
PYTHIA_14M = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Convolve with torch's own CPU code instead of oneDNN's, whose fp32 rounding depends on the processor.

    With AVX2 it alone puts the aMUSEd decoder 1.4e-5 from its fp64 result, diffusers' and ours alike; so it is 3e-6.
    """
    with warnings.catch_warnings():
        # That oneDNN's TF32 is for Intel GPUs.
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def make_vq(seed: int, **config: Any) -> VQModel:
    """Return a random `VQModel` whose codebook is as spread as its features, so that many codes are used."""
    levels = len(config["block_out_channels"])
    config.setdefault("down_block_types", ("DownEncoderBlock2D",) * levels)
    config.setdefault("up_block_types", ("UpDecoderBlock2D",) * levels)
    torch.manual_seed(seed)
    model = VQModel(**config).eval()
    model.quantize.embedding.weight.data.normal_(std=0.5)
    return model


def make_neox(seed: int, *, attention: str = "sdpa", **config: Any) -> GPTNeoXModel:
    """Return a random `GPTNeoXModel`, its biases random too."""
    torch.manual_seed(seed)
    config.setdefault("vocab_size", 50304)
    model = GPTNeoXModel(GPTNeoXConfig(**config, attn_implementation=attention)).eval()
    for name, parameter in model.layers.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.02)
    return model


def make_bidirectional(model: GPTNeoXModel) -> GPTNeoXModel:
    """Let every position attend to every other; both switches are needed, one for each attention implementation."""
    model.config.is_causal = False
    for layer in model.layers:
        layer.attention.is_causal = False
    return model


def save(model: nn.Module, directory: Path, **options: Any) -> Path:
    """Write a model with its library's own `save_pretrained`."""
    model.save_pretrained(directory, **options)
    return directory


class UpstreamPipeline:
    """DOVE, straight down, of other people's modules: no batching, no cache, every position computed."""

    def __init__(
        self,
        vq: VQModel,
        generator: GPTNeoXModel,
        token_decoder: GPTNeoXModel,
        in_proj: nn.Linear,
        eos_head: nn.Linear,
        out_proj: nn.Linear,
        *,
        num_tokens: int,
        attends_padding: bool = True,
    ) -> None:
        self.vq, self.generator = vq, generator
        self.token_decoder = make_bidirectional(token_decoder)
        self.in_proj, self.eos_head, self.out_proj = in_proj, eos_head, out_proj
        self.num_tokens, self.attends_padding = num_tokens, attends_padding

    def steps(self) -> Tensor:
        """Return t_0 .. t_{T-1} as METHOD section 2 spells them, (T, d)."""
        width = self.in_proj.out_features
        table = np.empty((self.num_tokens, width))
        for step in range(self.num_tokens):
            for pair in range(width // 2):
                angle = step / 10000 ** (2 * pair / width)
                table[step, 2 * pair], table[step, 2 * pair + 1] = math.sin(angle), math.cos(angle)
        return torch.from_numpy(table).to(self.in_proj.weight.dtype)

    @torch.no_grad()
    def states(self, image: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor]:
        """One image (3, S, S) -> every step's state (T, d) and EOS logit (T,) fp32."""
        features = self.vq.encode(image[None]).latents[0]
        parts = [self.in_proj(features.flatten(1).T)]
        if query is not None and len(query):
            parts.append(self.generator.embed_in(query))
        inputs = torch.cat([*parts, self.steps()])
        states = self.generator(inputs_embeds=inputs[None]).last_hidden_state[0, -self.num_tokens :]
        return states, self.eos_head(states)[:, 0].float()

    def length(self, eos_logits: Tensor, threshold: float) -> int:
        """Return the number of tokens: up to the first probability above the threshold, that one included."""
        for step, logit in enumerate(eos_logits.tolist()):
            if logit > math.log(threshold / (1 - threshold)):
                return step + 1
        return self.num_tokens

    @torch.no_grad()
    def features(self, tokens: Tensor) -> Tensor:
        """One image's tokens (m, d) -> its feature grid (1, C, h, w), before the codebook."""
        padded = torch.zeros(1, self.num_tokens, tokens.shape[1], dtype=tokens.dtype)
        padded[0, : len(tokens)] = tokens
        mask = None
        if not self.attends_padding:
            keep = torch.arange(self.num_tokens) < len(tokens)
            mask = torch.where(keep, 0.0, -math.inf).to(tokens.dtype).expand(1, 1, self.num_tokens, self.num_tokens)
        states = self.token_decoder(inputs_embeds=padded, attention_mask=mask).last_hidden_state[0]
        side = math.isqrt(self.num_tokens)
        return self.out_proj(states).T.reshape(1, -1, side, side)

    @torch.no_grad()
    def pixels(self, quantized: Tensor) -> Tensor:
        """Codewords on the grid (1, C, h, w) -> image (1, 3, S, S)."""
        return self.vq.decoder(self.vq.post_quant_conv(quantized))
