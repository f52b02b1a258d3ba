"""pack and unpack: every backend against a loop over the rows, and each the other's inverse and adjoint."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dove_fast import BackendError, native, ops
from dove_fast.ops.launch import interpreted, why_no_triton
from dove_fast.ops.pack import native as native_pack
from dove_fast.ops.pack import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64]
DTYPES += [torch.complex128, torch.bool]
CPU_BACKENDS = ["reference", "cpu", "triton"]
GPU_BACKENDS = ["reference", "cuda", "triton"]


def every_backend() -> list[object]:
    """Backend and device; conftest skips what this machine cannot run. On the CPU Triton is its interpreter."""
    on_cpu = [pytest.param(name, "cpu", id=name) for name in CPU_BACKENDS]
    on_gpu = [pytest.param(name, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu) for name in GPU_BACKENDS]
    return on_cpu + on_gpu


every = pytest.mark.parametrize(("backend", "device"), every_backend())


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(device, dtype)
    return torch.randn(shape, generator=generator).to(device, dtype)


def loop_pack(padded: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat(
        [padded.new_empty((0, *padded.shape[2:]))] + [row[:n] for row, n in zip(padded, lengths, strict=True)]
    )


def loop_unpack(values: Tensor, lengths: list[int], length: int) -> Tensor:
    padded = torch.zeros((len(lengths), length, *values.shape[1:]), dtype=values.dtype, device=values.device)
    start = 0
    for row, n in enumerate(lengths):
        padded[row, : min(n, length)] = values[start : start + min(n, length)]
        start += n
    return padded


def offsets(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", [(), (1,), (3,), (16,), (37,), (4, 5), (0,)], ids=str)
def test_against_a_loop(backend, device, dtype, entry):
    lengths = [3, 0, 7, 1, 0, 5]
    padded = random((6, 7, *entry), dtype, device)
    values, cu_seqlens = ops.pack(padded, lengths, backend=backend)
    assert values.dtype == dtype
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 3, 3, 10, 11, 11, 16]
    assert torch.equal(values, loop_pack(padded, lengths))
    for length in (0, 4, 7, 9):
        assert torch.equal(
            ops.unpack(values, cu_seqlens, length, backend=backend), loop_unpack(values, lengths, length)
        )


@every
def test_large_enough_for_threads(backend, device):
    rows = 20 if (backend, device) == ("triton", "cpu") else 200
    lengths = [(37 * row) % 65 for row in range(rows)]
    padded = random((rows, 64, 96), device=device)
    values, cu_seqlens = ops.pack(padded, torch.tensor(lengths), backend=backend)
    assert torch.equal(values, loop_pack(padded, lengths))
    assert torch.equal(ops.unpack(values, cu_seqlens, 64, backend=backend), loop_unpack(values, lengths, 64))


@every
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [4], [0, 4, 0]], ids=str)
def test_empty_rows_and_batches(backend, device, lengths):
    padded = random((len(lengths), 4, 5), device=device)
    values, cu_seqlens = ops.pack(padded, lengths, backend=backend)
    assert torch.equal(values, loop_pack(padded, lengths))
    assert torch.equal(ops.unpack(values, cu_seqlens, 4, backend=backend), loop_unpack(values, lengths, 4))
    empty, _ = ops.pack(padded[:, :0], [0] * len(lengths), backend=backend)
    assert empty.shape == (0, 5)


@every
def test_nothing_behind_a_row_gets_through(backend, device):
    padded = random((2, 5, 8), device=device)
    padded[0, 2:] = torch.nan
    padded[1, 4:] = torch.nan
    values, cu_seqlens = ops.pack(padded, [2, 4], backend=backend)
    assert values.isfinite().all()
    values[:2] = torch.nan
    unpacked = ops.unpack(values, cu_seqlens, 5, backend=backend)
    assert torch.equal(unpacked[1], torch.cat([values[2:], values.new_zeros(1, 8)]))
    assert unpacked[0, 2:].eq(0).all()


@every
def test_views_of_larger_tensors(backend, device):
    lengths = [2, 5, 0]
    large = random((4, 12, 3, 8), device=device)
    for padded in (
        large[1:, 3:8],
        large[:3, ::2, :, :4],
        large.transpose(0, 2)[:, :5],
        large[:1, :5].expand(3, -1, -1, -1),
    ):
        values, cu_seqlens = ops.pack(padded, lengths, backend=backend)
        assert torch.equal(values, loop_pack(padded, lengths))
        wide = torch.stack([values, values], dim=1)[:, 0]
        strided_offsets = torch.stack([cu_seqlens, cu_seqlens], dim=1)[:, 0]
        assert torch.equal(ops.unpack(wide, strided_offsets, 6, backend=backend), loop_unpack(values, lengths, 6))
    conjugate = random((3, 5, 2), torch.complex64, device).conj()
    assert torch.equal(ops.pack(conjugate, lengths, backend=backend)[0], loop_pack(conjugate, lengths))


@every
def test_gradients(backend, device):
    padded = random((3, 4, 2), torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.pack(t, [4, 0, 2], backend=backend)[0], padded)
    assert torch.autograd.gradgradcheck(lambda t: ops.pack(t, [4, 0, 2], backend=backend)[0] ** 2, padded)
    values, cu_seqlens = random((6, 2), torch.float64, device).requires_grad_(), offsets([4, 0, 2], device)
    for length in (3, 4, 5):
        unpack = lambda t, n=length: ops.unpack(t, cu_seqlens, n, backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(unpack, values)
        assert torch.autograd.gradgradcheck(lambda t, f=unpack: f(t) ** 2, values)
    (gradient,) = torch.autograd.grad(ops.unpack(values, cu_seqlens, 3, backend=backend).sum(), values)
    assert gradient[:, 0].tolist() == [1, 1, 1, 0, 1, 1], "the entry that was cut gets no gradient"


@every
def test_opcheck(backend, device):
    padded = random((3, 4, 5), device=device).requires_grad_()
    cu_seqlens = offsets([4, 0, 2], device)
    torch.library.opcheck(torch.ops.dove_fast.pack, (padded, cu_seqlens, 6, backend))
    values = random((6, 5), device=device).requires_grad_()
    torch.library.opcheck(torch.ops.dove_fast.unpack, (values, cu_seqlens, 3, backend))


def test_compiles_without_a_graph_break():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def double(values, cu_seqlens):
        return ops.unpack(values * 2, cu_seqlens, 5)

    for lengths in ([3, 1], [5, 0, 2]):
        values = random((sum(lengths), 3))
        assert torch.equal(double(values, offsets(lengths)), loop_unpack(values * 2, lengths, 5))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_backends_agree(data):
    lengths = data.draw(st.lists(st.integers(0, 9), max_size=8))
    width = data.draw(st.integers(1, 20))
    length = data.draw(st.integers(0, 12))
    dtype = data.draw(st.sampled_from(DTYPES))
    padded = random((len(lengths), max(lengths, default=0), width), dtype)
    expected, cu_seqlens = ops.pack(padded, lengths, backend="reference")
    cut = ops.unpack(expected, cu_seqlens, length, backend="reference")
    # The raw op packs rows that are longer than the padded side: the backward of a cut.
    packed = torch.ops.dove_fast.pack(cut, cu_seqlens, len(expected), "reference")
    for backend in ("cpu", "triton") if interpreted() and why_no_triton() is None else ("cpu",):
        assert torch.equal(expected, ops.pack(padded, lengths, backend=backend)[0])
        assert torch.equal(cut, ops.unpack(expected, cu_seqlens, length, backend=backend))
        assert torch.equal(packed, torch.ops.dove_fast.pack(cut, cu_seqlens, len(expected), backend))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if not native.load().isa_available(isa):
        pytest.skip(f"{isa} is not compiled or not on this processor")
    lengths = [(11 * row) % 40 for row in range(64)]
    padded, cu_seqlens = random((64, 48, 67)), offsets(lengths)
    values = native_pack.pack_cpu(padded, cu_seqlens, sum(lengths), _isa=isa)
    assert torch.equal(values, reference.pack(padded, cu_seqlens, sum(lengths)))
    for length in (7, 48):
        assert torch.equal(
            native_pack.unpack_cpu(values, cu_seqlens, length, _isa=isa), reference.unpack(values, cu_seqlens, length)
        )


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="instruction set 'sse9' is unknown or not available here"):
        native_pack.pack_cpu(random((1, 1)), offsets([1]), 1, _isa="sse9")


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, -1], ValueError, "lengths must be between 0 and 4, got -1 in row 1"),
        (torch.tensor([5, 0]), ValueError, "lengths must be between 0 and 4, got 5 in row 0"),
        ([1], ValueError, "one entry for each of the 2 rows, got 1"),
        (torch.tensor([[1, 2]]), ValueError, r"lengths must have shape \(2,\), got \(1, 2\)"),
        (torch.tensor([1.0, 2.0]), TypeError, "lengths must be integers, got float32"),
        (torch.tensor([True, False]), TypeError, "lengths must be integers, got bool"),
        ([1, 2.5], TypeError, "lengths must be integers, got float in row 1"),
        ([True, 1], TypeError, "lengths must be integers, got bool in row 0"),
        (3, TypeError, "lengths must be a tensor or a sequence of ints, got int"),
        (None, TypeError, "lengths must be a tensor or a sequence of ints, got NoneType"),
        ("12", TypeError, "lengths must be integers, got str in row 0"),
    ],
    ids=str,
)
def test_wrong_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        ops.pack(torch.zeros(2, 4, 3), lengths)


def test_total_beyond_int32():
    huge = torch.zeros(1, 1, dtype=torch.uint8).expand(3, 2**30)
    with pytest.raises(ValueError, match="3221225472 entries together, more than cu_seqlens"):
        ops.pack(huge, [2**30] * 3)


def test_wrong_padded():
    with pytest.raises(TypeError, match="padded must be a tensor, got list"):
        ops.pack([[1.0]], [1])
    with pytest.raises(ValueError, match=r"padded must have shape \(B, L, ...\), got \(3,\)"):
        ops.pack(torch.zeros(3), [1])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 4]), TypeError, "cu_seqlens must be int32, got int64"),
        (torch.tensor([], dtype=torch.int32), ValueError, r"cu_seqlens must have shape \(B \+ 1,\), got \(0,\)"),
        (torch.tensor([1, 4], dtype=torch.int32), ValueError, "from 0 to the 4 entries of values, got 1 to 4"),
        (torch.tensor([0, 5], dtype=torch.int32), ValueError, "from 0 to the 4 entries of values, got 0 to 5"),
        (torch.tensor([0, 3, 2, 4], dtype=torch.int32), ValueError, "not decrease, got 3 and then 2 in row 1"),
        (torch.empty(3, dtype=torch.int32, device="meta"), ValueError, "must be on cpu like the data, got meta"),
    ],
    ids=str,
)
def test_wrong_cu_seqlens(backend, cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        ops.unpack(torch.zeros(4, 3), cu_seqlens, 4, backend=backend)


def test_wrong_unpack_arguments():
    with pytest.raises(TypeError, match="values and cu_seqlens must be tensors, got Tensor and list"):
        ops.unpack(torch.zeros(4, 3), [0, 4], 4)
    with pytest.raises(TypeError, match="length must be an int, got float"):
        ops.unpack(torch.zeros(4, 3), offsets([4]), 4.0)
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        ops.unpack(torch.zeros(4, 3), offsets([4]), -1)
    with pytest.raises(ValueError, match="got a tensor without dimensions"):
        ops.unpack(torch.tensor(1.0), offsets([1]), 1)


def test_backends_that_cannot_run():
    with pytest.raises(
        BackendError,
        match=r"pack: backend 'cuda' needs tensors on a CUDA device, got cpu; available .*: cpu, .*reference",
    ):
        ops.pack(torch.zeros(1, 1), [1], backend="cuda")


WRONG = [[0, 100], [5, -7, 3], [-(2**31), 2**31 - 1, 2], [4, 0]]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_kernel_reads_nothing_outside_for_a_wrong_cu_seqlens(backend, device, wrong):
    """The op refuses such a cu_seqlens on the CPU, so the kernels are called themselves: as reference, or as zeros."""
    from dove_fast.ops.pack import triton_kernel

    # Rows of a larger block of NaN: an element from outside would show.
    cu_seqlens = torch.tensor([99, *wrong, 99], dtype=torch.int32)[1:-1]
    values = torch.full((12, 8), torch.nan)[4:8].copy_(random((4, 8)))
    unpacked = triton_kernel.unpack(values, cu_seqlens, 6)
    assert unpacked.isfinite().all()
    padded = torch.full((len(wrong) + 7, 3, 8), torch.nan)[4 : len(wrong) + 3].copy_(random((len(wrong) - 1, 3, 8)))
    assert triton_kernel.pack(padded, cu_seqlens, 4).isfinite().all()


on_gpu = pytest.mark.parametrize("backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")])


@on_gpu
@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
def test_alignment(backend, shift):
    """Every access width: addresses that are off a 16-byte boundary, and entries of odd sizes."""
    lengths = [3, 0, 9, 5]
    for width in (1, 2, 3, 4, 8, 16, 48, 5000):
        storage = torch.randint(0, 255, (4 * 9 * width + shift,), dtype=torch.uint8, device="cuda")
        padded = storage[shift:].view(4, 9, width)
        values, cu_seqlens = ops.pack(padded, lengths, backend=backend)
        assert torch.equal(values, loop_pack(padded, lengths))
        assert torch.equal(ops.unpack(values, cu_seqlens, 9, backend=backend), loop_unpack(values, lengths, 9))


@on_gpu
def test_does_not_synchronise(backend):
    padded = random((3, 4, 5), device="cuda")
    ops.pack(padded, [1, 2, 3], backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, cu_seqlens = ops.pack(padded, [1, 2, 3], backend=backend)
        ops.unpack(values, cu_seqlens, 4, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_bears_a_wrong_cu_seqlens(backend, wrong):
    cu_seqlens = torch.tensor(wrong, dtype=torch.int32, device="cuda")
    values = random((4, 8), device="cuda")
    ops.unpack(values, cu_seqlens, 6, backend=backend)
    torch.ops.dove_fast.pack(random((len(wrong) - 1, 3, 8), device="cuda"), cu_seqlens, 4, backend)
    torch.cuda.synchronize()
