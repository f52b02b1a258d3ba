"""Where tokens look: the attention of the generator's steps and of the token decoder's positions.

Fused attention never has the probabilities in memory, so they are computed here beside it, from the same queries and
keys, by a softmax that is written out. Shape suffixes: B images, S positions, H heads, N features, T steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dove_fast.models.dove import DOVE
from dove_fast.models.gpt_neox import (
    Attention,
    GPTNeoX,
    Layer,
    add_and_normalise,
    rotary_table,
    rotate,
    step_embeddings,
)

__all__ = ["StepAttention", "attention_weights", "decoder_attention", "padding_mask", "step_attention"]


def attention_weights(stack: GPTNeoX, inputs_embeds: Tensor, key_mask: Tensor | None = None) -> Iterator[Tensor]:
    """Yield each layer's attention probabilities (B, H, S, S) fp32, first layer first; rows are queries and sum to 1.

    inputs_embeds (B, S, d) and `key_mask` (B, S): as `GPTNeoX.forward` takes them. One layer is in memory at a time.
    """
    cos, sin = rotary_table(torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device), stack.config)
    x = inputs_embeds
    addends: tuple[Tensor, ...] = ()
    for layer in cast("Sequence[Layer]", stack.layers):
        x, for_attention, for_mlp = add_and_normalise(x, addends, layer.input_layernorm, layer.post_attention_layernorm)
        assert for_mlp is not None
        yield _probabilities(layer.attention, for_attention, cos, sin, causal=stack.causal, key_mask=key_mask)
        addends = layer(for_attention, for_mlp, cos, sin, causal=stack.causal, key_mask=key_mask)


def _probabilities(
    attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, *, causal: bool, key_mask: Tensor | None
) -> Tensor:
    batch, length, _ = x.shape
    q, k, _ = attention.query_key_value(x).view(batch, length, attention.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
    q, k = rotate(q, cos, sin).float(), rotate(k, cos, sin).float()
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = torch.ones(length, length, dtype=torch.bool, device=x.device)
    if causal:
        seen = seen.tril()
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


@dataclass(frozen=True, eq=False)
class StepAttention:
    """Attention of the generator's steps, the mean over heads, by layer, on the CPU.

    to_image: (layers, B, T, N) fp32, to the image features in the order of the grid. on_image, on_query, on_steps:
    (layers, B, T), the shares that all of them get, all of the query, and the steps so far; together they are 1.
    """

    to_image: Tensor
    on_image: Tensor
    on_query: Tensor
    on_steps: Tensor


@torch.no_grad()
def step_attention(model: DOVE, features: Tensor, queries: Sequence[Tensor]) -> StepAttention:
    """Return where each step of `model.generate(features, queries)` looks; the arguments are the same."""
    num_features, steps = model.config.num_features, model.config.num_tokens
    prefixes = model.prefixes(features, queries)
    width = model.config.generator.hidden_size
    embedded = step_embeddings(steps, width, device=model.device, dtype=model.dtype)
    rows = []
    # One image at a time: queries differ in length, and a layer's probabilities are large.
    for prefix in prefixes:
        layers = attention_weights(model.generator, torch.cat([prefix, embedded])[None])
        rows.append(torch.stack([weights[0, :, -steps:].mean(dim=0).cpu() for weights in layers]))
    to_image = torch.stack([row[..., :num_features] for row in rows], dim=1)
    on_query = torch.stack([row[..., num_features:-steps].sum(dim=-1) for row in rows], dim=1)
    on_steps = torch.stack([row[..., -steps:].sum(dim=-1) for row in rows], dim=1)
    return StepAttention(to_image, to_image.sum(dim=-1), on_query, on_steps)


@torch.no_grad()
def decoder_attention(model: DOVE, padded: Tensor, lengths: Tensor) -> Tensor:
    """Return where the token decoder's positions look, (layers, B, N, T) fp32 on the CPU, the mean over heads.

    padded (B, T, d), zeros behind each image's lengths (B,): as `DOVE.decode_padded` takes them. Position n writes
    feature n of the grid (T = N); a column behind an image's length is the attention to padding.
    """
    mask = padding_mask(model, lengths, padded.shape[1])
    rows = []
    for row in range(len(padded)):
        own = slice(row, row + 1)
        layers = attention_weights(model.token_decoder, padded[own], None if mask is None else mask[own])
        rows.append(torch.stack([weights[0].mean(dim=0).cpu() for weights in layers]))
    return torch.stack(rows, dim=1)


def padding_mask(model: DOVE, lengths: Tensor, most: int) -> Tensor | None:
    """Return the token decoder's `key_mask` (B, most) for lengths (B,); None where padding is attended to."""
    if model.config.decoder_attends_padding:
        return None
    return torch.arange(most, device=lengths.device) < lengths[:, None]
