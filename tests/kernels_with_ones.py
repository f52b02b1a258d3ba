"""Every Triton kernel as it is compiled where integer arguments are 1, which the interpreter does not show.

A launch compiles such an argument in, as a Python int without a tensor's methods.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

from resource_table import kernel_modules

from dove_fast.ops.launch import KernelCase


def cases() -> list[KernelCase]:
    """One case of every kernel and choice of flags: with ones for all its integers, and (slow) for each alone."""
    found = []
    for name in kernel_modules():
        seen = set()
        for case in importlib.import_module(name).cases():
            flags = {key: value for key, value in case.tile.constants.items() if isinstance(value, bool)}
            key = (case.kernel.__name__, *flags.items())
            if key not in seen:
                seen.add(key)
                found += _with_ones(case)
    return found


def _with_ones(case: KernelCase) -> Iterator[KernelCase]:
    specialised = {param.name for param in case.kernel.params if not param.do_not_specialize}
    integers = [name for name, kind in case.types.items() if kind.startswith("i") and name in specialised]
    for ones in (integers, *([name] for name in integers)):
        yield replace(
            case,
            name=f"{case.name}, 1 for {', '.join(ones)}",
            types={name: kind for name, kind in case.types.items() if name not in ones},
            tile=replace(case.tile, constants={**case.tile.constants, **dict.fromkeys(ones, 1)}),
            tensor_cores=False,
            archs=(90,),
            slow=len(ones) < len(integers),
            # Not what is looked at here: such kernels are launched on next to nothing.
            spill_bytes=1 << 20,
        )
