"""Every op in CUDA graphs, under torch.compile and on the current stream, without a host read, by tests/op_calls.py."""

from __future__ import annotations

import importlib.util
import pkgutil
from types import SimpleNamespace

import op_calls
import pytest
import torch
from op_calls import CALLS, DTYPES, Call
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dove_fast import ops
from dove_fast.ops import launch
from dove_fast.ops.launch import why_no_triton

on_cpu = pytest.mark.parametrize(
    ("call", "backend"),
    [pytest.param(call, backend, id=f"{call.name}-{backend}") for call in CALLS for backend in ("cpu", "triton")],
)


def on_gpu(*more: str) -> pytest.MarkDecorator:
    """Each call with each kernel, and with `more` backends."""
    cases = [
        pytest.param(call, backend, id=f"{call.name}-{backend}-gpu", marks=pytest.mark.gpu)
        for call in CALLS
        for backend in (*call.kernels, *(() if call.reference_reads else more))
    ]
    return pytest.mark.parametrize(("call", "backend"), cases)


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert torch.equal(result, wanted)


def eager(call: Call, backend: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return what a call gives, and leave the inputs as they are."""
    return call.run(backend, *(t.clone() for t in inputs))


@on_cpu
@dtypes
def test_calls_on_the_cpu(call, backend, dtype):
    op_calls.check(call, backend, "cpu", dtype)
    before, after = (eager(call, backend, call.on("cpu", seed, dtype)) for seed in (0, 1))
    for one, other in zip(before, after, strict=True):
        assert one.shape == other.shape, "a graph's shapes are fixed"
        assert not torch.equal(one, other), "old contents must show"


@on_gpu()
@dtypes
def test_calls(call, backend, dtype):
    op_calls.check(call, backend, "cuda", dtype)


@pytest.mark.skipif(why_no_triton() is not None, reason="needs Triton")
@pytest.mark.parametrize("call", [call for call in CALLS if "triton" in call.kernels], ids=lambda call: call.name)
def test_the_way_to_a_launch_reads_nothing(call, monkeypatch, request):
    """With GPU tensors that hold no data, of which a read raises; this needs no GPU."""
    launches = []
    if not torch.cuda.is_available():
        # What a launch asks of the device, once a process.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        properties = SimpleNamespace(multi_processor_count=9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for asked in (launch.arch_of, launch.num_processors):
            asked.cache_clear()
            request.addfinalizer(asked.cache_clear)
    for item in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        if item.ispkg:
            # The ops themselves, instead of their rules for tensors without data.
            for name, function in vars(importlib.import_module(item.name)).items():
                if isinstance(getattr(torch.ops.dove_fast, name[1:], None), OpOverloadPacket):
                    monkeypatch.setattr(torch.ops.dove_fast, name[1:], function)
            if importlib.util.find_spec(f"{item.name}.triton_kernel"):
                kernel = importlib.import_module(f"{item.name}.triton_kernel")
                monkeypatch.setattr(kernel, "launch", lambda *args: launches.append(args))
    made = call.on("cpu", 0, torch.float32)
    with FakeTensorMode():
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in made]
        call.run("triton", *inputs)
        with pytest.raises(DataDependentOutputException):
            inputs[0].sum().tolist()
    assert launches


@on_gpu()
@dtypes
def test_captured_and_replayed(call, backend, dtype):
    buffers = call.on("cuda", 0, dtype)
    # What is made once, such as a kernel's code, is made before the capture, on another stream as torch asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run(backend, *buffers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(backend, *buffers)
    for seed in (1, 2):
        inputs = call.on("cuda", seed, dtype)
        expected = eager(call, backend, inputs)
        for buffer, new in zip(buffers, inputs, strict=True):
            buffer.copy_(new)
        graph.replay()
        assert_same(results, expected)


@on_gpu("reference")
@dtypes
def test_does_not_synchronise(call, backend, dtype):
    inputs = call.on("cuda", 0, dtype)
    call.run(backend, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(backend, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu()
def test_runs_on_the_current_stream(call, backend):
    buffers, inputs = (call.on("cuda", seed, torch.float32) for seed in (0, 1))
    expected = eager(call, backend, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # On another stream the op would not wait for the new contents.
        torch.cuda._sleep(50_000_000)
        for buffer, new in zip(buffers, inputs, strict=True):
            buffer.copy_(new)
        results = call.run(backend, *buffers)
    stream.synchronize()
    assert_same(results, expected)


@on_gpu()
def test_compiled_into_a_graph(call, backend):
    """By inductor, which captures a graph in the second call and replays it from the third on."""
    compiled = torch.compile(call.run, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        inputs = call.on("cuda", seed, torch.float32)
        with torch.no_grad():
            results = compiled(backend, *(t.clone() for t in inputs))
        expected = eager(call, backend, inputs)
        for result, wanted in zip(results, expected, strict=True):
            # What inductor made of the operations around the op may round otherwise.
            op_calls.assert_agrees(result, wanted, torch.float32)
