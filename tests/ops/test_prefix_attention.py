"""prefix_attention against a loop over rows and heads in fp64, and the relations that must hold between calls."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import skip_wrong_arithmetic
from prefix_attention_truth import Case, make, truth
from tolerances import RELATIVE, assert_close
from torch import Tensor

from dove_fast import BackendError, native
from dove_fast.ops.prefix_attention import native as native_attention
from dove_fast.ops.prefix_attention import reference
from dove_fast.ops.prefix_attention.reference import Cache

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
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_right(case: Case, backend: str, **options) -> None:
    expected, keys, values = truth(
        case, **{name: n.tolist() if name == "key_lengths" else n for name, n in options.items()}
    )
    out = case.run(backend, **options)
    assert out.dtype == case.qkv.dtype
    assert_close(out.double().cpu(), expected, RELATIVE[case.qkv.dtype])
    for kept, wanted in ((case.k_cache, keys), (case.v_cache, values)):
        if kept is not None:
            written = ~wanted.isnan()
            assert torch.equal(~kept.isnan().cpu(), written), "nothing but the new positions is written"
            assert_close(kept.double().cpu()[written], wanted[written], RELATIVE[case.qkv.dtype])


SHAPES = [
    ([5], [7]),
    ([3, 0, 8, 1], [0, 4, 9, 2]),
    ([1, 1, 1], [12, 0, 30]),
    ([17, 33], [20, 3]),
    ([35, 3], [70, 100]),
    ([], []),
    ([0, 0], [3, 1]),
]


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "starts"), SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_with_a_cache(backend, device, dtype, lengths, starts, causal):
    skip_wrong_arithmetic(backend, device, dtype)
    assert_right(make(lengths, starts, dtype=dtype, device=device), backend, causal=causal)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[9], [4, 0, 21, 1], [40, 33], [], [0]], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_without_a_cache(backend, device, dtype, lengths, causal):
    skip_wrong_arithmetic(backend, device, dtype)
    assert_right(make(lengths, dtype=dtype, device=device), backend, causal=causal)


@every
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (24, 6), (64, 16), (128, 32), (40, 0), (5, 2)])
def test_head_sizes(backend, device, head_dim, rotary_dim):
    assert_right(make([6, 19], [11, 0], head_dim=head_dim, rotary_dim=rotary_dim, device=device), backend)
    assert_right(make([6, 19], head_dim=head_dim, rotary_dim=rotary_dim, device=device), backend, causal=False)


@every
def test_key_lengths(backend, device):
    case = make([6, 9, 4, 3], device=device)
    key_lengths = torch.tensor([2, 9, 0, 3], dtype=torch.int32, device=device)
    assert_right(case, backend, causal=False, key_lengths=key_lengths)
    out = case.run(backend, causal=False, key_lengths=key_lengths)
    assert out[15:19].eq(0).all(), "queries that see nothing get zeros"
    case.qkv[2:6, :, 1:] = torch.nan
    assert torch.equal(case.run(backend, causal=False, key_lengths=key_lengths), out), "unseen keys are not read"


@every
def test_scale_and_large_scores(backend, device):
    case = make([4, 7], [5, 0], device=device)
    assert_right(case.clone(), backend, scale=0.7)
    # Scores of some hundreds: e^score overflows fp32.
    assert_right(case.clone(), backend, scale=30.0)


@every
@pytest.mark.parametrize("causal", [True, False])
def test_float64(backend, device, causal):
    case = make([5, 3], dtype=torch.float64, device=device)
    expected, _, _ = truth(case, causal=causal)
    assert_close(case.run(backend, causal=causal).cpu(), expected, RELATIVE[torch.float64])


@every
def test_blocks_against_one_pass(backend, device):
    """The steps of two rows in blocks of any size, through a cache, are those of one pass."""
    lengths = [29, 18]
    whole = make(lengths, head_dim=32, rotary_dim=8, device=device)
    expected = whole.run(backend).split(lengths)
    for block in (1, 4, 7, 16):
        cache = torch.full((2, 2, 2, 32, 32), torch.nan, device=device)
        parts: list[list[Tensor]] = [[], []]
        for start in range(0, max(lengths), block):
            counts = [min(block, max(n - start, 0)) for n in lengths]
            rows = [qkv[start : start + n] for qkv, n in zip(whole.qkv.split(lengths), counts, strict=True)]
            case = replace(
                whole,
                qkv=torch.cat(rows),
                cu_seqlens=torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32, device=device),
                max_seqlen=block,
                k_cache=cache[0],
                v_cache=cache[1],
                slots=torch.tensor([1, 0], dtype=torch.int32, device=device),
                starts=torch.tensor([min(start, n) for n in lengths], dtype=torch.int32, device=device),
            )
            for part, out in zip(parts, case.run(backend).split(counts), strict=True):
                part.append(out)
        for part, out in zip(parts, expected, strict=True):
            assert_close(torch.cat(part), out)


@every
def test_a_row_does_not_depend_on_its_company(backend, device):
    lengths, starts = [7, 40, 1, 20], [5, 0, 33, 12]
    case = make(lengths, starts, device=device)
    together = case.clone().run(backend).split(lengths)
    begin = 0
    for row, length in enumerate(lengths):
        alone = replace(
            case.clone(),
            qkv=case.qkv[begin : begin + length],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=device),
            slots=case.slots[row : row + 1],
            starts=case.starts[row : row + 1],
        )
        assert torch.equal(alone.run(backend), together[row])
        begin += length


@every
def test_nan_stays_in_its_row(backend, device):
    case = make([5, 6, 4], [3, 2, 0], device=device)
    expected = case.clone().run(backend)
    case.qkv[7] = torch.nan
    out = case.run(backend)
    assert torch.equal(out[:5], expected[:5])
    assert torch.equal(out[11:], expected[11:])
    assert out[7:11].isnan().all()


@every
def test_strides(backend, device):
    case = make([6, 5], [4, 0], device=device)
    expected = case.clone().run(backend)
    other = replace(case.clone(), qkv=case.qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3))
    assert torch.equal(other.run(backend), expected)
    other = replace(case.clone(), qkv=case.qkv.transpose(0, 3).contiguous().transpose(0, 3))
    assert torch.equal(other.run(backend), expected)
    wide = {name: torch.stack([getattr(case, name)] * 2, dim=-1) for name in ("cu_seqlens", "slots", "starts", "cos")}
    assert torch.equal(replace(case.clone(), **{k: t[..., 0] for k, t in wide.items()}).run(backend), expected)


@every
@pytest.mark.parametrize("causal", [True, False])
def test_gradients(backend, device, causal):
    options = {"causal": causal, "scale": 0.4}
    if not causal:
        options["key_lengths"] = torch.tensor([2, 0, 3], dtype=torch.int32, device=device)
    case = make([3, 2, 4], head_dim=6, rotary_dim=4, dtype=torch.float64, device=device)
    qkv = case.qkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: replace(case, qkv=t).run(backend, **options), qkv)
    single = replace(case, qkv=qkv.detach().float().requires_grad_())
    weight = torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(1)).to(device)
    (single.run(backend, **options) * weight).sum().backward()
    (expected,) = torch.autograd.grad((case.run(backend, **options) * weight).sum(), qkv)
    assert_close(single.qkv.grad, expected, RELATIVE[torch.float32])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "causal"), [([3, 3, 3], False), ([3, 0, 2], False), ([5, 0, 1, 4], True), ([1], True), ([0, 0], True)]
)
def test_gradients_padded_or_not(backend, device, dtype, lengths, causal):
    """Rows that fill their places, rows that do not, and rows without an entry, against fp64."""
    skip_wrong_arithmetic(backend, device, dtype)
    case = make(lengths, head_dim=8, rotary_dim=4, dtype=dtype, device=device)
    weight = torch.randn(sum(lengths), 2, 8, generator=torch.Generator().manual_seed(1)).to(device)
    grads = []
    for one in (case, replace(case, qkv=case.qkv.double())):
        qkv = one.qkv.detach().requires_grad_()
        out = replace(one, qkv=qkv).run(backend if one is case else "reference", causal=causal)
        grads.append(torch.autograd.grad((out * weight.to(out.dtype)).sum(), qkv)[0])
    assert grads[0].dtype == dtype and grads[0].shape == case.qkv.shape
    if sum(lengths):
        assert_close(grads[0], grads[1], RELATIVE[dtype])


def test_no_gradient_through_a_cache():
    case = make([3], [2])
    case.qkv.requires_grad_()
    with pytest.raises(ValueError, match=r"with a cache has no gradient: call it under torch\.no_grad"):
        case.run(None)
    with torch.no_grad():
        case.run(None)


@every
def test_opcheck_and_compile(backend, device):
    case = make([3, 2], device=device)
    q, k, v = (t.detach().requires_grad_() for t in case.qkv.unbind(2))
    arguments = (case.cu_seqlens, 3, case.cos, case.sin)
    lengths = torch.tensor([2, 1], dtype=torch.int32, device=device)
    for causal, key_lengths in ((True, None), (False, lengths)):
        torch.library.opcheck(
            torch.ops.dove_fast.prefix_attention, (q, k, v, *arguments, causal, key_lengths, 0.25, backend)
        )
    cached = make([3, 2], [4, 1], device=device)
    cached.k_cache.nan_to_num_()
    cached.v_cache.nan_to_num_()
    q, k, v = cached.qkv.unbind(2)
    arguments = (cached.cu_seqlens, 3, cached.cos, cached.sin, True, 0.25, cached.k_cache, cached.v_cache)
    torch.library.opcheck(
        torch.ops.dove_fast.prefix_attention_cached, (q, k, v, *arguments, cached.slots, cached.starts, backend)
    )

    def attend(qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return replace(cached, qkv=qkv * 2, k_cache=k_cache, v_cache=v_cache).run(backend)

    expected = attend(cached.qkv, *(caches := (cached.k_cache.clone(), cached.v_cache.clone())))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(cached.qkv, cached.k_cache, cached.v_cache), expected)
    assert torch.equal(cached.k_cache, caches[0])
    assert torch.equal(cached.v_cache, caches[1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rows(data):
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=4))
    starts = data.draw(st.lists(st.integers(0, 120), min_size=len(lengths), max_size=len(lengths)))
    head_dim = data.draw(st.integers(1, 40))
    rotary_dim = 2 * data.draw(st.integers(0, head_dim // 2))
    case = make(lengths, starts, heads=data.draw(st.integers(1, 3)), head_dim=head_dim, rotary_dim=rotary_dim)
    causal = data.draw(st.booleans())
    expected = case.clone()
    assert_close(case.run("cpu", causal=causal), expected.run("reference", causal=causal))
    assert_close(case.k_cache.nan_to_num(7), expected.k_cache.nan_to_num(7))
    assert torch.equal(case.v_cache.nan_to_num(7), expected.v_cache.nan_to_num(7))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    if not native.load().isa_available(isa):
        pytest.skip(f"{isa} is not compiled or not on this processor")
    case = make([33, 1, 70], [90, 101, 0], head_dim=36, rotary_dim=10, dtype=dtype)
    expected, _, _ = truth(case)
    q, k, v = case.qkv.unbind(2)
    cache = Cache(case.k_cache, case.v_cache, case.slots, case.starts)
    out = native_attention.prefix_attention_cpu(
        q, k, v, case.cu_seqlens, 70, case.cos, case.sin, True, None, 1 / 6, cache, _isa=isa
    )
    assert_close(out.double(), expected, RELATIVE[dtype])


def test_threads_do_not_matter():
    """Rows, heads or a row's queries are divided among the threads."""
    before = torch.get_num_threads()
    try:
        for case in (make([150], [64], heads=1), make([150, 7, 80], [64, 300, 0]), make([99, 120], heads=3)):
            torch.set_num_threads(1)
            one = case.clone()
            expected = one.run("cpu")
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                other = case.clone()
                assert torch.equal(other.run("cpu"), expected)
                for kept, wanted in ((other.k_cache, one.k_cache), (other.v_cache, one.v_cache)):
                    assert kept is None or torch.equal(kept.nan_to_num(7), wanted.nan_to_num(7))
    finally:
        torch.set_num_threads(before)


