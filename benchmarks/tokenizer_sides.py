"""Rows of bench_tokenizers.py that have a VQGAN of aMUSEd's kind, each built in a process of its own.

Diffusers takes seconds to import, and only the two rows that are compared with it do so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from forced_lengths import draw, forced, spread
from tokenizer_facts import Facts, counted, parameters_of
from tolerances import assert_close
from torch import Tensor, nn

import dove_fast
import dove_fast.generation.tokenize as one_pass
from dove_fast import DOVE, DOVEConfig, RaggedTokens
from dove_fast.generation import LengthHistogram

# What a row is built of: a call to time, and one that checks it and returns its facts and its features of the first
# image, in fp32's arithmetic and in the row's dtype's.
Features = tuple[np.ndarray, np.ndarray]
Row = tuple[Callable[[], Any], Callable[[], tuple[Facts, Features | None]]]

# Mean length as a share of T: 96 of 256, as elsewhere.
MEAN_SHARE = 96 / 256


def config_of(size: str) -> DOVEConfig:
    """Return the model of a size, "base" or "small"."""
    return DOVEConfig.base() if size == "base" else DOVEConfig.tiny()


def pictures(size: str, batch: int, device: str) -> Tensor:
    """Return images (B, 3, S, S) in [0, 1]."""
    side = config_of(size).image_size
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(5)).to(device)


def lengths_of(size: str, batch: int) -> list[int]:
    """Return the lengths that are imposed on a batch: gamma-distributed, 96 of 256 on average."""
    steps = config_of(size).num_tokens
    return spread("gamma", round(MEAN_SHARE * steps), steps, batch)


def keep_memory(device: str) -> None:
    """Keep freed memory in this process, as the commands do on a CPU."""
    if device == "cpu":
        assert dove_fast.keep_freed_memory()


def diffusers_vqgan(size: str, batch: int, dtype: torch.dtype, device: str, *, keep: bool) -> Row:
    """Diffusers' `VQModel.encode` with our weights: features, no tokens yet."""
    from upstream import make_vq

    if keep:
        keep_memory(device)
    vq = make_vq(0, **dataclasses.asdict(config_of(size).vqgan))
    vq.load_state_dict(_model(size).vqgan.state_dict())
    return _encoder_row(vq.to(device), lambda x: vq.encode(x).latents, size, batch, dtype, [vq.encoder, vq.quant_conv])


def our_vqgan(size: str, batch: int, dtype: torch.dtype, device: str) -> Row:
    """Our encoder: the same features."""
    keep_memory(device)
    model = _model(size).to(device)
    side = model.config.grid_size

    def encode(images: Tensor) -> Tensor:
        return model.encode_in_chunks(images).transpose(1, 2).unflatten(2, (side, side))

    return _encoder_row(model, encode, size, batch, dtype, [model.vqgan.encoder, model.vqgan.quant_conv])


def _encoder_row(
    model: nn.Module,
    encode: Callable[[Tensor], Tensor],
    size: str,
    batch: int,
    dtype: torch.dtype,
    parts: list[nn.Module],
) -> Row:
    """Return the row of an fp32 encoder, images (B, 3, S, S) -> features (B, C, h, w), which is cast to `dtype`."""
    from promise_sides import convolutions, numbers

    device = str(next(model.parameters()).device)
    images = pictures(size, batch, device)
    with convolutions(torch.float32, device):
        exact = encode(images[:1])
    model.to(dtype)
    images = images.to(dtype)

    def run() -> Tensor:
        return encode(images)

    def report() -> tuple[Facts, Features]:
        with convolutions(dtype, device):
            found = encode(images[:1])
        features, flop = counted(run)
        return Facts(
            positions=None,
            flop=flop / batch,
            parameters=parameters_of(parts),
            tokens=features[0, 0].numel(),
            kind=_vectors(features.shape[1], dtype),
            token_bytes=features.nbytes / batch,
        ), (numbers(exact), numbers(found))

    return run, report


def dove(size: str, batch: int, dtype: torch.dtype, device: str, *, engine: str) -> Row:
    """DOVE's `tokenize` to imposed lengths, by the engine ("blocks") or by the oracle, which computes every position.

    The engine's schedule is given the distribution that the lengths are drawn from and measured costs, and on a CPU its
    linear layers run on weights in oneDNN's layout, as in use; the neighbours' are plain `nn.Linear`. The report
    compares the two, token for token, before it says anything.
    """
    keep_memory(device)
    model = _model(size).to(device, dtype)
    images = pictures(size, batch, device).to(dtype)
    lengths = lengths_of(size, batch)
    steps = model.config.num_tokens
    model.generation.learning = False
    model.measure_cost()
    model.generation.histogram = LengthHistogram(steps, draw("gamma", round(MEAN_SHARE * steps), steps))

    def tokenize(engine: str) -> tuple[RaggedTokens, int]:
        with forced(lengths), _forced_oracle(lengths):
            tokens, stats = model.tokenize(images, engine=engine, stats=True)
        return tokens, stats.positions_computed

    def report() -> tuple[Facts, None]:
        # The first call computes what is kept until the weights change; the second is what is timed.
        tokenize(engine)
        (tokens, positions), flop = counted(lambda: tokenize(engine))
        other, _ = tokenize("oracle" if engine == "blocks" else "blocks")
        assert list(tokens.host_lengths) == list(other.host_lengths) == lengths
        assert_close(tokens.values, other.values)
        width = tokens.values.shape[1]
        # No query: the embedding of the vocabulary is not read.
        stacks = [model.generator.layers, model.generator.final_layer_norm, model.in_proj, model.eos_head]
        return Facts(
            positions=positions / batch,
            flop=flop / batch,
            parameters=parameters_of([model.vqgan.encoder, model.vqgan.quant_conv, *stacks]),
            tokens=len(tokens.values) / batch,
            kind=_vectors(width, dtype),
            token_bytes=tokens.values.nbytes / batch,
        ), None

    return lambda: tokenize(engine), report


def _model(size: str) -> DOVE:
    """Return DOVE with the random weights that all rows share."""
    torch.manual_seed(3)
    return DOVE(config_of(size)).eval()


def _vectors(width: int, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} x {width}"


@contextmanager
def _forced_oracle(lengths: list[int]) -> Iterator[None]:
    """Give the oracle's rows these lengths in their order; EOS is looked for as ever, and what that costs stays."""
    rows = iter(lengths)
    found = one_pass.eos_lengths

    def lengths_instead(eos_logits: Tensor, threshold: float) -> Tensor:
        by_eos = found(eos_logits, threshold)
        return torch.tensor([next(rows) for _ in range(len(by_eos))], device=by_eos.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "eos_lengths", lengths_instead)
        yield
