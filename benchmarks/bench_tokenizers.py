"""The table of tokenizers: DOVE, the VQGAN it wraps, and its neighbours, each against `VQModel.encode` as it comes.

    pytest benchmarks/bench_tokenizers.py --benchmark-only --batch 8 --benchmark-json=figures.json
    python benchmarks/tokenizer_table.py figures.json

Images to tokens alone; nobody decodes, unless it has to in order to know a length. Every row is timed in turn with
diffusers' encoder as it comes, of the same images, dtype and (where it has the same parts) weights; the first row is
that encoder against itself, which shows the noise. On a CPU all others keep freed memory in their processes
(`dove_fast.keep_freed_memory()`), the neighbours too, and diffusers once more. fp32 on a CPU, bf16 on a GPU.

DOVE's lengths are imposed: gamma-distributed with mean 96 of 256, the decisions computed all the same. The engine's
schedule is given the distribution that they are drawn from and costs measured on the device (`DOVE.measure_cost`); in
use it learns the first from the images before, and has the second where it is asked to measure. TiTok and ALIT are
shapes (benchmarks/neighbours): the published sizes, random weights, plain torch, so plain `nn.Linear` too, where on a
CPU the engine multiplies weights that oneDNN laid out once (bench_linear.py has what that is worth); "ALIT, lengths
chosen" gets DOVE's lengths in whole rollouts, so it pays for its pictures at the rollouts until then.

On a CPU `--batch 8` computes some 370 TFLOP with checks and warm-up, half of them for ALIT: half an hour at 200
GFLOP/s. `--batch 2` takes a quarter of that, `-k "base and not ALIT"` less than half.

Before anything is timed: our features are diffusers', the engine's tokens the oracle's, a neighbour's batch its rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from neighbours import sides
from processes import Remote
from tokenizer_facts import Facts
from tokenizer_sides import diffusers_vqgan, dove, lengths_of, our_vqgan
from tolerances import RELATIVE, assert_close, relative_error

RIVAL_ROW = "VQGAN, diffusers, as it comes"
ROWS = {
    RIVAL_ROW: functools.partial(diffusers_vqgan, keep=False),
    "VQGAN, diffusers, freed memory kept": functools.partial(diffusers_vqgan, keep=True),
    "VQGAN, ours": our_vqgan,
    "DOVE, oracle": functools.partial(dove, engine="oracle"),
    "DOVE, engine": functools.partial(dove, engine="blocks"),
    "TiTok-L-32, shape": functools.partial(sides.titok, name="TiTok-L-32"),
    "TiTok-B-64, shape": functools.partial(sides.titok, name="TiTok-B-64"),
    "TiTok-S-128, shape": functools.partial(sides.titok, name="TiTok-S-128"),
    "ALIT, shape, 2 rollouts": functools.partial(sides.alit, rollouts=2),
    "ALIT, shape, 4 rollouts": functools.partial(sides.alit, rollouts=4),
    "ALIT, shape, 8 rollouts": functools.partial(sides.alit, rollouts=8),
    "ALIT, shape, lengths chosen": sides.alit_chosen,
}


@pytest.fixture(scope="module", params=[pytest.param("base", marks=pytest.mark.large), "small"])
def size(request: pytest.FixtureRequest) -> str:
    """Return which sizes are measured: the published ones, or those of --quick, whose figures mean nothing."""
    return request.param


@pytest.fixture(scope="module")
def rival(device: torch.device, batch: int, size: str) -> Iterator[Remote]:
    """Return diffusers' encoder as it comes, one process for all rows of a size."""
    with Remote(ROWS[RIVAL_ROW], size, batch, dtype_on(device), str(device)) as remote:
        yield remote


def dtype_on(device: torch.device) -> torch.dtype:
    """Return what is measured on a device."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@pytest.mark.parametrize("row", ROWS)
def bench_tokenizer(compare, device, batch, size, rival, row) -> None:
    """Images to tokens against diffusers' encoder, which gives none yet."""
    dtype = dtype_on(device)
    if row == RIVAL_ROW:
        facts, _ = rival.report()
        measure(compare, rival, rival, facts, row=row, batch=batch, size=size, dtype=dtype)
        return
    build = ROWS[row]
    if build is sides.alit_chosen:
        build = functools.partial(build, lengths=lengths_of(size, batch))
    with Remote(build, size, batch, dtype, str(device)) as ours:
        facts, features = ours.report()
        if features is not None:
            check_features(features, rival.report()[1], dtype)
        measure(compare, ours, rival, facts, row=row, batch=batch, size=size, dtype=dtype)


def measure(compare, ours: Remote, rival: Remote, facts: Facts, *, row: str, batch: int, size: str, dtype) -> None:
    """Time a row in turn with the rival, and record its facts with the figures."""
    compare(
        ours,
        rival,
        rival_name="VQModel.encode, as it comes",
        images=batch,
        flop=facts.flop * batch,
        rate="gflops" if dtype == torch.float32 else "gflops_16bit",
        memory=False,
        row=row,
        size=size,
        batch=batch,
        dtype=str(dtype),
        facts=dataclasses.asdict(facts),
    )


def check_features(found, expected, dtype: torch.dtype) -> None:
    """Compare features with the rival's; in bf16 they may be no farther from fp32's than the rival's own are."""
    features, exact, theirs = map(torch.from_numpy, (found[1], expected[0], expected[1]))
    if dtype == torch.float32:
        assert_close(features, theirs)
    else:
        assert relative_error(features, exact) <= max(relative_error(theirs, exact), RELATIVE[dtype])
