"""Both sides of bench_promise.py, each built in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from forced_lengths import draw, forced, spread
from tolerances import assert_close, relative_error
from torch import Tensor
from upstream import AMUSED_VQ, PYTHIA_70M, make_neox, make_vq, plain_convolutions

import dove_fast
from dove_fast import DOVE, DOVEConfig
from dove_fast.generation import LengthHistogram
from dove_fast.models.gpt_neox import step_embeddings

Functions = tuple[Callable[[], Any], Callable[[], Any]]


def pictures(batch: int, device: str) -> Tensor:
    """Return images (B, 3, 256, 256) in [0, 1]."""
    return torch.rand(batch, 3, 256, 256, generator=torch.Generator().manual_seed(5)).to(device)


def convolutions(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """In fp32 those whose rounding is the same everywhere; torch's own ones for bf16 take minutes on a CPU."""
    if device != "cpu":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return plain_convolutions() if dtype == torch.float32 else nullcontext()


def numbers(tensor: Tensor) -> np.ndarray:
    """Return what travels between processes."""
    return tensor.float().cpu().numpy()


def encoder(
    batch: int, dtype: torch.dtype, device: str, *, channels_last: bool, keep: bool, compiled: bool = False
) -> Functions:
    """Diffusers' encoder; reports its features of the first image in fp32's arithmetic and in `dtype`'s."""
    if keep:
        assert dove_fast.keep_freed_memory()
    vq = make_vq(0, **AMUSED_VQ).to(device)
    images = pictures(batch, device)
    with convolutions(torch.float32, device):
        exact = vq.encode(images[:1]).latents
    vq.to(dtype)
    images = images.to(dtype)
    if channels_last:
        vq.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    encode = torch.compile(vq.encode, mode="max-autotune") if compiled else vq.encode

    def report() -> tuple[np.ndarray, np.ndarray]:
        with convolutions(dtype, device):
            # What is timed, where that is compiled for the batch.
            found = encode(images).latents[:1] if compiled else vq.encode(images[:1]).latents
            return numbers(exact), numbers(found)

    return lambda: encode(images), report


def our_model(dtype: torch.dtype, device: str) -> DOVE:
    """Return DOVE with the rivals' weights."""
    torch.manual_seed(3)
    ours = DOVE(DOVEConfig.base()).eval()
    ours.vqgan.load_state_dict(make_vq(0, **AMUSED_VQ).state_dict())
    ours.generator.load_state_dict(make_neox(1, **PYTHIA_70M).state_dict())
    return ours.to(device, dtype)


def our_encoder(batch: int, dtype: torch.dtype, device: str) -> Functions:
    """The encoder of ours alone; reports as `encoder` does."""
    if device == "cpu":
        assert dove_fast.keep_freed_memory()
    ours = our_model(dtype, device)
    images = pictures(batch, device).to(dtype)

    def report() -> tuple[np.ndarray, np.ndarray]:
        with convolutions(dtype, device):
            features = numbers(_grid(ours, ours.encode(images[:1])))
        return features, features

    return lambda: ours.encode_in_chunks(images), report


def tokenizer(batch: int, dtype: torch.dtype, device: str, mean: int, graphs: bool = False) -> Functions:
    """Ours, whole; reports its features of the first image and the lengths, once the tokens were compared."""
    if device == "cpu":
        assert dove_fast.keep_freed_memory()
    ours = our_model(dtype, device)
    ours.generation.cuda_graphs = graphs
    images = pictures(batch, device).to(dtype)
    steps = ours.config.num_tokens
    lengths = spread("gamma", mean, steps, batch)
    ours.generation.learning = False
    ours.measure_cost()
    ours.generation.histogram = LengthHistogram(steps, draw("gamma", mean, steps))

    def run() -> list[Tensor]:
        with forced(lengths):
            return list(ours.tokenize(images))

    def report() -> tuple[np.ndarray, list[int]]:
        with convolutions(dtype, device):
            features = ours.encode(images[:1])
        # With graphs the first call runs as it is, the second is recorded, the third is what is timed.
        for _ in range(3 if graphs else 1):
            tokens = run()
        _check(torch.cat(tokens), ours.in_proj(ours.encode_in_chunks(images)), lengths)
        return numbers(_grid(ours, features)), [len(row) for row in tokens]

    return run, report


def _grid(ours: DOVE, features: Tensor) -> Tensor:
    side = ours.config.grid_size
    return features.transpose(1, 2).unflatten(2, (side, side)).contiguous()


def _check(tokens: Tensor, prefixes: Tensor, lengths: list[int]) -> None:
    """Compare with transformers' pass over all positions, in fp32; in bf16 its own error is the measure."""
    theirs = make_neox(1, **PYTHIA_70M).to(prefixes.device)
    steps = step_embeddings(256, prefixes.shape[-1], device=prefixes.device, dtype=torch.float32)
    inputs = torch.cat([prefixes.float(), steps.expand(len(prefixes), -1, -1)], dim=1)

    def one_pass(dtype: torch.dtype) -> Tensor:
        states = theirs.to(dtype)(inputs_embeds=inputs.to(dtype)).last_hidden_state[:, prefixes.shape[1] :]
        return torch.cat([row[:n] for row, n in zip(states, lengths, strict=True)])

    expected = one_pass(torch.float32)
    if tokens.dtype == torch.float32:
        assert_close(tokens, expected)
    else:
        allowed = 1.5 * relative_error(one_pass(tokens.dtype), expected)
        assert relative_error(tokens, expected) <= allowed