def test_chunks_of_the_reference_do_not_matter(monkeypatch):
    case = make([9, 4, 12], [3, 0, 8])
    expected = case.clone().run("reference")
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 1)
    assert_close(case.run("reference"), expected)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"qkv": torch.ones(5, 2, 3, 16).int()}, {}, TypeError, "q must be float64, .*, got int32"),
        ({"qkv": torch.ones(5, 2, 3, 0)}, {}, ValueError, r"with H and D at least 1, got \(5, 2, 0\)"),
        ({"cu_seqlens": ints(0, 3, 4)}, {}, ValueError, "from 0 to the 5 entries of q, got 0 to 4"),
        (
            {"cu_seqlens": ints(0, 6, 5), "starts": ints(0, 0), "max_seqlen": 9},
            {},
            ValueError,
            "0 to max_seqlen = 9 entries, got -1 in row 1",
        ),
        ({"cu_seqlens": ints(0, 3, 5).long()}, {}, TypeError, "cu_seqlens must be int32, got int64"),
        ({"max_seqlen": 2}, {}, ValueError, "0 to max_seqlen = 2 entries, got 3 in row 0"),
        ({"max_seqlen": 2.0}, {}, TypeError, "max_seqlen must be an int, got float"),
        ({"cos": torch.ones(9, 4).double()}, {}, TypeError, "cos must be float32, got float64"),
        ({"cos": torch.ones(9, 3)}, {}, ValueError, r"rotary_dim even and at most 16, got \(9, 3\)"),
        ({"cos": torch.ones(9, 2)}, {}, ValueError, r"sin must have shape \(9, 2\) like cos, got \(8, 4\)"),
        ({"k_cache": None}, {}, ValueError, "together, got none for k_cache"),
        ({"k_cache": torch.ones(3, 2, 9, 8)}, {}, ValueError, r"k_cache must have shape \(3?S?, 2, M, 16\)"),
        ({"v_cache": torch.ones(3, 2, 9, 16)[:, :, ::2]}, {}, ValueError, "v_cache must be contiguous"),
        ({"k_cache": torch.ones(3, 2, 9, 16).half()}, {}, TypeError, "k_cache must be float32 like q, got float16"),
        ({"slots": ints(0, 5)}, {}, ValueError, "slots must be between 0 and 2, got 5 in row 1"),
        ({"slots": ints(1, 1)}, {}, ValueError, "slots must be different for every row"),
        ({"slots": ints(1)}, {}, ValueError, r"slots must have shape \(2,\), got \(1,\)"),
        ({"starts": ints(-1, 0)}, {}, ValueError, "row 0 would reach from -1 to 2, outside"),
        ({"starts": ints(0, 8)}, {}, ValueError, "row 1 would reach from 8 to 10, outside the 8 positions"),
        ({}, {"key_lengths": ints(1, 1), "causal": False}, ValueError, "key_lengths is for calls without a cache"),
        ({}, {"scale": "a"}, TypeError, "scale must be a number, got str"),
        ({}, {"causal": "yes"}, TypeError, "causal must be a bool, got str"),
        ({}, {"backend": "cuda"}, BackendError, "prefix_attention has no 'cuda' implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(changes, options, error, message):
    case = replace(make([3, 2], [4, 1]), **changes)
    with pytest.raises(error, match=message):
        case.run(**{"backend": None} | options)


def test_wrong_key_lengths():
    case = make([3, 2])
    with pytest.raises(ValueError, match="not causal, got one with causal=True"):
        case.run(None, key_lengths=ints(1, 1))
    with pytest.raises(ValueError, match=r"key_lengths must have shape \(2,\), got \(3,\)"):
        case.run(None, causal=False, key_lengths=ints(1, 1, 1))


def test_default_scale():
    case = make([4], head_dim=25, rotary_dim=2)
    assert torch.equal(case.run("cpu"), case.run("cpu", scale=1 / math.sqrt(25)))
