"""The token decoder of `DOVE.decode` against that of `decode_padded` and transformers' `GPTNeoXModel`, base sizes.

    pytest benchmarks/bench_token_decoder.py --benchmark-only --benchmark-json=figures.json

Every side starts from ragged tokens and ends with states (B, T, d): the rivals pad them first, as they must. Lengths
are spread by a quarter around their mean. GFLOP/s count what ours computes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerances import assert_close, relative_error
from torch import Tensor
from transformers import GPTNeoXModel
from upstream import PYTHIA_70M, make_bidirectional, make_neox

from dove_fast import DOVEConfig
from dove_fast.evaluation.cost import token_decoder_flop
from dove_fast.generation import Generation
from dove_fast.models.gpt_neox import GPTNeoX
from dove_fast.ragged import RaggedTokens


def large(value: int) -> Any:
    """Return a size that --quick leaves out."""
    return pytest.param(value, id=str(value), marks=pytest.mark.large)


RATE = {torch.float32: "gflops_tf32", torch.bfloat16: "gflops_16bit"}

dtypes = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.large)]
)
# What --quick leaves out: on a shared CPU eight images take seconds a call.
means = pytest.mark.parametrize("mean", [large(32), 96, large(256)])
batches = pytest.mark.parametrize("images", [1, large(8), large(32)])
readings = pytest.mark.parametrize("attends_padding", [True, False], ids=["padding", "deaf"])


@dataclass
class Sides:
    """The same weights on both sides."""

    ours: GPTNeoX
    theirs: GPTNeoXModel
    generation: Generation


@pytest.fixture(scope="module")
def sides(device: torch.device) -> Sides:
    """Return random ones in fp32."""
    config = DOVEConfig.base()
    theirs = make_bidirectional(make_neox(2, vocab_size=8, **PYTHIA_70M)).to(device)
    ours = GPTNeoX(config.token_decoder, causal=False).to(device).eval()
    weights = theirs.state_dict()
    del weights["embed_in.weight"]
    ours.load_state_dict(weights)
    return Sides(ours, theirs, Generation(config.num_tokens))


def spread_lengths(images: int, mean: int, most: int) -> list[int]:
    """Return lengths from 3/4 to 5/4 of their mean; all of them T where that is the mean."""
    if mean == most:
        return [most] * images
    return torch.linspace(0.75 * mean, 1.25 * mean, images + 2)[1:-1].round().int().tolist()


def flop_of(lengths: list[int], attends_padding: bool) -> float:
    """Return what ours needs: the first layer's qkv and MLP for the tokens, everything else for all T positions."""
    config = dataclasses.replace(DOVEConfig.base(), decoder_attends_padding=attends_padding)
    return float(sum(token_decoder_flop(config, length) for length in lengths))


def random_tokens(lengths: list[int], dtype: torch.dtype, device: torch.device) -> RaggedTokens:
    """Return normal values, as behind a LayerNorm."""
    width = DOVEConfig.base().token_decoder.hidden_size
    padded = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(1))
    return RaggedTokens.from_padded(padded.to(device, dtype), lengths)


@pytest.fixture
def in_dtype(sides: Sides, dtype: torch.dtype) -> Sides:
    """Return copies of both sides in `dtype`; the rotary frequencies, a buffer of theirs, stay in fp32 as ours do."""
    if dtype == torch.float32:
        return sides
    ours, theirs = copy.deepcopy((sides.ours, sides.theirs))
    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.data = parameter.data.to(dtype)
    return Sides(ours, theirs, Generation(sides.generation.num_tokens))


def ours(sides: Sides, tokens: RaggedTokens, attends_padding: bool) -> Callable[[], Tensor]:
    """Return what `DOVE.decode` runs before `out_proj`."""
    return lambda: sides.generation.decode(sides.ours, tokens, attends_padding=attends_padding)


def check(actual: Tensor, expected: Tensor, sides: Sides, tokens: RaggedTokens, attends_padding: bool) -> None:
    """Compare, in bf16 by each side's error against fp64."""
    if actual.dtype == torch.float32:
        # On a GPU with TF32 off, as torch starts.
        assert_close(actual, expected)
        return
    exact = GPTNeoX(sides.ours.config, causal=False).to(tokens.values.device, torch.float64)
    exact.load_state_dict(sides.ours.state_dict())
    truth = padded_states(exact, tokens.to(torch.float64), attends_padding)
    assert relative_error(actual, truth) <= 1.5 * relative_error(expected, truth)


def padded_states(decoder: GPTNeoX, tokens: RaggedTokens, attends_padding: bool) -> Tensor:
    """Return what `decode_padded` runs before `out_proj`."""
    positions = DOVEConfig.base().num_tokens
    padded, lengths = tokens.to_padded(positions)
    mask = None
    if not attends_padding:
        mask = torch.arange(positions, device=padded.device) < lengths[:, None]
    return decoder(padded, mask)


@readings
@dtypes
@means
@batches
@torch.no_grad()
def bench_against_padded(
    in_dtype: Sides, images: int, mean: int, dtype: torch.dtype, attends_padding: bool, device: torch.device, compare
) -> None:
    """Our own oracle's token decoder."""
    lengths = spread_lengths(images, mean, DOVEConfig.base().num_tokens)
    tokens = random_tokens(lengths, dtype, device)
    run = ours(in_dtype, tokens, attends_padding)

    def rival() -> Tensor:
        return padded_states(in_dtype.ours, tokens, attends_padding)

    check(run(), rival(), in_dtype, tokens, attends_padding)
    compare(
        run,
        rival,
        rival_name="decode_padded's",
        images=images,
        flop=flop_of(lengths, attends_padding),
        rate=RATE[dtype],
        lengths=lengths,
    )


@dtypes
@means
@batches
@torch.no_grad()
def bench_against_transformers(
    in_dtype: Sides, images: int, mean: int, dtype: torch.dtype, device: torch.device, compare
) -> None:
    """`GPTNeoXModel` (sdpa, eager) made bidirectional, with zeros behind every image's tokens."""
    lengths = spread_lengths(images, mean, DOVEConfig.base().num_tokens)
    tokens = random_tokens(lengths, dtype, device)
    run = ours(in_dtype, tokens, True)

    def rival() -> Tensor:
        padded, _ = tokens.to_padded(DOVEConfig.base().num_tokens)
        return in_dtype.theirs(inputs_embeds=padded).last_hidden_state

    check(run(), rival(), in_dtype, tokens, True)
    compare(
        run,
        rival,
        rival_name="transformers",
        images=images,
        flop=flop_of(lengths, True),
        rate=RATE[dtype],
        lengths=lengths,
    )
