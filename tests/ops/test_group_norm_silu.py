"""group_norm_silu against the formula in fp64, on every backend, in both layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from group_norm_silu_truth import DTYPES, arguments, every, gradient_like, layouts, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import skip_wrong_arithmetic
from tolerances import RELATIVE, assert_close
from torch import Tensor

from dove_fast import native, ops
from dove_fast.ops.group_norm_silu import native as native_norm


@every
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 8, 5, 7), 4), ((1, 32, 16, 16), 32), ((3, 6, 1, 1), 2), ((1, 24, 9, 8), 1), ((2, 70, 3), 7)],
    ids=str,
)
def test_formula(backend, device, dtype, channels_last, activation, shape, groups):
    skip_wrong_arithmetic(backend, device, dtype)
    x, weight, bias = arguments(*shape, dtype=dtype, device=device, channels_last=channels_last)
    out = ops.group_norm_silu(x, groups, weight, bias, activation=activation, backend=backend)
    assert out.dtype == dtype
    assert_close(out.double().cpu(), truth(x, groups, weight, bias, activation=activation), RELATIVE[dtype])
    assert out.movedim(1, -1).is_contiguous() == x.movedim(1, -1).is_contiguous(), "the layout is kept"
    assert out.is_contiguous() == x.is_contiguous()


@every
@layouts
def test_several_slabs(backend, device, channels_last):
    x, weight, bias = arguments(2, 12, 90, 70, device=device, channels_last=channels_last)
    out = ops.group_norm_silu(x, 4, weight, bias, backend=backend)
    assert_close(out.double().cpu(), truth(x, 4, weight, bias), RELATIVE[x.dtype])


@every
@layouts
@pytest.mark.parametrize("mean", [1e3, -1e4, 1e5])
def test_a_mean_far_from_zero(backend, device, channels_last, mean):
    """Of x as it is, rounded: nothing is lost behind that."""
    x, weight, bias = arguments(2, 16, 20, 12, device=device, channels_last=channels_last)
    x = x + mean
    out = ops.group_norm_silu(x, 8, weight, bias, activation=None, backend=backend)
    assert_close(out.double().cpu(), truth(x, 8, weight, bias, activation=None), RELATIVE[x.dtype])


@every
@layouts
def test_an_outlier_first_and_wide_groups(backend, device, channels_last):
    """What sums are taken around is not the first value alone, and a group's channels need not fit into a tile."""
    x, weight, bias = arguments(1, 150, 50, 41, device=device, channels_last=channels_last)
    x[:, :, 0, 0] = 1e4
    out = ops.group_norm_silu(x, 2, weight, bias, activation=None, backend=backend)
    assert_close(out.double().cpu(), truth(x, 2, weight, bias, activation=None), RELATIVE[x.dtype])
    x[:, :, 0, 0] = 1e25
    out = ops.group_norm_silu(x, 2, weight, bias, activation=None, backend=backend)
    assert not out.isnan().any(), "a variance beyond fp32 makes the values small, not NaN"


@every
@layouts
def test_extreme_values(backend, device, channels_last):
    x, weight, bias = arguments(3, 4, 6, 6, device=device, channels_last=channels_last)
    x[0] = 7.0
    out = ops.group_norm_silu(x, 2, weight, bias, backend=backend)
    constant = F.silu(bias)[:, None, None].expand(4, 6, 6)
    assert_close(out[0], constant, 1e-5)
    large = torch.full_like(weight, 200.0)
    for scale in (large, -large):
        wide = ops.group_norm_silu(x, 2, scale, bias, backend=backend)
        assert_close(wide.double().cpu()[1:], truth(x, 2, scale, bias)[1:], RELATIVE[x.dtype])
    x[1, 0, 2, 3] = torch.nan
    out = ops.group_norm_silu(x, 2, weight, bias, backend=backend)
    assert out[1, :2].isnan().all(), "the group that holds NaN"
    assert out[1, 2:].isfinite().all() and out[2].isfinite().all() and out[0].isfinite().all()


@every
def test_mixed_dtypes_and_strides(backend, device):
    x, weight, bias = arguments(2, 8, 6, 5, dtype=torch.float16, device=device)
    out = ops.group_norm_silu(x, 4, weight.float(), bias.float(), backend=backend)
    assert out.dtype == torch.float16
    assert_close(out.double().cpu(), truth(x, 4, weight, bias), RELATIVE[torch.float16])
    for view in (x[:, :, ::2], x.transpose(0, 1)[:, :2].transpose(0, 1).expand(2, 8, 6, 5)[:, ::2], x[..., 1:4]):
        channels = view.shape[1]
        w, b = torch.stack([weight, bias], dim=1)[:channels].unbind(1)
        out = ops.group_norm_silu(view, 2, w, b, backend=backend)
        assert_close(out.double().cpu(), truth(view, 2, w, b), RELATIVE[torch.float16])


