"""One small call of every op, as a table: what graphs, streams and sanitizers are tried on.

    python tests/op_calls.py [DEVICE]

makes each call once on the device, by default cuda, with every kernel that is there, and compares with the reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from tolerances import RELATIVE, assert_close
from torch import Generator, Tensor

from dove_fast import ops
from dove_fast.ops import registry

# Rows of a batch, in an order that the seed decides: the sum is always the same, as shapes in a graph are.
LENGTHS = (70, 0, 9, 33)
TOTAL, LONGEST = sum(LENGTHS), max(LENGTHS)

DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Call:
    """A call of `op`, a name of the registry, with everything that may change from call to call in tensors.

    `inputs` makes them on the CPU, of the same shapes each time; `run(backend, *inputs)` returns the outputs, and
    inputs that it writes. `kernels`: the GPU backends that read nothing on the host; `reference_reads`: the reference
    does.
    """

    name: str
    op: str
    kernels: tuple[str, ...]
    inputs: Callable[[Generator, torch.dtype], list[Tensor]]
    run: Callable[..., tuple[Tensor, ...]]
    reference_reads: bool = False

    def on(self, device: str, seed: int, dtype: torch.dtype) -> list[Tensor]:
        """Return inputs with the strides that they were made with."""
        return [t.to(device) for t in self.inputs(Generator().manual_seed(seed), dtype)]


def normal(generator: Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def shuffled(numbers: tuple[int, ...], generator: Generator) -> list[int]:
    return [numbers[i] for i in torch.randperm(len(numbers), generator=generator)]


def offsets(generator: Generator) -> Tensor:
    return torch.tensor([0, *accumulate(shuffled(LENGTHS, generator))], dtype=torch.int32)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def attention_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    """Return qkv (total, H, 3, D), cu_seqlens and the rotary tables' angles (P, R)."""
    angles = torch.rand(2 * LONGEST, 4, generator=generator)
    return [normal(generator, dtype, TOTAL, 2, 3, 16), offsets(generator), angles]


def cached_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    caches = normal(generator, dtype, 2, 6, 2, 2 * LONGEST, 16)
    slots, starts = shuffled(tuple(range(6)), generator)[: len(LENGTHS)], shuffled((0, 5, 40, 70), generator)
    return [*attention_inputs(generator, dtype), *caches.unbind(), ints(*slots), ints(*starts)]


def limited_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    return [*attention_inputs(generator, dtype), ints(*shuffled((0, 3, 20, 70), generator))]


def attend(backend: str, qkv: Tensor, cu_seqlens: Tensor, angles: Tensor) -> tuple[Tensor]:
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    return (ops.prefix_attention(*qkv.unbind(2), cu_seqlens, max_seqlen=LONGEST, **tables, backend=backend),)


def attend_cached(
    backend: str, qkv: Tensor, cu_seqlens: Tensor, angles: Tensor, keys: Tensor, values: Tensor, *rows: Tensor
) -> tuple[Tensor, ...]:
    cache = {"k_cache": keys, "v_cache": values, "slots": rows[0], "starts": rows[1]}
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    out = ops.prefix_attention(*qkv.unbind(2), cu_seqlens, max_seqlen=LONGEST, **tables, **cache, backend=backend)
    return out, keys, values


def attend_limited(backend: str, qkv: Tensor, cu_seqlens: Tensor, angles: Tensor, key_lengths: Tensor) -> tuple[Tensor]:
    options = {"causal": False, "key_lengths": key_lengths, "cos": angles.cos(), "sin": angles.sin()}
    return (ops.prefix_attention(*qkv.unbind(2), cu_seqlens, max_seqlen=LONGEST, **options, backend=backend),)


def norm_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    return [normal(generator, dtype, 2, 8, 20, 60), normal(generator, dtype, 8), normal(generator, dtype, 8)]


def channels_last_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    x, *rest = norm_inputs(generator, dtype)
    return [x.contiguous(memory_format=torch.channels_last), *rest]


def group_norm(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (ops.group_norm_silu(x, 4, weight, bias, backend=backend),)


def gradient_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    """Return grad, x, mean, rstd, weight, bias."""
    x, weight, bias = norm_inputs(generator, dtype)
    _, mean, rstd = torch.ops.dove_fast.group_norm_silu(x, 4, weight, bias, 1e-6, "silu", "reference")
    return [normal(generator, dtype, *x.shape), x, mean, rstd, weight, bias]


def channels_last_gradient_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    grad, x, *rest = gradient_inputs(generator, dtype)
    return [*(tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, x)), *rest]


