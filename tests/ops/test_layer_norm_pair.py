"""layer_norm_pair against loops over rows in fp64: sums, pairs and single norms, means far from 0, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import RELATIVE, assert_close
from torch import Tensor

from dove_fast import BackendError, native, ops
from dove_fast.ops.layer_norm_pair import native as native_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Backend and device; on a GPU they are skipped where there is none.
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
counts = pytest.mark.parametrize("count", [0, 1, 2], ids="{} addends".format)
norms = pytest.mark.parametrize("pair", [True, False], ids=["pair", "single"])


def normal(*shape: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def make(
    shape: tuple[int, ...],
    count: int,
    pair: bool,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    of_parameters: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return x with its addends, and weights and biases in turn."""
    terms = [normal(*shape, seed=seed, device=device, dtype=dtype) for seed in range(1 + count)]
    sizes = range(4 if pair else 2)
    return terms, [normal(shape[-1], seed=9 + i, device=device, dtype=of_parameters or dtype) for i in sizes]


def norm(row: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = row.sum() / row.numel()
    variance = ((row - mean) ** 2).sum() / row.numel()
    return (row - mean) / (variance + eps).sqrt() * weight.double() + bias.double()


def assert_right(terms: list[Tensor], parameters: list[Tensor], backend: str, eps: float = 1e-5) -> None:
    """The total is the sum, rounded once; the norms are those of the total as it was returned, row by row."""
    x, *addends = terms
    total, y1, y2 = ops.layer_norm_pair(x, *parameters, addends=addends, eps=eps, backend=backend)
    assert total.shape == y1.shape == x.shape
    assert total.dtype == y1.dtype == x.dtype
    if not addends:
        assert total is x
    else:
        wide = [t.to(torch.promote_types(x.dtype, torch.float32)) for t in (*addends, x)]
        assert torch.equal(total, sum(wide[1:], wide[0]).to(x.dtype))
        assert total.is_contiguous()
    results = [y1] if len(parameters) == 2 else [y1, y2]
    if len(parameters) == 2:
        assert y2 is None
    rows = total.double().reshape(-1, x.shape[-1])
    for index, y in enumerate(results):
        assert y.is_contiguous()
        weight, bias = parameters[2 * index : 2 * index + 2]
        expected = [norm(row, weight, bias, eps) for row in rows]
        expected = torch.stack(expected) if expected else rows
        assert_close(y.double(), expected.view(x.shape), RELATIVE[x.dtype])


def skip_unable(backend: str, device: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter is wrong for bf16")


@every
@counts
@norms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 77), (7,), (3, 1), (4, 130), (1, 515)], ids=str)
def test_sum_and_norms(backend, device, count, pair, dtype, shape):
    skip_unable(backend, device, dtype)
    assert_right(*make(shape, count, pair, device=device, dtype=dtype), backend)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_parameters(backend, device, dtype):
    skip_unable(backend, device, dtype)
    assert_right(*make((3, 40), 2, True, device=device, dtype=dtype, of_parameters=torch.float32), backend)


@every
@counts
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty(backend, device, count, shape):
    assert_right(*make(shape, count, True, device=device), backend)


@every
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_mean_far_from_zero(backend, device, eps):
    """A variance as E[x^2] - mean^2 would have lost every digit."""
    terms, parameters = make((6, 300), 0, True, device=device)
    assert_right([terms[0] + 1000], parameters, backend, eps)
    terms, parameters = make((6, 300), 2, False, device=device)
    assert_right([terms[0] + 1000, terms[1] + 500, terms[2]], parameters, backend, eps)


@pytest.mark.parametrize(
    ("backend", "device"), [every.args[1][2], every.args[1][4]], ids=["triton-interpreted", "triton"]
)
@counts
def test_rows_in_pieces(backend, device, count, monkeypatch):
    """Rows that are wider than Triton holds whole."""
    pytest.importorskip("triton")
    from dove_fast.ops.layer_norm_pair import triton_kernel

    monkeypatch.setattr(triton_kernel, "_WIDEST", 32)
    monkeypatch.setattr(triton_kernel, "_PIECE", 32)
    for shape, dtype in (((3, 100), torch.float32), ((2, 64), torch.float16), ((2, 33), torch.float32)):
        for pair in (True, False):
            assert_right(*make(shape, count, pair, device=device, dtype=dtype), backend)
    terms, parameters = make((3, 100), count, True, device=device)
    terms[0] += 1000
    assert_right(terms, parameters, backend)


