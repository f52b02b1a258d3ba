"""vq_lookup against every distance in fp64: random, planted duplicates, near ties, extreme sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import skip_wrong_arithmetic
from torch import Tensor
from vq_lookup_truth import assert_nearest, distances

from dove_fast import native, ops
from dove_fast.ops.vq_lookup import native as native_vq
from dove_fast.ops.vq_lookup import reference

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

# Backend and device; on a GPU they are skipped where there is none.
every = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("reference", "cpu", id="reference"),
        pytest.param("cpu", "cpu", id="cpu"),
        pytest.param("triton", "cpu", id="triton-interpreted"),
        pytest.param("reference", "cuda", id="reference-gpu", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
    ],
)


def normal(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "words", "width"),
    [(50, 300, 64), (7, 1, 3), (1, 40, 1), (33, 17, 5), (1, 100, 64), (2, 99, 70), (3, 64, 256), (65, 130, 8)],
    ids=str,
)
def test_nearest(backend, device, dtype, rows, words, width):
    skip_wrong_arithmetic(backend, device, dtype)
    x, codebook = (
        normal(rows, width, device=device, dtype=dtype),
        normal(words, width, seed=1, device=device, dtype=dtype),
    )
    codes, quantized = ops.vq_lookup(x, codebook, backend=backend)
    assert codes.dtype == torch.int64
    assert quantized.dtype == dtype
    assert_nearest(codes, x, codebook, backend)
    assert torch.equal(quantized, codebook[codes])


@every
def test_shapes_and_strides(backend, device):
    x, codebook = normal(2, 8, 3, 4, device=device), normal(20, 8, seed=1, device=device)
    codes, quantized = ops.vq_lookup(x.permute(0, 2, 3, 1), codebook, backend=backend)
    assert codes.shape == (2, 3, 4)
    assert quantized.shape == (2, 3, 4, 8)
    flat = x.permute(0, 2, 3, 1).reshape(-1, 8)
    assert torch.equal(codes.flatten(), ops.vq_lookup(flat, codebook, backend=backend)[0])
    code, word = ops.vq_lookup(flat[5], codebook, backend=backend)
    assert code.shape == ()
    assert code == codes.flatten()[5]
    assert torch.equal(word, quantized.view(-1, 8)[5])
    codes, quantized = ops.vq_lookup(x.new_empty(0, 7, 8), codebook, backend=backend)
    assert codes.shape == (0, 7)
    assert quantized.shape == (0, 7, 8)


@every
@pytest.mark.parametrize("squares_given", [False, True])
def test_identical_codewords_give_the_lowest_index(backend, device, squares_given):
    codebook = normal(30, 16, device=device).repeat(9, 1)[
        torch.randperm(270, generator=torch.Generator().manual_seed(3))
    ]
    x = torch.cat([codebook, normal(200, 16, seed=4, device=device)])
    squares = ops.codebook_squares(codebook) if squares_given else None
    for rows in (x, x[:1], x[:2], x[:20]):
        codes, _ = ops.vq_lookup(rows, codebook, codebook_sq=squares, backend=backend)
        assert_nearest(codes, rows, codebook, backend)
        assert codes.unique().numel() <= 30


@every
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_near_ties(backend, device, shift):
    """Codewords a few ulps apart, around one far from the origin: fp32 scores cannot tell them apart."""
    base = normal(1, 64, device=device) + shift
    codebook = base * (1 + 3e-7 * normal(500, 64, seed=1, device=device))
    x = base * (1 + 3e-7 * normal(100, 64, seed=2, device=device))
    codes, _ = ops.vq_lookup(x, codebook, backend=backend)
    assert_nearest(codes, x, codebook, backend)
    by_score = (codebook.square().sum(1) / 2 - x @ codebook.T).argmin(1)
    assert (by_score != codes).any(), "the test does not reach what it is for"


@every
@pytest.mark.parametrize("exponent", [-30, -24, -20, -12, 12, 18, 20, 30])
@pytest.mark.parametrize("other", [-24, 0, 10, 24])
def test_extreme_sizes(backend, device, exponent, other):
    """Squares and products that underflow or overflow in fp32."""
    x, codebook = normal(20, 8, device=device) * 10.0**other, normal(50, 8, seed=1, device=device) * 10.0**exponent
    assert_nearest(ops.vq_lookup(x, codebook, backend=backend)[0], x, codebook, backend)


@every
@pytest.mark.parametrize("exponent", [-16, -20, -23, -30, -37])
def test_sizes_that_underflow(backend, device, exponent):
    """Squares and products are below the smallest normal number, or zero."""
    x, codebook = normal(40, 64, device=device), normal(70, 64, seed=1, device=device)
    expected, _ = ops.vq_lookup(x.double(), codebook.double())
    codes, _ = ops.vq_lookup(x * 10.0**exponent, codebook * 10.0**exponent, backend=backend)
    # Scaled, elements are rounded: to fp32, and to fewer digits where they are subnormal.
    assert (codes == expected).sum() >= (40 if exponent > -37 else 30)


@every
@pytest.mark.parametrize("size", [1e18, 3e18, 1e19, 1e20, 1e30], ids=str)
def test_sizes_that_overflow_beside_sizes_that_do_not(backend, device, size):
    """The score of a row's own codeword is infinity less infinity, while those of small codewords are finite."""
    codebook = normal(40, 24, device=device)
    codebook[20:] *= size
    x = torch.cat([codebook, normal(9, 24, seed=1, device=device)])
    codes, _ = ops.vq_lookup(x, codebook, backend=backend)
    assert codes[:40].tolist() == list(range(40))
    assert ops.vq_lookup(x[39], codebook, backend=backend)[0] == 39
    assert_nearest(codes, x, codebook, backend)


