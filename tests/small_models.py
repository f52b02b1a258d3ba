"""A very small DOVE with a spread of lengths, for tests of behaviour rather than of size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dove_fast import DOVE, DOVEConfig
from dove_fast.config import GPTNeoXConfig, VQGANConfig

IMAGE_SIZE, NUM_TOKENS, VOCAB = 16, 16, 32


def micro_config(**changes) -> DOVEConfig:
    """Return a configuration with 16x16 images, stride 4 and T = 16; `changes` are fields of `DOVEConfig`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vqgan = VQGANConfig(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
    )
    fields = {
        "image_size": IMAGE_SIZE,
        "vqgan": vqgan,
        "generator": GPTNeoXConfig(vocab_size=VOCAB, max_position_embeddings=48, **sizes),
        "token_decoder": GPTNeoXConfig(vocab_size=0, max_position_embeddings=48, **sizes),
        "eos_bias_init": 0.0,
    }
    return DOVEConfig(**{**fields, **changes})


def sharpen_attention(stack: nn.Module, factor: float) -> None:
    """Scale a GPT-NeoX stack's attention weights, ours or transformers', so that its lengths depend on the image.

    With the usual initialisation attention is nearly uniform and the step decides everything; sharper queries and
    keys and a heavier attention output let the image speak.
    """
    for layer in stack.layers:
        layer.attention.query_key_value.weight.data.mul_(factor)
        layer.attention.dense.weight.data.mul_(factor)


def micro_model(seed: int = 0, **changes) -> DOVE:
    """Return a random model whose lengths depend on the image: some stop at once, some midway, some never."""
    torch.manual_seed(seed)
    model = DOVE(micro_config(**changes)).eval()
    model.in_proj.weight.data.mul_(20)
    sharpen_attention(model.generator, 20)
    model.vqgan.quantize.embedding.weight.data.normal_(std=0.5)
    with torch.no_grad():
        _, logits = model.generate(model.encode(sample_images(64)), [torch.empty(0, dtype=torch.int64)] * 64)
        model.eos_head.bias.data.sub_(logits.quantile(0.93))
    return model


def sample_images(batch: int, seed: int = 1, image_size: int = IMAGE_SIZE) -> Tensor:
    """Return images (batch, 3, S, S) in [0, 1]: four random colours under more or less noise."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.rand(batch, 3, 2, 2, generator=random)
    share = torch.rand(batch, 1, 1, 1, generator=random)
    noise = torch.rand(batch, 3, image_size, image_size, generator=random)
    return F.interpolate(colours, size=(image_size, image_size)) * (1 - share) + noise * share
