"""One tokenization at full length gives every other length: tokens are causal.

A token depends on the image, its query and its index alone, so the first n of T tokens are those of
`DOVE.tokenize(length=n)`, but for the rounding of other blocks of steps. EOS, read off the same tokens, gives the
length that `DOVE.tokenize` would choose, unless a logit comes so near to the threshold's (1e-4 in fp32) that rounding
decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dove_fast.evaluation.results import Lengths
from dove_fast.models.dove import DOVE
from dove_fast.models.lengths import eos_lengths
from dove_fast.ragged import RaggedTokens

__all__ = [
    "EIGHTHS",
    "check_lengths",
    "default_lengths",
    "eos_prefixes",
    "prefixes",
    "summarize_lengths",
]

EIGHTHS = 8
PERCENTILES = (5, 25, 50, 75, 95)


def default_lengths(num_tokens: int) -> tuple[int, ...]:
    """Return 1/8, 2/8, .. 8/8 of T = `num_tokens`, rounded down, at least 1 and each once."""
    return tuple(sorted({max(1, num_tokens * eighths // EIGHTHS) for eighths in range(1, EIGHTHS + 1)}))


def check_lengths(lengths: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    """Return lengths, sorted and each once. Raises `ValueError` for none, or one that is not from 1 to `num_tokens`."""
    if not lengths:
        raise ValueError("lengths must name at least one token count, got none")
    for length in lengths:
        if not 1 <= length <= num_tokens:
            raise ValueError(f"lengths must be from 1 to this model's {num_tokens}, got {length}")
    return tuple(sorted(set(lengths)))


def prefixes(tokens: Tensor, length: int) -> RaggedTokens:
    """Keep the first `length` of all tokens (B, T, d) of each image."""
    return RaggedTokens.from_padded(tokens, [length] * len(tokens))


def eos_prefixes(model: DOVE, tokens: Tensor, threshold: float) -> RaggedTokens:
    """Keep those of all tokens (B, T, d) of each image that EOS at `threshold` keeps, 1 to T."""
    return RaggedTokens.from_padded(tokens, eos_lengths(model.eos_logits(tokens).float(), threshold))


def summarize_lengths(lengths: Tensor, num_tokens: int) -> Lengths:
    """Return the mean, percentiles that are lengths that occur, and the histogram over 1 to T of lengths (n,)."""
    ordered = lengths.cpu().sort().values
    # As numpy's method "nearest": the value whose place is nearest.
    percentiles = {percent: float(ordered[round(percent / 100 * (len(ordered) - 1))]) for percent in PERCENTILES}
    counts = torch.bincount(ordered, minlength=num_tokens + 1)[1:]
    return Lengths(float(ordered.double().mean()), percentiles, tuple(counts.tolist()))
