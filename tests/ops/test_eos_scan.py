"""eos_scan against a loop over rows and steps in fp64, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import skip_wrong_arithmetic
from tolerances import RELATIVE, assert_close
from torch import Tensor

from dove_fast import native, ops
from dove_fast.models.lengths import eos_lengths
from dove_fast.ops.eos_scan import native as native_scan

# Backend and device; conftest skips what this machine cannot run. On the CPU Triton is its interpreter.
every = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("reference", "cpu", id="reference"),
        pytest.param("cpu", "cpu", id="cpu"),
        pytest.param("triton", "cpu", id="triton-interpreted"),
        pytest.param("reference", "cuda", id="reference-gpu", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    ],
)


def make(lengths: list[int], width: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
    """Random states, offsets and an EOS head."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(sum(lengths), width, generator=generator).to(device, dtype)
    weight, bias = torch.randn(width, generator=generator), torch.randn((), generator=generator)
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)
    return states, offsets, weight.to(device, dtype), bias.to(device, dtype)


def ints(*numbers: int, device: str = "cpu") -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def loop(logits: list[float], offsets: list[int], limit: float, steps: list[int], max_length: int) -> list[int]:
    found = []
    for row, step in enumerate(steps):
        block = logits[offsets[row] : offsets[row + 1]]
        length = max_length if step + len(block) >= max_length else 0
        for i, logit in enumerate(block):
            if logit > limit:
                length = min(step + i + 1, max_length)
                break
        found.append(length)
    return found


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 5, 64, 300, 512])
def test_against_a_loop(backend, device, dtype, width):
    skip_wrong_arithmetic(backend, device, dtype)
    lengths, steps = [5, 0, 40, 1, 16, 0], [0, 3, 12, 7, 200, 256]
    states, offsets, weight, bias = make(lengths, width, dtype, device)
    exact = states.double() @ weight.double() + bias.double()
    for threshold in (0.001, 0.5, 0.9, 1 - 1e-9):
        logits, found = ops.eos_scan(
            states, offsets, weight, bias, threshold=threshold, steps=ints(*steps, device=device), max_length=256,
            backend=backend,
        )  # fmt: skip
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.dtype == torch.int32
        # The products are of rounded inputs, but summed in fp32 at least.
        assert_close(logits, exact, RELATIVE[logits.dtype])
        limit = math.log(threshold / (1 - threshold))
        assert found.tolist() == loop(logits.float().tolist(), offsets.tolist(), limit, steps, 256)


@every
def test_every_position(backend, device):
    """EOS planted at each step of a row, alone or with more behind it."""
    steps = 21
    states = torch.full((steps * steps, 8), -1.0, device=device)
    for row in range(steps):
        states[row * steps + row] = 1.0
        states[row * steps + steps - 1] = 1.0
    offsets = torch.arange(0, steps * steps + 1, steps, dtype=torch.int32, device=device)
    weight, bias = torch.ones(1, 8, device=device), torch.zeros(1, device=device)
    start = torch.full((steps,), 100, dtype=torch.int32, device=device)
    _, found = ops.eos_scan(states, offsets, weight, bias, threshold=0.5, steps=start, max_length=256, backend=backend)
    assert found.tolist() == [101 + row for row in range(steps)]
    _, found = ops.eos_scan(states, offsets, weight, bias, threshold=0.5, steps=start, max_length=110, backend=backend)
    assert found.tolist() == [min(101 + row, 110) for row in range(steps)]


@every
def test_a_logit_at_the_threshold_is_not_above_it(backend, device):
    states = torch.tensor([[0.0], [1.0], [math.nan], [math.inf], [-math.inf]], device=device)
    weight, bias = torch.ones(1, device=device), torch.zeros((), device=device)
    for first, expected in ((0, 2), (2, 2), (4, 0)):
        offsets = ints(0, 5 - first, device=device)
        _, found = ops.eos_scan(
            states[first:], offsets, weight, bias, threshold=0.5, steps=ints(0, device=device), max_length=9,
            backend=backend,
        )  # fmt: skip
        assert found.tolist() == [expected]


@every
def test_blocks_against_one_pass_and_the_oracle(backend, device):
    """Scanned in blocks, every row ends where the oracle's rule ends it."""
    rows, total = 6, 50
    states, _, weight, bias = make([total] * rows, 32, device=device)
    logits = (states.double() @ weight.double() + bias.double()).float().view(rows, total)
    for threshold in (0.5, 0.97, 1 - 1e-9):
        expected = eos_lengths(logits, threshold)
        for block in (1, 7, 16, 50):
            ends = torch.zeros(rows, dtype=torch.int32, device=device)
            for start in range(0, total, block):
                part = states.view(rows, total, 32)[:, start : start + block]
                offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * part.shape[1]
                _, found = ops.eos_scan(
                    part.reshape(-1, 32), offsets, weight, bias, threshold=threshold, max_length=total,
                    steps=torch.full_like(ends, start), backend=backend,
                )  # fmt: skip
                ends = torch.where(ends == 0, found, ends)
            assert ends.tolist() == expected.tolist()


