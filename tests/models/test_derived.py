"""What is computed once from parameters: kept while they stay as they are, and never longer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_models import micro_config
from torch import nn

from dove_fast import ops
from dove_fast.models.derived import Derived
from dove_fast.models.vqgan import VectorQuantizer


class Counted:
    """Twice the source, and how often it was computed."""

    def __init__(self) -> None:
        self.count = 0
        self.derived = Derived(self.compute)

    def compute(self, source):
        self.count += 1
        return source * 2


@pytest.fixture
def counted():
    return Counted()


def test_kept_while_the_source_stays(counted):
    weight = nn.Parameter(torch.ones(3))
    for _ in range(3):
        value = counted.derived(weight)
    assert counted.count == 1
    assert value.tolist() == [2, 2, 2]
    assert not value.requires_grad
    counted.derived.refresh()
    counted.derived(weight)
    assert counted.count == 2


def double_in_place(weight):
    with torch.no_grad():
        weight.mul_(2)


def optimiser_step(weight):
    weight.grad = -torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


def fused_optimiser_step(weight):
    # torch does not count this write.
    weight.grad = -torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0, fused=True).step()


def load(weight):
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": torch.full((3,), 2.0)})


def swap_data(weight):
    weight.data = torch.full((3,), 2.0)


@pytest.mark.parametrize("change", [double_in_place, optimiser_step, fused_optimiser_step, load, swap_data])
def test_computed_again_when_the_source_changes(counted, change):
    weight = nn.Parameter(torch.ones(3))
    counted.derived(weight)
    change(weight)
    assert counted.derived(weight).tolist() == pytest.approx([4, 4, 4])
    assert counted.count == 2


def test_averaged_weights_change(counted):
    mean = torch.ones(3)
    counted.derived(mean)
    torch._foreach_lerp_([mean], [torch.full((3,), 3.0)], 0.5)
    assert counted.derived(mean).tolist() == [4, 4, 4]


def test_optimisers_of_other_weights_do_not_matter_to_frozen_ones(counted):
    frozen = torch.ones(3)
    counted.derived(frozen)
    fused_optimiser_step(nn.Parameter(torch.ones(3)))
    counted.derived(frozen)
    assert counted.count == 1


def test_another_tensor_or_dtype(counted):
    counted.derived(torch.ones(3))
    assert counted.derived(torch.ones(3) * 2).tolist() == [4, 4, 4]
    module = nn.Linear(2, 2)
    counted.derived(module.weight)
    module.to(torch.bfloat16)
    assert counted.derived(module.weight).dtype == torch.bfloat16
    assert counted.count == 4


def test_inference_mode(counted):
    weight = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        value = counted.derived(weight)
        inside = torch.ones(3)
        counted.derived(inside)
        inside.mul_(3)
        assert counted.derived(inside).tolist() == [6, 6, 6], "writes to inference tensors are not counted"
    assert not value.is_inference()
    weight2 = torch.ones(3, requires_grad=True)
    (weight2 * value).sum().backward()  # an inference tensor could not be saved for this


def test_copies_start_empty():
    derived = Derived(ops.codebook_squares)
    codebook = torch.randn(5, 4)
    derived(codebook)
    for other in (copy.deepcopy(derived), pickle.loads(pickle.dumps(derived))):
        assert other._kept is None
        assert torch.equal(other(codebook), derived(codebook))


def test_codebook_norms_are_computed_once(monkeypatch):
    quantizer = VectorQuantizer(micro_config().vqgan)
    nn.init.normal_(quantizer.embedding.weight)
    calls = 0
    compute = quantizer._squares._compute

    def counting(codebook):
        nonlocal calls
        calls += 1
        return compute(codebook)

    monkeypatch.setattr(quantizer._squares, "_compute", counting)
    features = torch.randn(2, quantizer.embedding.embedding_dim, 3, 3, generator=torch.Generator().manual_seed(0))
    before = quantizer(features)[1]
    assert torch.equal(quantizer(features)[1], before)
    assert calls == 1
    with torch.no_grad():
        quantizer.embedding.weight.neg_()
    expected, _ = ops.vq_lookup(features.permute(0, 2, 3, 1), quantizer.embedding.weight)
    assert torch.equal(quantizer(features)[1], expected)
    assert calls == 2
    quantizer.refresh()
    quantizer(features)
    assert calls == 3


def test_codebook_under_compile():
    quantizer = VectorQuantizer(micro_config().vqgan)
    features = torch.randn(1, quantizer.embedding.embedding_dim, 3, 3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(features)[1], quantizer(features)[1])
    with torch.no_grad():
        quantizer.embedding.weight.neg_()
    assert torch.equal(compiled(features)[1], quantizer(features)[1])
