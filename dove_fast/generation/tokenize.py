"""Images to tokens, whole: in blocks, or every position in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dove_fast.generation.batch import LengthRule, WorkCounters
from dove_fast.generation.engine import generate
from dove_fast.models.lengths import eos_lengths
from dove_fast.ragged import RaggedTokens

if TYPE_CHECKING:
    from dove_fast.models.dove import DOVE

__all__ = ["tokenize_in_blocks", "tokenize_in_one_pass"]

# Steps a block where an image's tokens must not depend on what was learned.
DETERMINISTIC_BLOCK = 32


def tokenize_in_blocks(
    model: DOVE,
    images: Tensor,
    query_ids: Sequence[Tensor],
    rule: LengthRule,
    block_size: int | None,
    deterministic: bool,
) -> tuple[RaggedTokens, WorkCounters]:
    """The engine: all images together, or each alone where `deterministic`."""
    together = [slice(0, images.shape[0])]
    if deterministic:
        together = [slice(row, row + 1) for row in range(images.shape[0])]
        block_size = block_size or DETERMINISTIC_BLOCK
    parts = []
    counters = WorkCounters()
    for rows in together:
        # Alike in memory, too: kernels may differ by strides.
        some = images[rows].contiguous() if deterministic else images[rows]
        prefixes = model.prefixes(model.encode_in_chunks(some), query_ids[rows])
        tokens, counted = generate(
            model.generation,
            model.generator,
            model.eos_head,
            prefixes,
            rule,
            block_size,
        )
        parts.append(tokens)
        counters.add(counted)
    return RaggedTokens.cat(parts) if len(parts) > 1 else parts[0], counters


def tokenize_in_one_pass(
    model: DOVE, images: Tensor, query_ids: Sequence[Tensor], rule: LengthRule
) -> tuple[RaggedTokens, WorkCounters]:
    """The oracle: every position of every image, in chunks of bounded memory."""
    parts = []
    counters = WorkCounters()
    for rows in model.chunks(images.shape[0]):
        states, eos_logits = model.generate(model.encode(images[rows]), query_ids[rows])
        if rule.threshold is None:
            lengths = [rule.most] * states.shape[0]
        else:
            found = eos_lengths(eos_logits, rule.threshold).clamp(max=rule.most)
            counters.bytes_to_host += found.nbytes
            lengths = found.tolist()
        parts.append(RaggedTokens.from_padded(states, lengths))
        counters.blocks += 1
        counters.positions += sum(
            model.config.num_features + query.numel() + model.config.num_tokens for query in query_ids[rows]
        )
    return RaggedTokens.cat(parts), counters