def group_norm_gradients(backend: str, *arguments: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.dove_fast.group_norm_silu_backward(*arguments, "silu", backend)


def layer_norm(backend: str, x: Tensor, first: Tensor, second: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return ops.layer_norm_pair(x, *parameters, addends=(first, second), backend=backend)


def scan(backend: str, states: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor, steps: Tensor):
    return ops.eos_scan(states, cu_seqlens, weight, bias, threshold=0.97, steps=steps, max_length=100, backend=backend)


def search_inputs(generator: Generator, dtype: torch.dtype) -> list[Tensor]:
    """Return x (n, C), codewords (K, C), some of them twice, and their norms."""
    codebook = normal(generator, dtype, 150, 24)
    codebook[100:] = codebook[:50]
    return [normal(generator, dtype, TOTAL, 24), codebook, ops.codebook_squares(codebook)]


CALLS = [
    Call(
        "pack",
        "pack",
        ("cuda", "triton"),
        lambda g, dtype: [normal(g, dtype, len(LENGTHS), LONGEST, 40), offsets(g)],
        # ops.pack takes lengths on the host, which a graph cannot read again.
        lambda backend, padded, cu_seqlens: (torch.ops.dove_fast.pack(padded, cu_seqlens, TOTAL, backend),),
    ),
    Call(
        "unpack",
        "unpack",
        ("cuda", "triton"),
        lambda g, dtype: [normal(g, dtype, TOTAL, 40), offsets(g)],
        lambda backend, values, cu_seqlens: (ops.unpack(values, cu_seqlens, 64, backend=backend),),
    ),
    Call("prefix_attention", "prefix_attention", ("triton",), attention_inputs, attend),
    Call("prefix_attention_cached", "prefix_attention", ("triton",), cached_inputs, attend_cached),
    Call("prefix_attention_limited", "prefix_attention", ("triton",), limited_inputs, attend_limited),
    Call("group_norm_silu", "group_norm_silu", ("triton",), norm_inputs, group_norm),
    Call("group_norm_silu_channels_last", "group_norm_silu", ("triton",), channels_last_inputs, group_norm),
    *(
        Call(name, "group_norm_silu_backward", ("triton",), inputs, group_norm_gradients)
        for name, inputs in (
            ("group_norm_silu_backward", gradient_inputs),
            ("group_norm_silu_backward_channels_last", channels_last_gradient_inputs),
        )
    ),
    Call(
        "layer_norm_pair",
        "layer_norm_pair",
        ("triton",),
        lambda g, dtype: [normal(g, dtype, 7, 72) for _ in range(3)] + [normal(g, dtype, 72) for _ in range(4)],
        layer_norm,
    ),
    Call(
        "eos_scan",
        "eos_scan",
        ("triton",),
        lambda g, dtype: [
            normal(g, dtype, TOTAL, 40),
            offsets(g),
            normal(g, dtype, 40),
            normal(g, dtype, 1),
            ints(*shuffled((0, 16, 40, 90), g)),
        ],
        scan,
    ),
    Call(
        "vq_lookup",
        "vq_lookup",
        ("triton", "cuda"),
        search_inputs,
        lambda backend, x, codebook, squares: ops.vq_lookup(x, codebook, codebook_sq=squares, backend=backend),
        reference_reads=True,
    ),
]


def assert_agrees(result: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Assert one dtype, the same integers, and floating-point numbers within the tolerance of `dtype`."""
    assert result.dtype == wanted.dtype
    if wanted.is_floating_point():
        assert_close(result, wanted, RELATIVE[dtype])
    else:
        assert torch.equal(result, wanted)


def check(call: Call, backend: str, device: str, dtype: torch.dtype) -> None:
    """Compare a call on a device with the reference on the CPU."""
    expected = call.run("reference", *call.on("cpu", 0, dtype))
    for result, wanted in zip(call.run(backend, *call.on(device, 0, dtype)), expected, strict=True):
        assert_agrees(result.cpu(), wanted, dtype)


def main(device: str = "cuda") -> int:
    """Check every call with every kernel that is there; return how many that were."""
    done = 0
    available = registry.available_backends()
    for call in CALLS:
        for backend in call.kernels if device == "cuda" else ("cpu",):
            if backend in available[call.op]:
                for dtype in DTYPES:
                    check(call, backend, device, dtype)
                    done += 1
    return done


if __name__ == "__main__":
    print(f"{main(*sys.argv[1:])} calls agree with the reference")
