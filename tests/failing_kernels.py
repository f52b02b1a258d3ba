"""Triton kernels for the tests of scripts/resource_table.py: one within the rules, and one that breaks each."""

from __future__ import annotations

import triton
import triton.language as tl

from dove_fast.ops.launch import KernelCase, Tile


@triton.jit
def _store(out, value, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i[:, None] * SIZE + i[None, :], value)


@triton.jit
def product_kernel(a, b, out, steps, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        offset = step * SIZE * SIZE + i[:, None] * SIZE + i[None, :]
        total = tl.dot(tl.load(a + offset), tl.load(b + offset), total, input_precision=PRECISION)
    _store(out, total, SIZE)


@triton.jit
def rotate_kernel(x, out, steps, SIZE: tl.constexpr):
    """Carries three tiles through a loop: with one warp and SIZE = 64 they are 384 registers a thread."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    first, second, third = tl.load(x + at), tl.load(x + at + 1), tl.load(x + at + 2)
    for step in range(steps):
        first, second, third = second, third, first + tl.load(x + at + step)
    _store(out, first + second * third, SIZE)


def cases() -> list[KernelCase]:
    types = {"a": "*fp32:16", "b": "*fp32:16", "out": "*fp32:16", "steps": "i32"}

    def product(name: str, size: int, precision: str, stages: int = 1, **rest: object) -> KernelCase:
        tile = Tile({"SIZE": size, "PRECISION": precision}, num_warps=4, num_stages=stages)
        return KernelCase(name, product_kernel, types, tile, archs=(80, 90), **{"tensor_cores": True, **rest})

    def rotate(name: str, **rest: object) -> KernelCase:
        tile = Tile({"SIZE": 64}, num_warps=1, num_stages=1)
        return KernelCase(name, rotate_kernel, {"x": "*fp32:16", "out": "*fp32:16", "steps": "i32"}, tile, **rest)

    return [
        product("good", 64, "tf32"),
        product("FFMA only", 32, "ieee"),
        product("FFMA only, as meant", 32, "ieee", tensor_cores=False),
        product("too much shared memory", 64, "tf32", stages=9),
        rotate("spills", archs=(80,)),
        rotate("spills, as allowed", archs=(80,), spill_bytes=1 << 12),
        KernelCase("wrong arguments", product_kernel, {"c": "i32"}, Tile({}), archs=(80,)),
        product("good, but slow", 64, "tf32", stages=2, slow=True),
    ]
