"""Fit a cost model to the device: time blocks of a few shapes on made-up rows."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from torch import nn

from dove_fast.generation.batch import Batch, LengthRule
from dove_fast.generation.engine import Generation
from dove_fast.generation.schedule import CostModel
from dove_fast.models.gpt_neox import GPTNeoX

__all__ = ["measure_cost"]

# Rows and steps of the blocks that are timed, and how often. The smallest shows what a block costs by itself.
SHAPES = {
    "cpu": ((1, 1), (1, 16), (1, 64), (4, 32), (8, 16), (8, 64)),
    "cuda": ((1, 1), (16, 16), (64, 16), (64, 64), (256, 32)),
}
ROUNDS = 3


PARTS = ("block", "position", "pair")
# A position may not cost nothing.
TINY = 1e-12


@torch.no_grad()
def measure_cost(generation: Generation, generator: GPTNeoX, eos_head: nn.Linear, prefix: int) -> CostModel:
    """Return a `CostModel` in seconds, fitted to timed blocks of rows with `prefix` positions.

    Takes as long as the generator needs for a few thousand positions: some seconds for the base model on two cores.
    """
    device = generator.final_layer_norm.weight.device
    steps = generation.num_tokens
    # The largest first: its cache, full of noise, is lent to the others.
    shapes = sorted(SHAPES.get(device.type, SHAPES["cpu"]), reverse=True)
    seconds: dict[tuple[int, int, int], float] = {}
    # EOS is decided and read, and never comes.
    rule = LengthRule(steps, 1 - 1e-9)
    for rows, count in shapes:
        count = min(count, steps)
        # Early and late blocks differ by the keys that their queries meet.
        for start in sorted({0, steps - count}):
            timed: list[float] = []
            for _ in range(ROUNDS + 1):
                with generation.batch(generator, eos_head, rows, prefix, rule) as batch:
                    batch.place(range(rows), [prefix] * rows, start)
                    timed.append(_time(batch, count, first=not seconds and not timed))
            seconds[rows, start, count] = statistics.median(timed[1:])
    unit = {name: CostModel(*(1.0 if part == name else TINY for part in PARTS)) for name in PARTS}
    shares = np.array(
        [[unit[name].time(rows, prefix + start, count) for name in PARTS] for rows, start, count in seconds]
    )
    return CostModel(*_fit(shares, np.array(list(seconds.values()))), read=_read_seconds(device))


def _read_seconds(device: torch.device) -> float:
    """Return how long a device that has nothing queued takes to hand a few bytes to the host."""
    if device.type == "cpu":
        return 0.0
    small = torch.zeros(64, dtype=torch.int32, device=device)
    timed = []
    for _ in range(20):
        _wait(device)
        begin = time.perf_counter()
        small.tolist()
        timed.append(time.perf_counter() - begin)
    return statistics.median(timed)


def _fit(shares: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float]:
    """Return the non-negative factors of least relative error: parts that come out negative are left out."""
    used = list(range(shares.shape[1]))
    while True:
        factors, *_ = np.linalg.lstsq(shares[:, used] / seconds[:, None], np.ones(len(seconds)), rcond=None)
        negative = [part for part, factor in zip(used, factors, strict=True) if factor < 0]
        if not negative:
            break
        used = [part for part in used if part not in negative]
    found = [0.0] * shares.shape[1]
    for part, factor in zip(used, factors, strict=True):
        found[part] = float(factor)
    block, position, pair = found
    return block, max(position, TINY), pair


def _time(batch: Batch, count: int, *, first: bool) -> float:
    """Return the seconds of one block of `count` steps, of rows whose caches hold noise; the `first` call makes it."""
    if first:
        for tensor in (*batch.cache.keys, *batch.cache.values):
            tensor.normal_()
    device = batch.cache.cos.device
    _wait(device)
    begin = time.perf_counter()
    batch.run(count)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
