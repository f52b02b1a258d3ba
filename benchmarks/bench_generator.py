"""The engine's generator against one pass over all positions, and against its own blocks of fixed size.

    pytest benchmarks/bench_generator.py --benchmark-only --benchmark-json=figures.json

The rivals: transformers' `GPTNeoXModel` (sdpa, eager) over all 512 positions, which the original does ("upstream"),
and our own full pass ("oracle"). The base model, random weights, fp32, or bf16 on a GPU. Lengths are forced: EOS is
computed, decided and read as ever, and then replaced by a length that was drawn, so that both sides know which tokens
are asked for. The schedule knows the distribution that the lengths were drawn from, and the device's costs.
Every token is compared with the rival's before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from transformers import GPTNeoXModel
from upstream import PYTHIA_70M, make_neox

from dove_fast import DOVE, DOVEConfig, RaggedTokens
from dove_fast.generation import LengthHistogram
from dove_fast.generation.engine import Batch, LengthRule, generate
from dove_fast.models.gpt_neox import step_embeddings

STEPS, PREFIX, WIDTH = 256, 256, 512
# (B, mean length, distribution)
GAMMA = [(batch, mean, "gamma") for batch in (1, 8, 32) for mean in (32, 96, 160, 256)]
OTHERS = [(8, 96, "uniform"), (8, 144, "two"), (8, 96, "same")]


def draw(distribution: str, mean: int, count: int, seed: int) -> list[int]:
    """Return `count` lengths from 1 to T.

    gamma: shape 4, a spread of half the mean, cut at T; uniform: from 1 to twice the mean; two: a tenth of the mean or
    T; same: the mean. A mean of T is T for all.
    """
    random = np.random.default_rng(seed)
    if mean == STEPS or distribution == "same":
        return [mean] * count
    if distribution == "gamma":
        lengths = random.gamma(4.0, mean / 4.0, count)
    elif distribution == "uniform":
        lengths = random.uniform(1, 2 * mean, count)
    else:
        short = mean / 10
        lengths = np.where(random.random(count) < (mean - short) / (STEPS - short), STEPS, short)
    return [int(length) for length in np.clip(np.round(lengths), 1, STEPS)]


@contextmanager
def forced(lengths: list[int]) -> Iterator[None]:
    """Give row `key` lengths[key] tokens, whatever EOS says; what that costs stays."""
    decide = Batch._lengths

    def decide_and_replace(self, states, positions, rows, counts):
        decide(self, states, positions, rows, counts)
        return [
            lengths[row.key] if row.step + count >= lengths[row.key] else 0
            for row, count in zip(rows, counts, strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "_lengths", decide_and_replace)
        yield


@dataclass
class Sides:
    """The same weights on both sides."""

    ours: DOVE
    theirs: GPTNeoXModel

    def engine(self, prefixes: Tensor, block_size: int | None) -> RaggedTokens:
        """Return the engine's tokens."""
        rule = LengthRule(STEPS, self.ours.config.eos_threshold)
        ours = self.ours
        tokens, _ = generate(ours.generation, ours.generator, ours.eos_head, list(prefixes), rule, block_size)
        return tokens

    def one_pass(self, stack: Callable[[Tensor], Tensor], prefixes: Tensor) -> Tensor:
        """Return all states (B, T, d)."""
        steps = step_embeddings(STEPS, WIDTH, device=prefixes.device, dtype=prefixes.dtype)
        inputs = torch.cat([prefixes, steps.expand(len(prefixes), -1, -1)], dim=1)
        return stack(inputs)[:, PREFIX:]

    def rival(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return the stack that a rival runs."""
        if name == "oracle":
            return self.ours.generator
        return lambda inputs: self.theirs(inputs_embeds=inputs, use_cache=False).last_hidden_state


@pytest.fixture(scope="module")
def sides(device: torch.device) -> Sides:
    """Return both sides, in fp32 on a CPU and in bf16 on a GPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    theirs = make_neox(1, **PYTHIA_70M).to(device, dtype)
    torch.manual_seed(3)
    ours = DOVE(DOVEConfig.base()).to(device, dtype).eval()
    ours.generator.load_state_dict(theirs.state_dict())
    ours.generation.learning = False
    ours.measure_cost()
    return Sides(ours, theirs)


def run(sides: Sides, compare, device, batch: int, mean: int, distribution: str, block_size: int | None, rival: str):
    """Compare, then time."""
    random = torch.Generator().manual_seed(batch)
    prefixes = torch.randn(batch, PREFIX, WIDTH, generator=random).to(device, sides.ours.dtype)
    lengths = draw(distribution, mean, batch, seed=batch)
    sides.ours.generation.histogram = LengthHistogram(STEPS, draw(distribution, mean, 10000, seed=99))
    stack = sides.rival(rival)
    with forced(lengths):
        tokens = sides.engine(prefixes, block_size)
        expected = sides.one_pass(stack, prefixes)
        assert list(tokens.host_lengths) == lengths
        assert_close(tokens.values, torch.cat([row[:n] for row, n in zip(expected, lengths, strict=True)]))
        compare(
            lambda: sides.engine(prefixes, block_size),
            lambda: sides.one_pass(stack, prefixes),
            rival_name=rival,
            images=batch,
            batch_size=batch,
            mean_length=sum(lengths) / batch,
            asked_mean=mean,
            distribution=distribution,
            longest=max(lengths),
            block_size=block_size,
        )


def _cases(cases):
    # One small case is left for --quick.
    return [pytest.param(*case, marks=[] if case == (1, 96, "gamma") else pytest.mark.large) for case in cases]


@pytest.mark.parametrize(("images", "mean", "distribution"), _cases([*GAMMA, *OTHERS]))
@torch.no_grad()
def bench_schedule_against_upstream(sides, compare, device, images, mean, distribution) -> None:
    """Blocks by the schedule against transformers' full pass."""
    run(sides, compare, device, images, mean, distribution, None, "upstream")


@pytest.mark.parametrize(("images", "mean", "distribution"), _cases([*GAMMA, *OTHERS]))
@torch.no_grad()
def bench_schedule_against_oracle(sides, compare, device, images, mean, distribution) -> None:
    """Blocks by the schedule against our own full pass: at least 0.95 everywhere."""
    run(sides, compare, device, images, mean, distribution, None, "oracle")


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(("images", "mean", "distribution"), _cases([case for case in GAMMA if case[0] < 32]))
@torch.no_grad()
def bench_fixed_against_upstream(sides, compare, device, images, mean, distribution, block_size) -> None:
    """Blocks of a fixed size against transformers' full pass: what the schedule has to beat."""
    run(sides, compare, device, images, mean, distribution, block_size, "upstream")
