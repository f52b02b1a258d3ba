"""The choice of a backend: explicit ones are honoured or refused with a reason, auto says what it passed over."""

from __future__ import annotations

import pytest
import torch
from op_calls import CALLS

import dove_fast
from dove_fast import BackendError, ops
from dove_fast.ops import registry
from dove_fast.ops.registry import Implementation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def op(monkeypatch):
    """An op with a fast backend that is not installed on the CPU and takes fp32 alone on a GPU."""
    monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))
    registry.register(
        "toy",
        cpu=Implementation(lambda x: x + 1, missing=lambda: "the toy is not built"),
        cuda=Implementation(lambda x: x + 2, dtypes=frozenset([torch.float32])),
        reference=Implementation(lambda x: x),
    )
    yield "toy"
    registry._choose.cache_clear()


def test_auto_passes_over_what_does_not_work_and_says_so(op):
    choice = registry.choose(op, CPU, torch.float32)
    assert choice.backend == "reference"
    assert choice.reason == "auto, for cpu tensors; passed over: 'cpu' cannot run: the toy is not built"
    assert registry.choose(op, CUDA, torch.float32).backend == "cuda"
    choice = registry.choose(op, CUDA, torch.float16)
    assert choice.backend == "reference"
    assert "'cuda' takes float32, got float16" in choice.reason


def test_explicit_is_honoured_or_refused(op):
    assert registry.choose(op, CPU, torch.float32, "reference").backend == "reference"
    with pytest.raises(
        BackendError, match=r"toy: backend 'cpu' cannot run: the toy is not built; available .*: reference"
    ):
        registry.choose(op, CPU, torch.float32, "cpu")
    with pytest.raises(BackendError, match="backend 'cuda' takes float32, got float64"):
        registry.choose(op, CUDA, torch.float64, "cuda")
    with pytest.raises(BackendError, match="backend 'cuda' needs tensors on a CUDA device, got cpu"):
        registry.choose(op, CPU, torch.float32, "cuda")
    with pytest.raises(BackendError, match="backend 'cpu' needs tensors on the CPU, got cuda"):
        registry.choose(op, CUDA, torch.float32, "cpu")
    with pytest.raises(
        BackendError, match="toy has no 'triton' implementation; available for cuda tensors: cuda, reference"
    ):
        registry.choose(op, CUDA, torch.float32, "triton")


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "Reference"])
def test_unknown_backend_lists_the_valid_ones(name):
    with pytest.raises(
        BackendError, match=f"pack: unknown backend '{name}'; valid: 'auto', 'reference', 'cpu', 'triton', 'cuda'"
    ):
        ops.pack(torch.zeros(1, 1), [1], backend=name)


NO_NAME = r"backend must be None or one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 3 \(int\)"


# pack is called through torch's registry there, and a backward has no function of its own: torch checks the type.
@pytest.mark.parametrize(
    "call", [call for call in CALLS if call.name != "pack" and hasattr(ops, call.op)], ids=lambda call: call.name
)
def test_a_backend_that_is_no_name(call):
    with pytest.raises(TypeError, match=f"{call.op}: {NO_NAME}"):
        call.run(3, *call.on("cpu", 0, torch.float32))


def test_a_backend_that_is_no_name_elsewhere():
    with pytest.raises(TypeError, match=f"pack: {NO_NAME}"):
        ops.pack(torch.zeros(1, 1), [1], backend=3)
    with pytest.raises(TypeError, match=f"pack: {NO_NAME}"):
        registry.choose("pack", CPU, torch.float32, 3)
    with pytest.raises(TypeError, match=r"got \['cpu'\] \(list\)"):
        registry.choose("pack", CPU, torch.float32, ["cpu"])


def test_environment_sets_the_default(op, monkeypatch):
    monkeypatch.setenv("DOVE_FAST_BACKEND", "reference")
    assert registry.choose("pack", CPU, torch.float32) == ("reference", "asked for (from DOVE_FAST_BACKEND)")
    assert registry.choose("pack", CPU, torch.float32, "cpu").backend == "cpu"
    monkeypatch.setenv("DOVE_FAST_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"toy has no 'triton' implementation \(from DOVE_FAST_BACKEND\)"):
        registry.choose(op, CPU, torch.float32)
    monkeypatch.setenv("DOVE_FAST_BACKEND", "cuda")
    with pytest.raises(BackendError, match=r"pack: backend 'cuda' \(from DOVE_FAST_BACKEND\) needs tensors"):
        ops.pack(torch.zeros(1, 1), [1])
    assert ops.pack(torch.zeros(1, 1), [1], backend="auto")[0].shape == (1,), "auto is auto, whatever the default"
    monkeypatch.setenv("DOVE_FAST_BACKEND", "fast")
    with pytest.raises(BackendError, match=r"unknown backend 'fast' \(from DOVE_FAST_BACKEND\)"):
        ops.pack(torch.zeros(1, 1), [1])
    monkeypatch.setenv("DOVE_FAST_BACKEND", "")
    assert registry.choose("pack", CPU, torch.float32).backend == "cpu"


def test_available_backends_work(op):
    available = dove_fast.available_backends()
    assert available.pop("toy")[-1] == "reference"
    assert {"pack", "unpack", "vq_lookup"} <= set(available)
    for name, backends in available.items():
        assert backends[-1] == "reference"
        assert not torch.cuda.is_available() or name == "vq_lookup" or "cuda" in backends
        for backend in backends:
            device = CUDA if backend in ("cuda", "triton") else CPU
            assert registry.choose(name, device, torch.float32, backend).backend == backend
    assert torch.cuda.is_available() or all("cuda" not in backends for backends in available.values())


def test_register_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"unknown backends \['gpu'\]"):
        registry.register("toy", gpu=Implementation(lambda x: x))
