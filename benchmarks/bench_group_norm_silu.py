"""group_norm_silu against F.group_norm and F.silu, eager and compiled, at the layers of the VQGAN's encoder.

    pytest benchmarks/bench_group_norm_silu.py --benchmark-only --benchmark-json=figures.json

The floor reads x once and writes the result once; of forward and backward it reads x and the gradient too and writes
x's gradient. Results are compared first. `--batch` sets B (default 2 on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dove_fast import ops

GROUPS, EPS = 32, 1e-6
# Channels and the side of the grid, at 256x256 images.
LAYERS = [pytest.param(128, 256, marks=pytest.mark.large), pytest.param(128, 128, marks=pytest.mark.large)]
LAYERS += [(256, 64), pytest.param(512, 32, marks=pytest.mark.large), (768, 16)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

layers = pytest.mark.parametrize(("channels", "side"), LAYERS, ids=str)
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])
layouts = pytest.mark.parametrize("layout", ["nchw", "channels-last"])
rivals = pytest.mark.parametrize("rival", ["eager", "eager-nchw", "compiled"])


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return what a user would write."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


@pytest.fixture
def compiled():
    """Return the same through torch.compile; skip where nothing can be compiled.

    From nothing each time: torch gives up on a function, and runs it as it is, once it was compiled for eight shapes.
    """
    torch.compiler.reset()
    function = torch.compile(eager, dynamic=False)
    try:
        function(torch.ones(1, GROUPS, 4, 4), torch.ones(GROUPS), torch.ones(GROUPS))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield function


@layers
@dtypes
@layouts
@rivals
def bench_group_norm_silu(compare, request, batch, device, channels, side, dtype, layout, rival):
    """One layer, with SiLU; the rival has the same layout, or NCHW whatever ours is."""
    if rival == "eager-nchw" and layout == "nchw":
        pytest.skip("the same as eager")
    plain = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x = plain if layout == "nchw" else plain.contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(channels, device=device, dtype=dtype) for _ in range(2))
    function = request.getfixturevalue("compiled") if rival == "compiled" else eager
    theirs = plain if rival == "eager-nchw" else x
    with torch.no_grad():
        expected = eager(x.double(), weight.double(), bias.double())
        for result in (ops.group_norm_silu(x, GROUPS, weight, bias, eps=EPS), function(theirs, weight, bias)):
            assert (result.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        compare(
            lambda: ops.group_norm_silu(x, GROUPS, weight, bias, eps=EPS),
            lambda: function(theirs, weight, bias),
            rival_name=f"{rival} group_norm + silu",
            moved=2 * x.nbytes,
        )


@layers
@dtypes
@layouts
def bench_group_norm_silu_backward(compare, batch, device, channels, side, dtype, layout):
    """One layer, with SiLU, forward and backward, against eager in the same layout."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(batch, channels, side, side, generator=generator).to(device, dtype) for _ in range(2))
    if layout == "channels-last":
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    leaves = [x, *(torch.randn(channels, device=device, dtype=dtype) for _ in range(2))]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm_silu(x, GROUPS, weight, bias, eps=EPS)

    def both(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, grad)

    expected = both(eager, [t.double().requires_grad_() for t in leaves], grad.double())
    leaves = [t.requires_grad_() for t in leaves]
    for function in (ours, eager):
        for result, wanted in zip(both(function, leaves, grad), expected, strict=True):
            assert (result.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    compare(
        lambda: both(ours, leaves, grad),
        lambda: both(eager, leaves, grad),
        rival_name="eager group_norm + silu, forward and backward",
        moved=5 * x.nbytes,
    )