@every
def test_one_large_codeword_among_small_ones(backend, device):
    codebook = normal(100, 16, device=device) * 1e-3
    codebook[57] = 1e6
    x = normal(64, 16, seed=1, device=device) * 1e-3
    assert_nearest(ops.vq_lookup(x, codebook, backend=backend)[0], x, codebook, backend)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 12), words=st.integers(1, 40), width=st.integers(1, 9))
def test_on_a_grid(seed, rows, words, width):
    """Small integers: distances are exact, and ties between different codewords are common."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, width), generator=generator).float()
    codebook = torch.randint(-2, 3, (words, width), generator=generator).float()
    expected = distances(x, codebook)
    lowest = (expected == expected.amin(1, keepdim=True)).int().argmax(1)
    for backend in ("reference", "cpu"):
        assert torch.equal(ops.vq_lookup(x, codebook, backend=backend)[0], lowest)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 70), words=st.integers(1, 90), width=st.integers(1, 40))
def test_any_size(seed, rows, words, width):
    x, codebook = normal(rows, width, seed=seed), normal(words, width, seed=seed + 1)
    codes, quantized = ops.vq_lookup(x, codebook, backend="cpu")
    assert_nearest(codes, x, codebook, "cpu")
    assert torch.equal(quantized, codebook[codes])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(isa, dtype):
    if not native.load().isa_available(isa):
        pytest.skip(f"{isa} is not compiled or not on this processor")
    for rows, words, width in [(100, 300, 64), (1, 300, 64), (2, 77, 33), (5, 50, 8), (40, 25, 3)]:
        x, codebook = normal(rows, width, dtype=dtype), normal(words, width, seed=1, dtype=dtype)
        codes, quantized = native_vq.vq_lookup_cpu(x, codebook, _isa=isa)
        assert_nearest(codes, x, codebook, "cpu")
        assert torch.equal(quantized, codebook[codes])


def test_threads_do_not_matter():
    """One row or many: the codewords or the rows are divided among the threads."""
    before = torch.get_num_threads()
    codebook = normal(8192, 64, seed=1)
    codebook[8000:] = codebook[:192]
    try:
        for rows in (1, 2, 3, 33, 300):
            x = normal(rows, 64) + codebook[8191 - torch.arange(rows)]
            torch.set_num_threads(1)
            expected = ops.vq_lookup(x, codebook, backend="cpu")
            assert_nearest(expected[0], x, codebook, "cpu")
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                for ours, theirs in zip(ops.vq_lookup(x, codebook, backend="cpu"), expected, strict=True):
                    assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


def test_chunks_do_not_matter(monkeypatch):
    x, codebook = normal(60, 8), normal(50, 8, seed=1).repeat(3, 1)
    expected, _ = ops.vq_lookup(x, codebook, backend="reference")
    for limit in (1, 300, 4000):
        monkeypatch.setattr(reference, "MAX_ELEMENTS", limit)
        assert torch.equal(ops.vq_lookup(x, codebook, backend="reference")[0], expected)


def test_equal_codewords_stay_in_bounded_memory(monkeypatch):
    """Every codeword is a candidate for every row: 2^18 pairs, worked through in pieces."""
    largest = 0
    distance = reference._distance

    def watched(x: Tensor, c: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return distance(x, c)

    monkeypatch.setattr(reference, "_distance", watched)
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 1 << 14)
    codes, _ = ops.vq_lookup(normal(64, 32), torch.ones(4096, 32), backend="reference")
    assert codes.eq(0).all()
    assert 0 < largest <= 1 << 14


@every
def test_codebook_sq(backend, device):
    x, codebook = normal(40, 16, device=device), normal(100, 16, seed=1, device=device)
    expected, _ = ops.vq_lookup(x, codebook, backend=backend)
    for squares in (ops.codebook_squares(codebook), ops.codebook_squares(codebook.double())):
        assert torch.equal(ops.vq_lookup(x, codebook, codebook_sq=squares, backend=backend)[0], expected)


def test_codebook_squares():
    for width in (1, 2, 3, 7, 8, 64, 100):
        codebook = normal(50, width).repeat(7, 1)
        squares = ops.codebook_squares(codebook)
        assert squares.dtype == torch.float32
        assert torch.allclose(squares.double(), codebook.double().square().sum(1), rtol=1e-6)
        assert squares.view(7, 50).eq(squares[:50]).all(), "identical codewords must have the same"
    assert ops.codebook_squares(codebook.bfloat16()).dtype == torch.float32
    assert ops.codebook_squares(codebook.double()).dtype == torch.float64


@every
def test_nonfinite_rows_get_code_zero(backend, device):
    x, codebook = normal(5, 40, device=device), normal(30, 40, seed=1, device=device)
    expected, _ = ops.vq_lookup(x, codebook, backend=backend)
    x[1, 3], x[4, 0] = torch.nan, torch.inf
    codes, quantized = ops.vq_lookup(x, codebook, backend=backend)
    assert codes[[1, 4]].tolist() == [0, 0]
    assert torch.equal(codes[[0, 2, 3]], expected[[0, 2, 3]])
    assert torch.equal(quantized, codebook[codes])
    assert ops.vq_lookup(x[1:2], codebook, backend=backend)[0].tolist() == [0]
    codebook[expected[0]] = torch.nan
    rest = x[[0, 2]]
    assert_nearest(ops.vq_lookup(rest, codebook, backend=backend)[0], rest, codebook.nan_to_num(nan=1e30), backend)


@every
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_codewords_with_nan_are_never_the_nearest(backend, device, rows):
    for width in (3, 40):
        x, codebook = normal(rows, width, device=device), normal(99, width, seed=1, device=device)
        for step in (2, 3, 5):
            broken = codebook.clone()
            broken[::step, width - 1] = torch.nan
            codes, _ = ops.vq_lookup(x, broken, backend=backend)
            assert_nearest(codes, x, broken.nan_to_num(nan=1e30), backend)
    codes, _ = ops.vq_lookup(x, torch.full_like(codebook, torch.nan), backend=backend)
    assert codes.eq(0).all()


@every
def test_low_precision_products_do_not_change_codes(backend, device):
    x, codebook = normal(300, 64, device=device), normal(500, 64, seed=1, device=device)
    expected, _ = ops.vq_lookup(x, codebook, backend=backend)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(ops.vq_lookup(x, codebook, backend=backend)[0], expected)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(ops.vq_lookup(x, codebook, backend=backend)[0], expected)


def test_error_bound_holds(monkeypatch):
    """The scores' true errors, products rounded to bf16 included, stay within the bound that exactness rests on."""
    for scale in (1e-3, 1.0, 1e3):
        x, codebook = normal(100, 64) * scale, normal(200, 64, seed=1)
        squares = codebook.square().sum(1)
        true = codebook.double().square().sum(1) / 2 - x.double() @ codebook.double().T
        error = (torch.addmm(squares / 2, x, codebook.T, alpha=-1).double() - true).abs().amax(1)
        assert (error <= reference._score_error(x, squares)).all()
        short = squares / 2 - x.bfloat16().float() @ codebook.bfloat16().float().T
        error = (short.double() - true).abs().amax(1)
        if scale >= 1:
            assert (error > reference._score_error(x, squares)).any(), "the bound does not depend on the products"
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_product_roundoff", lambda rows: 2.0**-8)
            assert (error <= reference._score_error(x, squares)).all()


