"""The gradients of group_norm_silu against those of the formula in fp64, on every backend, in both layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from group_norm_silu_truth import DTYPES, arguments, every, gradient_like, innermost, layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import skip_wrong_arithmetic
from tolerances import RELATIVE, assert_close
from torch import Tensor

from dove_fast import native, ops
from dove_fast.ops.group_norm_silu import native as native_norm


def truth_gradients(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    grad: Tensor,
    eps: float = 1e-6,
    activation: str | None = "silu",
) -> tuple[Tensor, ...]:
    """What autograd makes of torch's own functions in fp64."""
    leaves = [t.detach().double().cpu().requires_grad_() for t in (x, weight, bias)]
    # F.group_norm refuses a single value.
    out = torch.group_norm(leaves[0], groups, *leaves[1:], eps)
    return torch.autograd.grad(F.silu(out) if activation else out, leaves, grad.double().cpu())


def gradients(x: Tensor, groups: int, weight: Tensor, bias: Tensor, grad: Tensor, **options) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(ops.group_norm_silu(leaves[0], groups, *leaves[1:], **options), leaves, grad)


def assert_gradients(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found.double().cpu(), wanted, tolerance)


@every
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 8, 5, 7), 8),
        ((1, 32, 16, 16), 32),
        ((3, 6, 1, 1), 2),
        ((2, 37, 9, 8), 1),
        ((1, 160, 3, 5), 32),
        ((2, 70, 3), 7),
        ((4, 6), 2),
    ],
    ids=str,
)
def test_gradients(backend, device, dtype, channels_last, activation, shape, groups):
    skip_wrong_arithmetic(backend, device, dtype)
    x, weight, bias = arguments(*shape, dtype=dtype, device=device, channels_last=channels_last)
    grad = gradient_like(x)
    found = gradients(x, groups, weight, bias, grad, activation=activation, backend=backend)
    assert_gradients(found, truth_gradients(x, groups, weight, bias, grad, activation=activation), RELATIVE[dtype])
    assert found[0].stride() == x.stride() and found[0].dtype == dtype, "the layout is kept"


@layouts
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_against_finite_differences(channels_last, activation, backend):
    leaves = [t.double().requires_grad_() for t in arguments(2, 6, 4, 3, channels_last=channels_last)]
    run = lambda *t: ops.group_norm_silu(t[0], 3, *t[1:], activation=activation, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@every
@layouts
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1e3, -1e4])
def test_gradients_of_several_slabs_and_a_mean_far_from_zero(backend, device, channels_last, activation, mean):
    """The mean is kept in fp32, and what that rounds off does not matter."""
    x, weight, bias = arguments(2, 12, 90, 70, device=device, channels_last=channels_last)
    x[1] += mean
    grad = gradient_like(x)
    found = gradients(x, 4, weight, bias, grad, activation=activation, backend=backend)
    assert_gradients(found, truth_gradients(x, 4, weight, bias, grad, activation=activation), RELATIVE[x.dtype])


@every
@layouts
def test_gradients_of_extreme_values(backend, device, channels_last):
    x, weight, bias = arguments(3, 4, 6, 6, device=device, channels_last=channels_last)
    grad = gradient_like(x)
    large = torch.full_like(weight, 200.0)
    for scale in (large, -large):
        found = gradients(x, 2, scale, bias, grad, backend=backend)
        assert_gradients(found, truth_gradients(x, 2, scale, bias, grad), RELATIVE[x.dtype])
    for value in (torch.nan, torch.inf, -torch.inf):
        x[1, 0, 2, 3] = value
        grad_x, grad_weight, grad_bias = gradients(x, 2, weight, bias, grad, backend=backend)
        assert grad_x[1, :2].isnan().all(), "the group that holds it"
        assert grad_x[1, 2:].isfinite().all() and grad_x[2].isfinite().all() and grad_x[0].isfinite().all()
        for of_channels in (grad_weight, grad_bias):
            assert of_channels[:2].isnan().all() and of_channels[2:].isfinite().all()


@every
def test_gradients_of_a_group_of_one_value(backend, device):
    x, weight, bias = arguments(3, 6, 1, 1, device=device)
    grad_x, grad_weight, _ = gradients(x, 6, weight, bias, gradient_like(x), eps=1.0, backend=backend)
    assert grad_x.abs().max() < 1e-6 and grad_weight.abs().max() < 1e-6


@every
def test_gradients_of_mixed_dtypes_and_strides(backend, device):
    x, weight, bias = arguments(2, 8, 6, 5, dtype=torch.float16, device=device)
    weight, bias = weight.float(), bias.float()
    for view in (x, innermost(x), x[..., 1:4], x.transpose(0, 1).contiguous().transpose(0, 1)):
        grad = gradient_like(view)
        found = gradients(view, 4, weight, bias, grad, backend=backend)
        assert [t.dtype for t in found] == [torch.float16, torch.float32, torch.float32]
        assert_gradients(found, truth_gradients(view, 4, weight, bias, grad), RELATIVE[torch.float16])
        others = (grad.contiguous(), innermost(grad), torch.stack([grad, grad], dim=-1)[..., 0])
        for other in others:
            again = gradients(view, 4, weight, bias, other, backend=backend)
            assert all(map(torch.equal, again, found)), "grad's strides do not matter"
    ones = torch.ones((), dtype=torch.float16, device=device).expand(x.shape)
    expected = gradients(x, 4, weight, bias, ones.contiguous(), backend=backend)
    assert all(map(torch.equal, gradients(x, 4, weight, bias, ones, backend=backend), expected))