@every
def test_constant_rows(backend, device):
    """The variance is 0: the norm is the bias."""
    _, (weight1, bias1, weight2, bias2) = make((1, 50), 0, True, device=device)
    x = torch.full((2, 50), 3.0, device=device)
    _, y1, y2 = ops.layer_norm_pair(x, weight1, bias1, weight2, bias2, backend=backend)
    assert_close(y1, bias1.expand(2, 50))
    assert_close(y2, bias2.expand(2, 50))


@every
def test_strides(backend, device):
    (x, a, b), parameters = make((4, 6, 20), 2, True, device=device)
    expected = ops.layer_norm_pair(x, *parameters, addends=(a, b), backend=backend)
    wide = normal(4, 6, 50, device=device)
    wide[..., 5:25] = x
    crossed = a.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack([b, b], dim=-1)[..., 0]
    found = ops.layer_norm_pair(wide[..., 5:25], *parameters, addends=(crossed, spread), backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    every_other = torch.stack(parameters, dim=-1).unbind(-1)
    one = x[:1].expand(4, 6, 20)
    found = ops.layer_norm_pair(one, *every_other, addends=(crossed,), backend=backend)
    expected = ops.layer_norm_pair(one.contiguous(), *parameters, addends=(a,), backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_is_the_norm_of_the_total(backend, device, dtype):
    """Bit for bit: nothing depends on whether the sum was taken in the same call, or the second norm with the first."""
    skip_unable(backend, device, dtype)
    (x, a, b), parameters = make((5, 90), 2, True, device=device, dtype=dtype)
    total, y1, y2 = ops.layer_norm_pair(x, *parameters, addends=(a, b), backend=backend)
    _, again1, again2 = ops.layer_norm_pair(total, *parameters, backend=backend)
    assert torch.equal(again1, y1)
    assert torch.equal(again2, y2)
    assert torch.equal(ops.layer_norm_pair(total, *parameters[:2], backend=backend)[1], y1)
    assert torch.equal(ops.layer_norm_pair(total, *parameters[2:], backend=backend)[1], y2)


@every
def test_rows_stay_apart(backend, device):
    """A row alone gives the same bits as in company; NaN and infinity stay in their rows."""
    (x, a, b), parameters = make((6, 45), 2, True, device=device)
    expected = ops.layer_norm_pair(x, *parameters, addends=(a, b), backend=backend)
    one = ops.layer_norm_pair(x[2:3], *parameters, addends=(a[2:3], b[2:3]), backend=backend)
    a[1, 7], x[4, 0] = torch.nan, torch.inf
    found = ops.layer_norm_pair(x, *parameters, addends=(a, b), backend=backend)
    rest = [0, 2, 3, 5]
    for part, ours, theirs in zip(one, found, expected, strict=True):
        assert torch.equal(part[0], theirs[2])
        assert torch.equal(ours[rest], theirs[rest])
    for y in found[1:]:
        assert y[[1, 4]].isnan().all()


@every
def test_a_chain_of_layers(backend, device):
    """Four parallel-residual layers, each residual sum in the next layer's norms, against one step after the other."""
    terms, _ = make((10, 24), 0, True, device=device)
    _, parameters = make((1, 24), 0, True, device=device)
    mixing = normal(24, 24, seed=5, device=device) / 5

    def layer(for_attention: Tensor, for_mlp: Tensor) -> tuple[Tensor, Tensor]:
        return F.gelu(for_mlp @ mixing), (for_attention @ mixing.T).tanh()

    x = fused = terms[0]
    addends: tuple[Tensor, ...] = ()
    for _ in range(4):
        norms = [F.layer_norm(x, (24,), *parameters[i : i + 2]) for i in (0, 2)]
        mlp, attended = layer(*norms)
        x = mlp + attended + x
        fused, y1, y2 = ops.layer_norm_pair(fused, *parameters, addends=addends, backend=backend)
        addends = layer(y1, y2)
    total, states, none = ops.layer_norm_pair(fused, *parameters[:2], addends=addends, backend=backend)
    assert none is None
    assert_close(total, x)
    assert_close(states, F.layer_norm(x, (24,), *parameters[:2]))


def run(terms: list[Tensor], parameters: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
    results = ops.layer_norm_pair(terms[0], *parameters, addends=terms[1:], backend=backend)
    return tuple(result for result in results[0 if len(terms) > 1 else 1 :] if result is not None)


@every
@counts
@norms
def test_gradients(backend, device, count, pair):
    terms, parameters = make((2, 3, 5), count, pair, device=device, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (*terms, *parameters)]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return run(list(tensors[: 1 + count]), list(tensors[1 + count :]), None if backend == "triton" else backend)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    # In single precision, through the backend itself.
    weights = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(s)).to(device) for s in range(3)]

    def loss(tensors: list[Tensor], backend: str | None) -> Tensor:
        results = run(tensors[: 1 + count], tensors[1 + count :], backend)
        return sum((r * w).sum() for r, w in zip(results, weights, strict=False))

    single = [t.detach().float().requires_grad_() for t in inputs]
    loss(single, backend).backward()
    expected = torch.autograd.grad(loss(inputs, None), inputs)
    for ours, theirs in zip(single, expected, strict=True):
        assert_close(ours.grad, theirs, RELATIVE[torch.float32])


@every
def test_gradients_of_some(backend, device):
    """Only what asks for a gradient gets one, and an unused output costs nothing."""
    (x, a, b), parameters = make((3, 8), 2, True, device=device)
    a.requires_grad_()
    parameters[2].requires_grad_()
    total, y1, y2 = ops.layer_norm_pair(x, *parameters, addends=(a, b), backend=backend)
    (grad,) = torch.autograd.grad(total.sum(), a, retain_graph=True)
    assert torch.equal(grad, torch.ones_like(a))
    (grad,) = torch.autograd.grad((y2**2).sum(), parameters[2], retain_graph=True)
    (expected,) = torch.autograd.grad((F.layer_norm(total.detach(), (8,), *parameters[2:]) ** 2).sum(), parameters[2])
    assert_close(grad, expected)
    (grad,) = torch.autograd.grad((y1**2).sum(), a)
    leaf = total.detach().requires_grad_()
    (expected,) = torch.autograd.grad((F.layer_norm(leaf, (8,), *parameters[:2]) ** 2).sum(), leaf)
    assert_close(grad, expected)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(backend, device, dtype):
    skip_unable(backend, device, dtype)
    terms, parameters = make((4, 16), 2, True, device=device, dtype=dtype)
    inputs = [t.requires_grad_() for t in (*terms, *parameters)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    for tensors, chosen in ((inputs, backend), (wide, None)):
        sum((r.double() ** 2).sum() for r in run(tensors[:3], tensors[3:], chosen)).backward()
    for ours, theirs in zip(inputs, wide, strict=True):
        assert ours.grad.dtype == dtype
        assert_close(ours.grad, theirs.grad, RELATIVE[dtype])


@every
@norms
def test_opcheck_and_compile(backend, device, pair):
    (x, a, b), parameters = make((3, 6), 2, pair, device=device)
    tensors = [t.requires_grad_() for t in (x, a, b, *parameters)]
    filled = [*parameters, *[None] * (4 - len(parameters))]
    torch.library.opcheck(torch.ops.dove_fast.layer_norm_pair, (x, *filled, 1e-5, backend))
    torch.library.opcheck(torch.ops.dove_fast.add_layer_norm_pair, (x, a, None, *filled, 1e-5, backend))
    torch.library.opcheck(torch.ops.dove_fast.add_layer_norm_pair, (x, a, b, *filled, 1e-5, backend))

    def function(x: Tensor, a: Tensor, b: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return run([x * 2, a, b], list(parameters), backend) + run([x * 2], list(parameters), backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(*tensors), function(*tensors), strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40), width=st.integers(1, 200), count=st.integers(0, 2), pair=st.booleans(), seed=st.integers(0)
)
def test_any_size(rows, width, count, pair, seed):
    terms, parameters = make((rows, width), count, pair)
    terms = [term.roll(seed % 7) for term in terms]
    found = run(terms, parameters, "cpu")
    for ours, theirs in zip(found, run(terms, parameters, "reference"), strict=True):
        assert_close(ours, theirs)


@counts
@norms
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_instruction_set(isa, dtype, count, pair):
    if not native.load().isa_available(isa):
        pytest.skip(f"{isa} is not compiled or not on this processor")
    for width in (1, 5, 64, 83, 300):
        (x, *addends), parameters = make((4, width), count, pair, dtype=dtype)
        filled = [*parameters, *[None] * (4 - len(parameters))]
        total, y1, y2, mean, rstd = native_norm.layer_norm_pair_cpu(x, addends, *filled, 1e-5, _isa=isa)
        assert torch.equal(total, sum(map(Tensor.float, (*addends[1:], x)), *map(Tensor.float, addends[:1])).to(dtype))
        wide = total.double()
        assert_close(y1.double(), torch.stack([norm(row, *parameters[:2], 1e-5) for row in wide]), RELATIVE[dtype])
        if pair:
            assert_close(y2.double(), torch.stack([norm(row, *parameters[2:], 1e-5) for row in wide]), RELATIVE[dtype])
        assert torch.allclose(mean.double(), wide.mean(-1), atol=1e-5)
        assert_close(rstd.double(), (wide.var(-1, unbiased=False) + 1e-5).rsqrt(), RELATIVE[torch.float32])


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    (x, a, b), parameters = make((300, 513), 2, True)
    try:
        torch.set_num_threads(1)
        expected = ops.layer_norm_pair(x, *parameters, addends=(a, b), backend="cpu")
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            found = ops.layer_norm_pair(x, *parameters, addends=(a, b), backend="cpu")
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(before)


X, P = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], P, P), {}, TypeError, "x must be a tensor, got list"),
        ((X.int(), P, P), {}, TypeError, "x must be float64, .*, got int32"),
        ((torch.tensor(1.0), P, P), {}, ValueError, r"x must have shape \(..., d\) with d at least 1, got \(\)"),
        ((torch.ones(2, 0), P, P), {}, ValueError, r"with d at least 1, got \(2, 0\)"),
        ((X, torch.ones(5), P), {}, ValueError, r"weight1 must have shape \(4,\), got \(5,\)"),
        ((X, P, None), {}, TypeError, "bias1 must be a tensor, got NoneType"),
        ((X, P, P.half()), {}, TypeError, "bias1 must be float32 like x, or float32, got float16"),
        ((X, P, P, P), {}, ValueError, "weight2 and bias2 together, got weight2 alone"),
        ((X, P, P, None, P), {}, ValueError, "weight2 and bias2 together, got bias2 alone"),
        ((X, P, P, P, P.to("meta")), {}, ValueError, "bias2 must be on cpu like x, got meta"),
        ((X, P, P), {"addends": (X, X, X)}, ValueError, "addends must be at most two tensors, got 3"),
        ((X, P, P), {"addends": (X, X[:1])}, ValueError, r"addends\[1\] must have shape \(2, 4\) like x, got \(1, 4\)"),
        ((X, P, P), {"addends": (X.half(),)}, TypeError, r"addends\[0\] must be float32 like x, got float16"),
        ((X, P, P), {"addends": X}, TypeError, "addends must be a sequence of at most two tensors, got Tensor"),
        ((X, P, P), {"addends": None}, TypeError, "addends must be a sequence of at most two tensors, got NoneType"),
        ((X, P, P), {"addends": [1.0]}, TypeError, r"addends\[0\] must be a tensor, got float"),
        ((X, P, P), {"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ((X, P, P), {"backend": "cuda"}, BackendError, "layer_norm_pair has no 'cuda' implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.layer_norm_pair(*arguments, **options)
