"""The forward that is trained: only the positions that a loss depends on, with gradients.

Steps behind an image's last token feed nothing, so they are not computed: a pass without gradients finds the lengths,
as `DOVE.tokenize` does, and one over ragged rows computes prefix and tokens with them.
Shape suffixes: B images of S pixels a side; P positions of all rows, one row behind the other; T steps; d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dove_fast.generation.batch import LengthRule
from dove_fast.generation.engine import generate
from dove_fast.models.dove import DOVE
from dove_fast.models.gpt_neox import GPTNeoX, Layer, add_and_normalise, rotary_table, step_embeddings
from dove_fast.models.inputs import Query, check_device, check_images, check_queries
from dove_fast.ops import prefix_attention
from dove_fast.ragged import RaggedTokens

__all__ = ["TrainingForward", "training_forward"]


@dataclass(frozen=True)
class TrainingForward:
    """What the losses read, with a graph where a parameter needs one.

    reconstruction: (B, 3, S, S), not clamped. eos_logits: (B, T) fp32 at least, NaN behind each image's last token, as
    `losses.eos_loss` takes them. tokens: the tokens. features: (B, N, C), the VQGAN's.
    positions_computed, positions_of_all: the generator's positions with gradients, and those of the plain forward.
    """

    reconstruction: Tensor
    eos_logits: Tensor
    tokens: RaggedTokens
    features: Tensor
    grid: Tensor
    positions_computed: int
    positions_of_all: int

    @property
    def lengths(self) -> Tensor:
        """Each image's number of tokens, (B,) int64."""
        return self.tokens.lengths


def training_forward(
    model: DOVE,
    images: Tensor,
    queries: Sequence[Query] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    features: Tensor | None = None,
    block_size: int | None = None,
    recompute: bool = False,
) -> TrainingForward:
    """Tokenize and reconstruct a batch with gradients.

    images: (B, 3, S, S), floating in [0, 1] or uint8, on the model's device; queries: as in `DOVE.tokenize`.
    lengths: each image's number of tokens, from 1 to T; None finds them without gradients, in blocks of `block_size`
    steps; without one the schedule chooses, and `model.generation` learns what to expect. features: (B, N, C), where
    `model.encode(images)` is known, as with a frozen encoder; then the images are not read. recompute: forget the
    generator's activations within a layer and compute them again in the backward, which takes a third more time for it
    and a fraction of the memory.

    The same values and gradients as the plain forward over all N + L + T positions, within rounding. The VQGAN's
    encoder runs without a graph where none of its parameters needs one.
    Raises `TypeError` or `ValueError` as `DOVE.tokenize` does. Source: METHOD sections 2 to 4.
    """
    config = model.config
    check_images(images, config)
    check_device("images", images, model.device)
    query_ids = check_queries(queries, images.shape[0], config, model.tokenizer)
    if features is None:
        encoder = (*model.vqgan.encoder.parameters(), *model.vqgan.quant_conv.parameters())
        learns = any(parameter.requires_grad for parameter in encoder)
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            features = model.encode(images)
    elif features.shape[:2] != (images.shape[0], config.num_features):
        shape = (images.shape[0], config.num_features, config.vqgan.vq_embed_dim)
        raise ValueError(f"features must have shape {shape}, got {tuple(features.shape)}")
    prefixes = model.prefixes(features, query_ids)
    if lengths is None:
        counts = _found_lengths(model, prefixes, block_size)
    else:
        counts = _checked_lengths(lengths, len(prefixes), config.num_tokens)

    steps = step_embeddings(config.num_tokens, prefixes[0].shape[1], device=model.device, dtype=prefixes[0].dtype)
    rows = [torch.cat([prefix, steps[:count]]) for prefix, count in zip(prefixes, counts, strict=True)]
    hidden = _causal_states(model.generator, torch.cat(rows), [len(row) for row in rows], recompute=recompute)
    states = [row[-count:] for row, count in zip(hidden.split([len(row) for row in rows]), counts, strict=True)]
    tokens = RaggedTokens.from_rows([row.to(model.dtype) for row in states])
    logits = model.eos_logits(tokens.values)
    padded_logits = torch.nn.utils.rnn.pad_sequence(
        [*logits.split(counts), logits.new_zeros(config.num_tokens)], batch_first=True, padding_value=float("nan")
    )[:-1]
    grid = model.grid(
        model.generation.decode(model.token_decoder, tokens, attends_padding=config.decoder_attends_padding)
    )
    return TrainingForward(
        reconstruction=model.render(grid),
        eos_logits=padded_logits,
        tokens=tokens,
        features=features,
        grid=grid,
        positions_computed=hidden.shape[0],
        positions_of_all=sum(len(prefix) + config.num_tokens for prefix in prefixes),
    )


@torch.no_grad()
def _found_lengths(model: DOVE, prefixes: Sequence[Tensor], block_size: int | None) -> list[int]:
    rule = LengthRule(model.config.num_tokens, model.config.eos_threshold)
    rows = [prefix.detach() for prefix in prefixes]
    tokens, _ = generate(model.generation, model.generator, model.eos_head, rows, rule, block_size)
    if block_size is None:
        model.generation.learn(tokens.host_lengths, rule)
    return list(tokens.host_lengths)


def _checked_lengths(lengths: Sequence[int], batch: int, most: int) -> list[int]:
    counts = [int(length) for length in lengths]
    if len(counts) != batch:
        raise ValueError(f"lengths must have one entry an image, {batch}, got {len(counts)}")
    for row, count in enumerate(counts):
        if not 1 <= count <= most:
            raise ValueError(f"lengths must be from 1 to {most}, got {count} in row {row}")
    return counts


def _causal_states(stack: GPTNeoX, embeddings: Tensor, lengths: Sequence[int], *, recompute: bool) -> Tensor:
    """Run a causal stack over ragged rows, embeddings (P, d) -> states after the final LayerNorm (P, d)."""
    device, longest = embeddings.device, max(lengths)
    cos, sin = rotary_table(torch.arange(longest, device=device), stack.config)
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    def run(layer: Layer, for_attention: Tensor, for_mlp: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.attention
        q, k, v = attention.query_key_value(for_attention).unflatten(-1, (attention.num_heads, 3, -1)).unbind(2)
        attended = prefix_attention(q, k, v, offsets, max_seqlen=longest, cos=cos, sin=sin)
        return layer.mlp(for_mlp), attention.dense(attended.flatten(1))

    x = embeddings
    addends: tuple[Tensor, ...] = ()
    for layer in cast("Sequence[Layer]", stack.layers):
        x, for_attention, for_mlp = add_and_normalise(x, addends, layer.input_layernorm, layer.post_attention_layernorm)
        assert for_mlp is not None
        if recompute:
            addends = checkpoint(run, layer, for_attention, for_mlp, use_reentrant=False)
        else:
            addends = run(layer, for_attention, for_mlp)
    _, states, _ = add_and_normalise(x, addends, stack.final_layer_norm)
    return states