@every
def test_strides_and_empty(backend, device):
    states, offsets, weight, bias = make([3, 4], 16, device=device)
    steps = ints(0, 5, device=device)
    options = {"threshold": 0.5, "max_length": 64, "backend": backend}
    expected = ops.eos_scan(states, offsets, weight, bias, steps=steps, **options)
    for view in (states.repeat(1, 2)[:, :16], states.T.contiguous().T, states.repeat_interleave(2, 0)[::2]):
        logits, lengths = ops.eos_scan(view, offsets, weight, bias, steps=steps, **options)
        assert_close(logits, expected[0])
        assert torch.equal(lengths, expected[1])
    both = torch.stack([steps, steps], 1)[:, 0]
    assert torch.equal(ops.eos_scan(states, offsets, weight, bias, steps=both, **options)[1], expected[1])
    logits, lengths = ops.eos_scan(states[:0], offsets[:1], weight, bias, steps=steps[:0], **options)
    assert logits.shape == lengths.shape == (0,)
    _, lengths = ops.eos_scan(states[:0], offsets[:3] * 0, weight, bias, steps=ints(3, 64, device=device), **options)
    assert lengths.tolist() == [0, 64]


@every
def test_opcheck_and_compile(backend, device):
    states, offsets, weight, bias = make([3, 4], 16, device=device)
    steps = ints(0, 5, device=device)
    torch.library.opcheck(
        torch.ops.dove_fast.eos_scan, (states, offsets, weight, bias.view(1), 0.3, steps, 64, backend)
    )

    def scan(x: Tensor) -> Tensor:
        return ops.eos_scan(x * 2, offsets, weight, bias, threshold=0.6, steps=steps, max_length=64, backend=backend)[1]

    with torch.no_grad():
        assert torch.equal(torch.compile(scan, backend="aot_eager", fullgraph=True)(states), scan(states))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(isa, dtype):
    if not native.load().isa_available(isa):
        pytest.skip(f"{isa} is not compiled or not on this processor")
    for width in (3, 64, 515):
        states, offsets, weight, bias = make([5, 0, 40], width, dtype)
        logits, found = native_scan.eos_scan_cpu(
            states, offsets, weight, bias.view(1), 1.0, ints(0, 1, 2), 99, _isa=isa
        )
        assert_close(logits, states.double() @ weight.double() + bias.double(), RELATIVE[torch.float32])
        assert found.tolist() == loop(logits.tolist(), offsets.tolist(), 1.0, [0, 1, 2], 99)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_rows(data):
    lengths = data.draw(st.lists(st.integers(0, 20), max_size=8))
    steps = data.draw(st.lists(st.integers(0, 60), min_size=len(lengths), max_size=len(lengths)))
    states, offsets, weight, bias = make(lengths, data.draw(st.integers(1, 70)))
    threshold, max_length = data.draw(st.floats(0.01, 0.999)), data.draw(st.integers(1, 70))
    options = {"threshold": threshold, "steps": ints(*steps), "max_length": max_length}
    logits, found = ops.eos_scan(states, offsets, weight, bias, backend="cpu", **options)
    limit = float(torch.tensor(math.log(threshold / (1 - threshold)), dtype=torch.float32))
    assert found.tolist() == loop(logits.tolist(), offsets.tolist(), limit, steps, max_length)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"states": torch.ones(4, 3).int()}, TypeError, "states must be float64, .*, got int32"),
        ({"states": torch.ones(4)}, ValueError, r"states must have shape \(total, d\) .*, got \(4,\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\) or \(1, 3\), got \(4,\)"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(\) or \(1,\), got \(2,\)"),
        ({"bias": torch.ones(1).half()}, TypeError, "bias must be float32 like states, or float32, got float16"),
        ({"steps": ints(1)}, ValueError, r"steps must have shape \(2,\), got \(1,\)"),
        ({"steps": torch.zeros(2)}, TypeError, "steps must be int32, got float32"),
        ({"cu_seqlens": ints(0, 3, 5)}, ValueError, r"from 0 to the 4 entries of states, got \[0, 3, 5\]"),
        ({"threshold": 1.0}, ValueError, "threshold must be between 0 and 1, got 1.0"),
        ({"threshold": "a"}, TypeError, "threshold must be a number, got str"),
        ({"threshold": torch.tensor(0.5)}, TypeError, "threshold must be a number, got Tensor"),
        ({"threshold": math.nan}, ValueError, "threshold must be between 0 and 1, got nan"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_length": 2.0}, TypeError, "max_length must be an int, got float"),
        ({"states": torch.ones(4, 3, requires_grad=True)}, ValueError, "eos_scan has no gradient"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight must be on cpu like states, got meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(changes, error, message):
    right = {
        "states": torch.ones(4, 3),
        "cu_seqlens": ints(0, 3, 4),
        "weight": torch.ones(3),
        "bias": torch.ones(1),
        "threshold": 0.5,
        "steps": ints(0, 0),
        "max_length": 9,
    }
    with pytest.raises(error, match=message):
        ops.eos_scan(**{**right, **changes})