def test_backward():
    x, codebook = normal(6, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    codes, quantized = ops.vq_lookup(x, codebook)
    assert not codes.requires_grad
    weight = normal(6, 4, seed=2)
    quantized.backward(weight)
    assert torch.equal(x.grad, weight)
    expected = torch.stack([weight[codes == k].sum(0) for k in range(3)])
    assert torch.allclose(codebook.grad, expected, atol=1e-6)
    _, quantized = ops.vq_lookup(x, codebook.detach())
    (gradient,) = torch.autograd.grad((quantized**2).sum(), x)
    assert torch.equal(gradient, 2 * quantized)
    _, quantized = ops.vq_lookup(x.detach(), codebook.detach())
    assert not quantized.requires_grad


def test_backward_of_bf16_sums_in_fp32():
    x = torch.ones(4096, 2, dtype=torch.bfloat16)
    codebook = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    ops.vq_lookup(x, codebook)[1].sum().backward()
    assert codebook.grad.dtype == torch.bfloat16
    assert codebook.grad.tolist() == [[4096.0, 4096.0]], "sums in bf16 stop at 256"


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(backend, device, dtype):
    skip_wrong_arithmetic(backend, device, dtype)
    x = normal(9, 4, device=device, dtype=dtype)
    codebook = normal(12, 4, seed=1, device=device).requires_grad_()
    codes, quantized = ops.vq_lookup(x, codebook, backend=backend)
    assert_nearest(codes, x, codebook.detach(), backend)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, codebook.detach().to(dtype)[codes])
    quantized.sum().backward()
    assert codebook.grad.dtype == torch.float32


