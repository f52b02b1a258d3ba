"""Checks of what users pass to the model: every error names what came, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from dove_fast.config import DOVEConfig
from dove_fast.text import TextTokenizer

__all__ = [
    "Query",
    "check_device",
    "check_images",
    "check_length_options",
    "check_queries",
    "nonfinite_rows",
    "raise_if_nonfinite",
    "raise_if_nonfinite_tokens",
]

Query = Tensor | str | None

# How many row numbers an error message spells out.
MAX_ROWS_NAMED = 10


def check_images(images: Tensor, config: DOVEConfig) -> None:
    """Check images (B, 3, S, S), floating or uint8; raise `TypeError` or `ValueError`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be floating in [0, 1] or uint8, got {images.dtype}")
    size = config.image_size
    if images.dim() != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images must have shape (B, 3, {size}, {size}), got {tuple(images.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise `ValueError` unless `tensor` lies on `device`."""
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the model's device {device}, got {tensor.device}; move one of them with .to(...)"
        )


def nonfinite_rows(images: Tensor) -> Tensor | None:
    """Return (B,) bool on the images' device, True where an image holds NaN or infinity; None where none can."""
    if not images.is_floating_point():
        return None
    return ~torch.isfinite(images).flatten(1).all(dim=1)


def raise_if_nonfinite(flags: Tensor | None) -> None:
    """Raise `ValueError` that names the rows flagged in flags (B,); one host read, none for None."""
    if flags is None:
        return
    _raise_for_rows("images", flags.nonzero().squeeze(1).tolist())


def raise_if_nonfinite_tokens(flags: Tensor, cu_seqlens: Tensor) -> None:
    """Raise `ValueError` that names the rows of cu_seqlens (B + 1,) that hold a flagged token of flags (total,)."""
    flagged = flags.nonzero().squeeze(1)
    rows = torch.searchsorted(cu_seqlens, flagged.to(cu_seqlens.dtype), right=True) - 1
    _raise_for_rows("tokens", rows.unique().tolist())


def _raise_for_rows(name: str, rows: Sequence[int]) -> None:
    if rows:
        raise ValueError(f"{name} must be finite, got NaN or infinity in {_name_rows(rows)}")


def _name_rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:MAX_ROWS_NAMED]))
    more = f" and {len(rows) - MAX_ROWS_NAMED} more" if len(rows) > MAX_ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def check_length_options(
    config: DOVEConfig,
    length: int | None,
    max_length: int | None,
    eos_threshold: float | None,
    block_size: int | None,
) -> None:
    """Check the options that decide how many tokens an image gets; raise `TypeError` or `ValueError`."""
    if length is not None and max_length is not None:
        raise ValueError(f"give length or max_length, not both, got length={length} and max_length={max_length}")
    for name, value, limit in (
        ("length", length, config.num_tokens),
        ("max_length", max_length, config.num_tokens),
        ("block_size", block_size, None),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an int or None, got {value!r}")
        if value < 1 or (limit is not None and value > limit):
            expected = "at least 1" if limit is None else f"from 1 to {limit}, the most tokens an image can have"
            raise ValueError(f"{name} must be {expected}, got {value}")
    if eos_threshold is not None:
        if isinstance(eos_threshold, bool) or not isinstance(eos_threshold, Real):
            raise TypeError(f"eos_threshold must be a number or None, got {eos_threshold!r}")
        if not 0 < eos_threshold < 1:
            raise ValueError(f"eos_threshold must lie between 0 and 1, both excluded, got {eos_threshold}")


def check_queries(
    queries: Sequence[Query] | None, batch: int, config: DOVEConfig, tokenizer: TextTokenizer | None = None
) -> list[Tensor]:
    """Check queries and return B one-dimensional int64 CPU tensors of token ids, empty where there is no query.

    An entry is None, "", a 1-D integer tensor on any device, or text for the tokenizer. Ids on a GPU cost one read
    each. Raises `TypeError` or `ValueError` that names the row; for text also what `TextTokenizer.encode` raises
    without its library, or for a file that this cannot read.
    """
    none = torch.empty(0, dtype=torch.int64)
    if queries is None:
        return [none] * batch
    if not isinstance(queries, (list, tuple)):
        raise TypeError(f"queries must be None or a list with one entry an image, got {type(queries).__name__}")
    if len(queries) != batch:
        raise ValueError(f"queries must have one entry an image: {batch} images, got {len(queries)} queries")
    return [none if query is None else _check_query(row, query, config, tokenizer) for row, query in enumerate(queries)]


def _check_query(row: int, query: Tensor | str, config: DOVEConfig, tokenizer: TextTokenizer | None) -> Tensor:
    if isinstance(query, str):
        query = _encode(row, query, tokenizer)
    if not isinstance(query, Tensor):
        raise TypeError(f"queries[{row}] must be None, text or a 1-D tensor of token ids, got {type(query).__name__}")
    if query.is_floating_point() or query.is_complex() or query.dtype == torch.bool:
        raise TypeError(f"queries[{row}] must hold integer token ids, got {query.dtype}")
    if query.dim() != 1:
        raise ValueError(f"queries[{row}] must be 1-D, got shape {tuple(query.shape)}")
    ids = query.to(device="cpu", dtype=torch.int64)
    vocab_size = config.generator.vocab_size
    if ids.numel() and vocab_size == 0:
        raise ValueError(f"queries[{row}] holds ids, but this model has no query embedding (generator.vocab_size is 0)")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.numel():
        raise ValueError(f"queries[{row}] must hold ids from 0 to {vocab_size - 1}, got {int(outside[0])}")
    positions = config.num_features + ids.numel() + config.num_tokens
    if positions > config.generator.max_position_embeddings:
        raise ValueError(
            f"queries[{row}] must have at most "
            f"{config.generator.max_position_embeddings - config.num_features - config.num_tokens} ids "
            f"for the generator's {config.generator.max_position_embeddings} positions, got {ids.numel()}"
        )
    return ids


def _encode(row: int, text: str, tokenizer: TextTokenizer | None) -> Tensor:
    if not text:
        return torch.empty(0, dtype=torch.int64)
    if tokenizer is None:
        raise ValueError(
            f"queries[{row}] is text, but this model has no tokenizer; pass a 1-D tensor of token ids, or set "
            "model.tokenizer = dove_fast.text.TextTokenizer('tokenizer.json')"
        )
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"queries[{row}]: {error}") from error
