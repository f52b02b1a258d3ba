"""Packed weights give what the layer gives, and are never stale where torch counts the writes."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from tolerances import RELATIVE, assert_close, relative_error
from torch import nn
from upstream import plain_convolutions

from dove_fast.config import GPTNeoXConfig
from dove_fast.generation import linear as linear_module
from dove_fast.generation.linear import PackedLinears
from dove_fast.models.gpt_neox import MLP

packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@pytest.fixture
def linears():
    return PackedLinears()


@pytest.fixture
def calls(monkeypatch):
    """Count the times that a weight is packed."""
    packed = []
    original = linear_module._pack

    def pack(*sources, dtype):
        packed.append(dtype)
        return original(*sources, dtype=dtype)

    monkeypatch.setattr(linear_module, "_pack", pack)
    return packed


def make(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias)


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (300,), (2, 5), ()])
@torch.no_grad()
def test_is_the_layer(linears, calls, bias, shape):
    layer = make(bias)
    x = torch.randn(*shape, 24)
    exact = copy.deepcopy(layer).double()(x.double())
    for _ in range(3):
        assert_close(linears(layer, x), exact)
    assert calls == [torch.float32]


@packs
@torch.no_grad()
def test_changed_weights(linears, calls):
    layer, x = make(), torch.randn(3, 24)
    linears(layer, x)
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.bias.add_(1),
        lambda: layer.load_state_dict(nn.Linear(24, 40).state_dict()),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(40, 24))),
    ):
        change()
        assert_close(linears(layer, x), layer(x))
    assert len(calls) == 5
    # Not counted by torch: refresh is for that.
    layer.weight.data.mul_(3)
    linears.refresh()
    assert_close(linears(layer, x), layer(x))


@packs
def test_others_are_called_as_they_are(linears, calls):
    layer, x = make(), torch.randn(3, 24)

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    assert linears(layer, x).requires_grad
    with torch.no_grad():
        adapter = Adapter(24, 40)
        assert torch.equal(linears(adapter, x), adapter(x))
        assert torch.equal(linears(layer, x[:0]), layer(x[:0]))
        exact = copy.deepcopy(layer).double()
        assert torch.equal(linears(exact, x.double()), exact(x.double()))
        half = copy.deepcopy(layer).half()
        assert torch.equal(linears(half, x.half()), half(x.half()))
        with plain_convolutions():
            assert torch.equal(linears(layer, x), layer(x))
        hook = layer.register_forward_hook(lambda module, args, out: out + 1)
        assert torch.equal(linears(layer, x), layer(x))
        hook.remove()
        wrapped = copy.deepcopy(layer)
        wrapped.forward = lambda x: 2 * layer(x)
        assert torch.equal(linears(wrapped, x), 2 * layer(x))
        assert not calls
        with pytest.raises(RuntimeError, match="same dtype"):
            linears(layer, x.double())


@packs
@torch.no_grad()
def test_bf16_and_autocast(linears):
    layer, x = make(), torch.randn(50, 24)
    exact = copy.deepcopy(layer).double()(x.double())
    half = copy.deepcopy(layer).bfloat16()
    assert relative_error(linears(half, x.bfloat16()), exact) <= RELATIVE[torch.bfloat16]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linears(layer, x)
        assert out.dtype == layer(x).dtype == torch.bfloat16
        assert relative_error(out, exact) <= RELATIVE[torch.bfloat16]
    assert_close(linears(layer, x), layer(x))


@packs
@torch.no_grad()
def test_mlp(linears, calls):
    config = GPTNeoXConfig(
        vocab_size=0, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(0)
    mlp, x = MLP(config), torch.randn(9, 32)
    assert_close(linears.mlp(mlp, x), mlp(x))
    assert len(calls) == 2
    mlp.register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(linears.mlp(mlp, x), mlp(x))
    # A module of somebody's own.
    assert torch.equal(linears.mlp(nn.SiLU(), x), nn.SiLU()(x))


@packs
@torch.no_grad()
def test_goes_with_the_layer_and_starts_empty_in_copies(linears):
    layer, x = make(), torch.randn(3, 24)
    linears(layer, x)
    assert len(linears._kept) == 1
    for again in (copy.deepcopy(linears), pickle.loads(pickle.dumps(linears))):
        assert len(again._kept) == 0
        assert_close(again(layer, x), layer(x))
    del layer
    gc.collect()
    assert len(linears._kept) == 0
