"""The engine's generator against one pass over all positions, and against its own blocks of fixed size.

    pytest benchmarks/bench_generator.py --benchmark-only --benchmark-json=figures.json

The rivals: transformers' `GPTNeoXModel` (sdpa, eager) over all 512 positions, which the original does ("upstream"), on
a GPU also compiled ("max-autotune"), and our own full pass ("oracle"). `--cuda-graphs` lets ours replay graphs. The
base model, random weights, fp32, or bf16 on a GPU. Lengths are forced: EOS is computed, decided and read as ever, and
then replaced by a length that was chosen, so that both sides know which tokens are asked for. The schedule knows the
distribution that the lengths stand for, and the device's costs. Every token is compared with the rival's before
anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from forced_lengths import draw, forced, spread
from tolerances import assert_close
from torch import Tensor
from transformers import GPTNeoXModel
from upstream import PYTHIA_70M, make_neox

from dove_fast import DOVE, DOVEConfig, RaggedTokens
from dove_fast.generation import LengthHistogram
from dove_fast.generation.batch import LengthRule
from dove_fast.generation.engine import generate
from dove_fast.models.gpt_neox import step_embeddings

STEPS, PREFIX, WIDTH = 256, 256, 512
SINGLE_IMAGES = 5
# (B, mean length, distribution)
BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 64, 256)}
GAMMA = [(batch, mean, "gamma") for batch in (1, 8, 32, 64, 256) for mean in (32, 96, 160, 256)]
OTHERS = [(8, 96, "uniform"), (8, 144, "two"), (8, 96, "same")]


@dataclass
class Sides:
    """The same weights on both sides."""

    ours: DOVE
    theirs: GPTNeoXModel
    steps: Tensor

    def engine(self, prefixes: Tensor, block_size: int | None) -> RaggedTokens:
        """Return the engine's tokens."""
        rule = LengthRule(STEPS, self.ours.config.eos_threshold)
        ours = self.ours
        tokens, _ = generate(ours.generation, ours.generator, ours.eos_head, list(prefixes), rule, block_size)
        return tokens

    def one_pass(self, stack: Callable[[Tensor], Tensor], prefixes: Tensor) -> Tensor:
        """Return all states (B, T, d)."""
        inputs = torch.cat([prefixes, self.steps.expand(len(prefixes), -1, -1)], dim=1)
        return stack(inputs)[:, PREFIX:]

    def rival(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return the stack that a rival runs."""
        if name == "oracle":
            return self.ours.generator
        if name == "compiled":
            # Anew for this batch size: a second one would make its shapes dynamic.
            torch._dynamo.reset()
            compiled = torch.compile(self.theirs, mode="max-autotune", dynamic=False)
            return lambda inputs: compiled(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return lambda inputs: self.theirs(inputs_embeds=inputs, use_cache=False).last_hidden_state


@pytest.fixture(scope="module")
def sides(device: torch.device, request: pytest.FixtureRequest) -> Sides:
    """Return both sides, in fp32 on a CPU and in bf16 on a GPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    theirs = make_neox(1, **PYTHIA_70M).to(device, dtype)
    torch.manual_seed(3)
    ours = DOVE(DOVEConfig.base()).to(device, dtype).eval()
    ours.generator.load_state_dict(theirs.state_dict())
    ours.generation.learning = False
    ours.generation.cuda_graphs = request.config.getoption("--cuda-graphs")
    ours.measure_cost()
    return Sides(ours, theirs, step_embeddings(STEPS, WIDTH, device=device, dtype=dtype))


def run(sides: Sides, compare, device, batch: int, mean: int, distribution: str, block_size: int | None, rival: str):
    """Compare, then time."""
    if batch not in BATCHES[device.type]:
        pytest.skip("sized for another device")
    random = torch.Generator().manual_seed(batch)
    # One length does not stand for a distribution: single images are several, one after the other.
    images = batch if batch > 1 else SINGLE_IMAGES
    prefixes = torch.randn(images, PREFIX, WIDTH, generator=random).to(device, sides.ours.dtype)
    lengths = spread(distribution, mean, STEPS, images)
    sides.ours.generation.histogram = LengthHistogram(STEPS, draw(distribution, mean, STEPS))
    stack = sides.rival(rival)
    batches = [(prefixes[at : at + batch], lengths[at : at + batch]) for at in range(0, images, batch)]

    def ours() -> RaggedTokens:
        parts = []
        for some, theirs in batches:
            with forced(theirs):
                parts.append(sides.engine(some, block_size))
        return RaggedTokens.cat(parts)

    def theirs() -> list[Tensor]:
        return [sides.one_pass(stack, some) for some, _ in batches]

    # With graphs the first call runs as it is, the second is recorded, the third is what is timed.
    for _ in range(3 if sides.ours.generation.cuda_graphs else 1):
        tokens = ours()
    expected = torch.cat(theirs())
    assert list(tokens.host_lengths) == lengths
    assert_close(tokens.values, torch.cat([row[:n] for row, n in zip(expected, lengths, strict=True)]))
    compare(
        ours,
        theirs,
        rival_name=rival,
        # Measured behind a first call, the peaks would leave out what the engine keeps.
        memory=False,
        images=images,
        batch_size=batch,
        mean_length=sum(lengths) / images,
        asked_mean=mean,
        distribution=distribution,
        longest=max(lengths),
        block_size=block_size,
        cuda_graphs=sides.ours.generation.cuda_graphs,
    )


def _cases(cases):
    # One small case is left for --quick.
    return [pytest.param(*case, marks=[] if case == (1, 96, "gamma") else pytest.mark.large) for case in cases]


@pytest.mark.parametrize(("images", "mean", "distribution"), _cases([*GAMMA, *OTHERS]))
@torch.no_grad()
def bench_schedule_against_upstream(sides, compare, device, images, mean, distribution) -> None:
    """Blocks by the schedule against transformers' full pass."""
    run(sides, compare, device, images, mean, distribution, None, "upstream")


@pytest.mark.parametrize(("images", "mean", "distribution"), _cases(GAMMA))
@torch.no_grad()
def bench_schedule_against_compiled(sides, compare, device, images, mean, distribution) -> None:
    """Blocks by the schedule against transformers' full pass, compiled."""
    if device.type == "cpu":
        pytest.skip("for GPUs")
    run(sides, compare, device, images, mean, distribution, None, "compiled")


@pytest.mark.parametrize(("images", "mean", "distribution"), _cases([*GAMMA, *OTHERS]))
@torch.no_grad()
def bench_schedule_against_oracle(sides, compare, device, images, mean, distribution) -> None:
    """Blocks by the schedule against our own full pass: at least 0.95 everywhere."""
    run(sides, compare, device, images, mean, distribution, None, "oracle")


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(("images", "mean", "distribution"), _cases([case for case in GAMMA if case[0] in (1, 8, 64)]))
@torch.no_grad()
def bench_fixed_against_upstream(sides, compare, device, images, mean, distribution, block_size) -> None:
    """Blocks of a fixed size against transformers' full pass: what the schedule has to beat."""
    run(sides, compare, device, images, mean, distribution, block_size, "upstream")