@every
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)], ids=str)
def test_empty(backend, device, shape):
    x, weight, bias = arguments(*shape, device=device)
    assert ops.group_norm_silu(x, 4, weight, bias, backend=backend).shape == shape


@every
@layouts
def test_an_image_does_not_depend_on_its_batch(backend, device, channels_last):
    x, weight, bias = arguments(5, 16, 20, 20, device=device, channels_last=channels_last)
    together = ops.group_norm_silu(x, 4, weight, bias, backend=backend)
    for row in range(5):
        alone = ops.group_norm_silu(x[row : row + 1], 4, weight, bias, backend=backend)
        assert torch.equal(alone[0], together[row])


@layouts
@pytest.mark.parametrize("shape", [(1, 64, 96, 96), (7, 32, 24, 24), (2, 128, 130, 64)], ids=str)
def test_threads_do_not_matter(channels_last, shape):
    x, weight, bias = arguments(*shape, channels_last=channels_last)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.group_norm_silu(x, 32, weight, bias, backend="cpu")
        assert_close(expected, F.silu(F.group_norm(x, 32, weight, bias, 1e-6)))
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(ops.group_norm_silu(x, 32, weight, bias, backend="cpu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@layouts
def test_every_instruction_set(isa, dtype, channels_last):
    if not native.load().isa_available(isa):
        pytest.skip(f"{isa} is not compiled or not on this processor")
    for shape, groups in (((2, 37, 11, 13), 1), ((1, 64, 40, 40), 32), ((2, 6, 3, 1), 3)):
        x, weight, bias = arguments(*shape, dtype=dtype, channels_last=channels_last)
        for activation in ("silu", None):
            out, mean, _ = native_norm.group_norm_silu_cpu(x, groups, weight, bias, 1e-6, activation, _isa=isa)
            assert_close(out.double(), truth(x, groups, weight, bias, activation=activation), RELATIVE[dtype])
            assert_close(mean, x.float().reshape(shape[0], groups, -1).mean(2), 1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    groups, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    shape = (data.draw(st.integers(1, 3)), groups * width, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9)))
    x, weight, bias = arguments(*shape, channels_last=data.draw(st.booleans()))
    eps = data.draw(st.sampled_from([1e-6, 1e-3, 1.0]))
    out = ops.group_norm_silu(x, groups, weight, bias, eps=eps, backend="cpu")
    expected = truth(x, groups, weight, bias, eps)
    # A group of a few equal values has next to no spread: what is compared is then the eps.
    assert (out - expected).norm() <= 1e-5 * expected.norm() + 1e-6


@every
@layouts
def test_opcheck_and_compile(backend, device, channels_last):
    x, weight, bias = arguments(2, 4, 3, 5, device=device, channels_last=channels_last)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(
        torch.ops.dove_fast.group_norm_silu, (leaves[0], 2, *leaves[1:], 1e-6, "silu", backend), rtol=1e-4, atol=1e-5
    )

    def normalise(t: Tensor) -> Tensor:
        return ops.group_norm_silu(t * 2, 2, weight, bias, backend=backend)

    compiled = torch.compile(normalise, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), normalise(x))
    grad = gradient_like(x)
    expected = torch.autograd.grad(normalise(x), leaves, grad)
    assert all(map(torch.equal, torch.autograd.grad(compiled(x), leaves, grad), expected))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(1, 4, 2).int()}, TypeError, "x must be float64, .*, got int32"),
        ({"x": torch.ones(4)}, ValueError, r"x must have shape \(B, C, ...\), got \(4,\)"),
        ({"num_groups": 3}, ValueError, "num_groups must divide the 4 channels of x, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an int, got float"),
        ({"eps": "a"}, TypeError, "eps must be a number, got str"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(4,\), got \(3,\)"),
        ({"bias": torch.ones(4).half()}, TypeError, "bias must be float32 like x, or float32, got float16"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, "bias must be on cpu like x, got meta"),
        ({"activation": "gelu"}, ValueError, "activation must be 'silu' or None, got 'gelu'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(changes, error, message):
    right = {"x": torch.ones(1, 4, 2), "num_groups": 2, "weight": torch.ones(4), "bias": torch.ones(4)}
    with pytest.raises(error, match=message):
        ops.group_norm_silu(**{**right, **changes})