@every
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)], ids=str)
def test_gradients_of_nothing(backend, device, shape):
    x, weight, bias = arguments(*shape, device=device)
    grad_x, grad_weight, grad_bias = gradients(x, 4, weight, bias, x, backend=backend)
    assert grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros_like(weight)) and torch.equal(grad_bias, torch.zeros_like(bias))


@every
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_for_one_argument_alone(backend, device, wanted):
    tensors = arguments(2, 6, 4, 3, device=device)
    grad = gradient_like(tensors[0])
    expected = gradients(tensors[0], 3, *tensors[1:], grad, backend=backend)[wanted]
    leaf = tensors[wanted].requires_grad_()
    ops.group_norm_silu(tensors[0], 3, *tensors[1:], backend=backend).backward(grad)
    assert torch.equal(leaf.grad, expected)
    assert [t.grad is None for t in tensors] == [index != wanted for index in range(3)]


@every
@layouts
def test_an_image_gradient_does_not_depend_on_its_batch(backend, device, channels_last):
    x, weight, bias = arguments(5, 16, 20, 20, device=device, channels_last=channels_last)
    x[2] += 1e3
    grad = gradient_like(x)
    together = gradients(x, 4, weight, bias, grad, backend=backend)[0]
    for row in range(5):
        some = slice(row, row + 1)
        assert torch.equal(gradients(x[some], 4, weight, bias, grad[some], backend=backend)[0][0], together[row])


@layouts
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 64, 96, 96), 32), ((7, 32, 24, 24), 32), ((3, 6, 130, 290), 1)], ids=str
)
def test_threads_do_not_matter_to_gradients(channels_last, shape, groups):
    x, weight, bias = arguments(*shape, channels_last=channels_last)
    x[-1] += 1e3
    grad = gradient_like(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = gradients(x, groups, weight, bias, grad, backend="cpu")
        assert_gradients(expected, truth_gradients(x, groups, weight, bias, grad), RELATIVE[x.dtype])
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, gradients(x, groups, weight, bias, grad, backend="cpu"), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@layouts
def test_gradients_in_every_instruction_set(isa, dtype, channels_last):
    if not native.load().isa_available(isa):
        pytest.skip(f"{isa} is not compiled or not on this processor")
    for shape, groups in (((2, 37, 11, 13), 1), ((1, 64, 40, 40), 32), ((2, 6, 3, 1), 3)):
        x, weight, bias = arguments(*shape, dtype=dtype, channels_last=channels_last)
        grad = gradient_like(x)
        for activation in ("silu", None):
            _, mean, rstd = native_norm.group_norm_silu_cpu(x, groups, weight, bias, 1e-6, activation, _isa=isa)
            found = native_norm.group_norm_silu_backward_cpu(grad, x, mean, rstd, weight, bias, activation, _isa=isa)
            assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
            expected = truth_gradients(x, groups, weight, bias, grad, activation=activation)
            assert_gradients(found, expected, RELATIVE[dtype])
            # Not rounded to dtype.
            assert_gradients(found[1:], expected[1:], RELATIVE[torch.float32])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_gradients_of_any_shape(data):
    groups, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    shape = (data.draw(st.integers(1, 3)), groups * width, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9)))
    x, weight, bias = arguments(*shape, channels_last=data.draw(st.booleans()))
    grad = gradient_like(x)
    found = gradients(x, groups, weight, bias, grad, eps=1.0, backend="cpu")
    for ours, expected in zip(found, truth_gradients(x, groups, weight, bias, grad, eps=1.0), strict=True):
        # A group of one value has no gradient: what is compared is then what rounding leaves of 0.
        assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-6


@every
@layouts
def test_opcheck_of_the_backward(backend, device, channels_last):
    x, weight, bias = arguments(2, 4, 3, 5, device=device, channels_last=channels_last)
    _, mean, rstd = torch.ops.dove_fast.group_norm_silu(x, 2, weight, bias, 1e-6, "silu", backend)
    arguments_ = (gradient_like(x), x, mean, rstd, weight, bias, "silu", backend)
    torch.library.opcheck(torch.ops.dove_fast.group_norm_silu_backward, arguments_)


@every
@pytest.mark.parametrize("activation", ["silu", None])
def test_a_second_derivative_raises(backend, device, activation):
    leaves = [t.requires_grad_() for t in arguments(2, 4, 3, 5, device=device)]
    out = ops.group_norm_silu(leaves[0], 2, *leaves[1:], activation=activation, backend=backend)
    grad_x, *_ = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu has no second derivative"):
        grad_x.sum().backward()
