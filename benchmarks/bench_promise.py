"""The project's promise: the whole of `tokenize` takes less time than `VQModel.encode` alone.

    pytest benchmarks/bench_promise.py --benchmark-only --batch 8 --benchmark-json=figures.json

Images to variable-length tokens, mean length 96, against diffusers' encoder, which gives no tokens yet: the same
weights, images and dtype. Each side has a process of its own, so that malloc's settings are its own too: ours with
`keep_freed_memory()`, as the commands run; the rival as it comes, then with the same settings, then in channels-last
with them. bf16 needs a processor with its instructions. Lengths are forced, as in bench_generator.py.
Before anything is timed, the features are compared with the rival's, and the tokens with those of transformers' pass
over all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from forced_lengths import draw, forced, spread
from processes import Remote
from tolerances import RELATIVE, assert_close, relative_error
from torch import Tensor
from upstream import AMUSED_VQ, PYTHIA_70M, make_neox, make_vq, plain_convolutions

import dove_fast
from dove_fast import DOVE, DOVEConfig
from dove_fast.generation import LengthHistogram
from dove_fast.models.gpt_neox import step_embeddings

MEAN = 96
RIVALS = {
    # name: (channels-last, keeps freed memory)
    "as it comes": (False, False),
    "same malloc": (False, True),
    "channels-last, same malloc": (True, True),
}


def pictures(batch: int) -> Tensor:
    """Return images (B, 3, 256, 256) in [0, 1]."""
    return torch.rand(batch, 3, 256, 256, generator=torch.Generator().manual_seed(5))


def numbers(tensor: Tensor) -> np.ndarray:
    """Return what travels between processes."""
    return tensor.float().numpy()


def encoder(batch: int, dtype: torch.dtype, channels_last: bool, keep: bool) -> tuple[Callable[[], Any], ...]:
    """Diffusers' encoder; reports its features of the first image in fp32's arithmetic and in `dtype`'s."""
    if keep:
        assert dove_fast.keep_freed_memory()
    vq = make_vq(0, **AMUSED_VQ)
    images = pictures(batch)
    with plain_convolutions():
        exact = vq.encode(images[:1]).latents
    vq.to(dtype)
    images = images.to(dtype)
    if channels_last:
        vq.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)

    def report() -> tuple[np.ndarray, np.ndarray]:
        with plain_convolutions():
            return numbers(exact), numbers(vq.encode(images[:1]).latents)

    return lambda: vq.encode(images), report


def tokenizer(batch: int, dtype: torch.dtype) -> tuple[Callable[[], Any], ...]:
    """Ours, whole; reports its features of the first image and the lengths, once the tokens were compared."""
    assert dove_fast.keep_freed_memory()
    torch.manual_seed(3)
    ours = DOVE(DOVEConfig.base()).eval()
    theirs = make_neox(1, **PYTHIA_70M)
    ours.vqgan.load_state_dict(make_vq(0, **AMUSED_VQ).state_dict())
    ours.generator.load_state_dict(theirs.state_dict())
    ours.to(dtype)
    images = pictures(batch).to(dtype)
    steps = ours.config.num_tokens
    lengths = spread("gamma", MEAN, steps, batch)
    ours.generation.learning = False
    ours.measure_cost()
    ours.generation.histogram = LengthHistogram(steps, draw("gamma", MEAN, steps))

    def run() -> list[Tensor]:
        with forced(lengths):
            return list(ours.tokenize(images))

    def report() -> tuple[np.ndarray, list[int]]:
        with plain_convolutions():
            features = ours.encode(images[:1])
        tokens = run()
        prefix = ours.in_proj(ours.encode(images)).float()
        inputs = torch.cat(
            [prefix, step_embeddings(steps, 512, device=prefix.device, dtype=prefix.dtype).expand(batch, -1, -1)], dim=1
        )
        exact = theirs(inputs_embeds=inputs).last_hidden_state[:, prefix.shape[1] :]
        expected = torch.cat([row[:n] for row, n in zip(exact, lengths, strict=True)])
        if dtype == torch.float32:
            assert_close(torch.cat(tokens), expected)
        else:
            half = theirs.to(dtype)(inputs_embeds=inputs.to(dtype)).last_hidden_state[:, prefix.shape[1] :]
            allowed = relative_error(torch.cat([row[:n] for row, n in zip(half, lengths, strict=True)]), expected)
            theirs.float()
            assert relative_error(torch.cat(tokens), expected) <= 1.5 * allowed
        side = ours.config.grid_size
        return numbers(features.transpose(1, 2).unflatten(2, (side, side)).contiguous()), [len(row) for row in tokens]

    return run, report


@pytest.mark.parametrize("rival", list(RIVALS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_tokenize_against_the_encoder(compare, device, batch, request, dtype, rival) -> None:
    """Images to tokens, whole, against `VQModel.encode` alone: above 1 the adaptive tokens cost less than nothing."""
    if device.type != "cpu":
        pytest.skip("malloc's settings are for a CPU; bench_pipeline.py has the GPU's figures")
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no instructions for bf16: both sides would emulate it")
    if request.config.getoption("--quick") and (dtype, rival) != (torch.float32, "as it comes"):
        pytest.skip("large; --quick leaves it out")
    with Remote(tokenizer, batch, dtype) as ours, Remote(encoder, batch, dtype, *RIVALS[rival]) as theirs:
        features, lengths = ours.report()
        exact, expected = theirs.report()
        features, exact, expected = map(torch.from_numpy, (features, exact, expected))
        if dtype == torch.float32:
            assert_close(features, expected)
        else:
            assert relative_error(features, exact) <= max(relative_error(expected, exact), RELATIVE[dtype])
        compare(
            ours,
            theirs,
            rival_name=f"VQModel.encode, {rival}",
            images=batch,
            memory=False,
            mean_length=sum(lengths) / batch,
            lengths=lengths,
            dtype=str(dtype),
        )
