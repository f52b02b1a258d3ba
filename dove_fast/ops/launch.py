"""How Triton kernels are found, described and launched.

An op's `triton_kernel.py` imports triton, so it is imported when it is first called (`deferred`). It holds the kernels,
the functions that launch them, and `cases()`: every configuration that they are launched with, which the resource table
compiles ahead of time (`scripts/resource_table.py`). Launches and cases take their `Tile`s from one place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "ARCHS",
    "TRITON_TYPES",
    "KernelCase",
    "Tile",
    "arch_of",
    "deferred",
    "interpreted",
    "launch",
    "num_processors",
    "why_no_triton",
]

# The compute capabilities that every kernel is compiled for in the tests.
ARCHS = (80, 90, 100)

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Tile:
    """The compile-time side of a launch: the kernel's constexpr arguments, warps a program, and pipeline stages."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class KernelCase:
    """One kernel as some call launches it.

    `name` is unique, such as "vq_lookup/fp32/C=64"; `kernel` the `triton.jit` function; `types` the type of each
    argument that is not in `tile.constants`, by name, as Triton writes it: "*fp32", "i32", with ":16" behind it where
    the address or number is always a multiple of 16. `tensor_cores`: matrix products that must run on them.
    `archs`: the compute capabilities that this tile is launched on. `slow` cases are compiled by `-m slow` alone.
    `spill_bytes`: how much of its registers a thread may keep in memory; more than 0 needs a reason beside it.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    tile: Tile
    tensor_cores: bool = False
    archs: tuple[int, ...] = field(default=ARCHS)
    slow: bool = False
    spill_bytes: int = 0


@functools.cache
def why_no_triton() -> str | None:
    """Return why Triton kernels cannot be called, or None when they can; does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: run `pip install triton`"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: TRITON_INTERPRET=1 before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def deferred(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports `module` when it is first called, and calls its `name`."""

    @functools.cache
    def target() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    return lambda *args, **kwargs: target()(*args, **kwargs)


@functools.cache
def arch_of(device: torch.device) -> int:
    """Return the one of `ARCHS` whose matrix instructions `device` has; of the interpreter, the first.

    9.0 has its own, 10.x and 11.x have theirs; every other GPU, 12.x too, runs those of 8.0.
    """
    major = 8 if device.type != "cuda" else torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return how many multiprocessors `device` has; of the interpreter, four."""
    return 4 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, device: torch.device, *args: Any) -> None:
    """Launch `kernel` over `grid` on `device`'s current stream; `args` are its arguments before the constants."""
    # Triton launches on the current device, whatever the tensors' is.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **tile.constants, num_warps=tile.num_warps, num_stages=tile.num_stages)