@every
def test_opcheck_and_compile(backend, device):
    x = normal(6, 4, device=device).requires_grad_()
    codebook = normal(9, 4, seed=1, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.dove_fast.vq_lookup, (x, codebook, None, backend))
    frozen = codebook.detach()
    torch.library.opcheck(torch.ops.dove_fast.vq_lookup, (x, frozen, ops.codebook_squares(frozen), backend))

    def quantize(a: Tensor) -> Tensor:
        return ops.vq_lookup(a * 2, codebook, backend=backend)[1]

    assert torch.equal(torch.compile(quantize, backend="aot_eager", fullgraph=True)(x), quantize(x))


@pytest.mark.parametrize(
    ("x", "codebook", "options", "error", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4), {}, TypeError, "x must be float64, .*, got int64"),
        (torch.ones(2, 4), torch.ones(3, 4).int(), {}, TypeError, "codebook must be float64, .*, got int32"),
        ([1.0], torch.ones(3, 1), {}, TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 5), torch.ones(3, 4), {}, ValueError, r"x must have shape \(..., 4\) .*, got \(2, 5\)"),
        (torch.tensor(1.0), torch.ones(3, 4), {}, ValueError, r"x must have shape \(..., 4\) .*, got \(\)"),
        (torch.ones(2, 4), torch.ones(0, 4), {}, ValueError, r"with K and C at least 1, got \(0, 4\)"),
        (torch.ones(2, 0), torch.ones(3, 0), {}, ValueError, r"with K and C at least 1, got \(3, 0\)"),
        (torch.ones(2, 4), torch.ones(4), {}, ValueError, r"shape \(K, C\) with K and C at least 1, got \(4,\)"),
        (torch.ones(2, 4), torch.ones(3, 4, device="meta"), {}, ValueError, "codebook must be on cpu like x, got meta"),
        (torch.ones(2, 4), torch.ones(3, 4), {"codebook_sq": torch.ones(4)}, ValueError, r"shape \(3,\), got \(4,\)"),
        (torch.ones(2, 4), torch.ones(3, 4), {"codebook_sq": torch.ones(3).half()}, TypeError, "got float16"),
        (torch.ones(2, 4), torch.ones(3, 4), {"codebook_sq": [1]}, TypeError, "codebook_sq must be a tensor, got list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(x, codebook, options, error, message):
    with pytest.raises(error, match=message):
        ops.vq_lookup(x, codebook, **options)


@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        ([1.0], TypeError, "codebook must be a tensor, got list"),
        (torch.ones(3, 4).int(), TypeError, "codebook must be float64, .*, got int32"),
        (torch.ones(4), ValueError, r"shape \(K, C\) with K and C at least 1, got \(4,\)"),
        (torch.ones(3, 0), ValueError, r"with K and C at least 1, got \(3, 0\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_codebook_of_squares(codebook, error, message):
    with pytest.raises(error, match=message):
        ops.codebook_squares(codebook)
