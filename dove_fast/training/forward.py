"""The forward that is trained: only the positions that a loss depends on, with gradients.

Steps behind an image's last token feed nothing, so blocks of steps are computed only until it ends (`blocks`), and the
token decoder and the losses read ragged rows.
Shape suffixes: B images of S pixels a side, N features, T steps, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dove_fast.models.dove import DOVE
from dove_fast.models.gpt_neox import step_embeddings
from dove_fast.models.inputs import Query, check_device, check_images, check_length_options, check_queries
from dove_fast.ragged import RaggedTokens
from dove_fast.training.blocks import ends_at, ends_by_eos, states_in_blocks

__all__ = ["TrainingForward", "training_forward"]


# Into how many blocks T steps are divided: few, as every block copies the keys and values of the steps before it.
BLOCKS = 4


@dataclass(frozen=True)
class TrainingForward:
    """What the losses read, with a graph where a parameter needs one.

    reconstruction: (B, 3, S, S), not clamped; None where none was asked for. eos_logits: (B, T) fp32 at least, NaN
    behind each image's last token, as `losses.eos_loss` takes them. tokens: the tokens. features: (B, N, C), the
    VQGAN's. grid: (B, C, h, w), what the token decoder makes of them, before the codebook.
    positions_computed, positions_of_all: the generator's positions, and those of the plain forward.
    """

    reconstruction: Tensor | None
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
    reconstruct: Literal["graph", "values", "no"] = "graph",
) -> TrainingForward:
    """Tokenize and reconstruct a batch with gradients.

    images: (B, 3, S, S), floating in [0, 1] or uint8, on the model's device; queries: as in `DOVE.tokenize`.
    lengths: each image's number of tokens, from 1 to T; None leaves them to EOS. features: (B, N, C), where
    `model.encode(images)` is known, as with a frozen encoder; then the images are not read. block_size: steps computed
    at a time, None for a quarter of T; an image takes part in all blocks up to the one that it ends in. recompute:
    forget the generator's activations within a layer and compute them again in the backward, which takes a third more
    time for it and a fraction of the memory. reconstruct: "values" where no loss reads the reconstruction, which is
    then without a graph; "no" where nothing does.

    The same values and gradients as the plain forward over all N + L + T positions, within rounding. The VQGAN's
    encoder runs without a graph where none of its parameters needs one.
    Raises `TypeError` or `ValueError` as `DOVE.tokenize` does, but for NaN and infinity in images, which a loss shows,
    and for no images. Source: METHOD sections 2 to 4.
    """
    config = model.config
    check_images(images, config)
    check_length_options(config, None, None, None, block_size)
    if len(images) == 0:
        raise ValueError("images must have at least one row: a batch without images has no loss")
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
        ends = ends_by_eos(lambda states: model.eos_logits(states.to(model.dtype)), config.eos_threshold)
    else:
        ends = ends_at(_checked_lengths(lengths, len(prefixes), config.num_tokens))
    steps = step_embeddings(config.num_tokens, prefixes[0].shape[1], device=model.device, dtype=prefixes[0].dtype)
    states, positions = states_in_blocks(
        model.generator,
        prefixes,
        steps,
        ends,
        block_size=block_size or -(-config.num_tokens // BLOCKS),
        recompute=recompute,
    )
    counts = [len(row) for row in states]
    tokens = RaggedTokens.from_rows([row.to(model.dtype) for row in states])
    logits = model.eos_logits(tokens.values)
    padded_logits = torch.nn.utils.rnn.pad_sequence(
        [*logits.split(counts), logits.new_zeros(config.num_tokens)], batch_first=True, padding_value=float("nan")
    )[:-1]
    grid = model.grid(
        model.generation.decode(model.token_decoder, tokens, attends_padding=config.decoder_attends_padding)
    )
    reconstruction = None
    if reconstruct != "no":
        with torch.set_grad_enabled(reconstruct == "graph" and torch.is_grad_enabled()):
            reconstruction = model.render(grid)
    return TrainingForward(
        reconstruction=reconstruction,
        eos_logits=padded_logits,
        tokens=tokens,
        features=features,
        grid=grid,
        positions_computed=positions,
        positions_of_all=sum(len(prefix) + config.num_tokens for prefix in prefixes),
    )


def _checked_lengths(lengths: Sequence[int], batch: int, most: int) -> list[int]:
    counts = [int(length) for length in lengths]
    if len(counts) != batch:
        raise ValueError(f"lengths must have one entry an image, {batch}, got {len(counts)}")
    for row, count in enumerate(counts):
        if not 1 <= count <= most:
            raise ValueError(f"lengths must be from 1 to {most}, got {count} in row {row}")
    return counts
