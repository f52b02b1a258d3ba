"""The optimiser's groups, the averaged weights against a straight formula, and restarts of unused codewords."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import micro_model
from tolerances import RELATIVE, assert_close
from torch import nn

from dove_fast.training.config import OptimizerConfig
from dove_fast.training.optimization import CodebookUse, average_into, make_optimizer

CODEWORDS, WIDTH = 8, 3


def decayed_names(model: nn.Module) -> set[str]:
    """The weights of linear layers and convolutions."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def test_weight_decay_is_for_matrices_and_kernels():
    model = micro_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = OptimizerConfig(weight_decay=0.5, beta1=0.8, beta2=0.95)
    optimizer = make_optimizer(list(model.named_parameters()), config, 0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    assert all(group["betas"] == (0.8, 0.95) and group["lr"] == 0.1 for group in optimizer.param_groups)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = decayed_names(model)
    assert {"in_proj.weight", "vqgan.encoder.conv_in.weight", "eos_head.weight"} <= decayed
    assert {"vqgan.quantize.embedding.weight", "generator.embed_in.weight"} <= before.keys() - decayed
    for name, parameter in model.named_parameters():
        if name in decayed:
            assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5), RELATIVE[torch.float32])
        else:
            assert torch.equal(parameter, before[name]), name


def test_a_group_without_parameters_is_left_out():
    layer = nn.Linear(2, 2)
    assert len(make_optimizer([("bias", layer.bias)], OptimizerConfig(), 1e-3).param_groups) == 1
    assert len(make_optimizer([("weight", layer.weight)], OptimizerConfig(), 1e-3).param_groups) == 1
    with pytest.raises(ValueError, match="no parameter is trained"):
        make_optimizer([], OptimizerConfig(), 1e-3)


@pytest.mark.parametrize(
    ("decay", "step", "kept"),
    [(0.999, 0, 0.1), (0.999, 8, 0.5), (0.999, 10**6, 0.999), (0.9, 80, 0.9), (0.9, 79, 80 / 89), (0.3, 2, 0.25)],
)
def test_averaged_weights_are_the_formula(decay, step, kept):
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(4, 4), nn.LayerNorm(4))
    averaged = copy.deepcopy(model)
    model[1].bias.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = [parameter.detach().double() for parameter in averaged.parameters()]
    average_into(averaged, model, decay, step)
    frozen = [parameter is model[1].bias for parameter in model.parameters()]
    assert sum(frozen) == 1
    for mean, old, new, stays in zip(averaged.parameters(), before, model.parameters(), frozen, strict=True):
        if stays:
            assert torch.equal(mean.double(), old)
        else:
            assert_close(mean.detach().double(), kept * old + (1 - kept) * new.detach().double(), RELATIVE[mean.dtype])


def test_averaged_weights_follow_a_model_that_stands_still():
    model = nn.Linear(3, 3)
    averaged = nn.Linear(3, 3)
    for step in range(60):
        average_into(averaged, model, 0.5, step)
    assert_close(averaged.weight.detach(), model.weight.detach(), RELATIVE[torch.float32])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def codebook() -> nn.Parameter:
    return nn.Parameter(torch.randn(CODEWORDS, WIDTH, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def grid() -> torch.Tensor:
    """Twenty-four features, all of them different."""
    return torch.arange(2.0 * WIDTH * 12).view(2, WIDTH, 3, 4) + 100


def rows_of(grid: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1]).tolist()]


def stepped(codebook: nn.Parameter) -> torch.optim.AdamW:
    """An optimiser with moments in every row."""
    optimizer = make_optimizer([("quantize.embedding.weight", codebook)], OptimizerConfig(), 1e-3)
    for _ in range(2):
        codebook.grad = torch.ones_like(codebook)
        optimizer.step()
    return optimizer


def test_restarts_exactly_the_unused(codebook, grid):
    optimizer = stepped(codebook)
    use = CodebookUse(codebook, 4)
    use.count(torch.tensor([[[0, 3], [3, 3]]]))
    use.count(torch.tensor([[[5, 0]], [[0, 5]]]))
    assert use.counts.tolist() == [3, 0, 0, 3, 0, 2, 0, 0]
    before, averaged, other = codebook.detach().clone(), torch.randn(CODEWORDS, WIDTH), torch.zeros(CODEWORDS, WIDTH)
    copied = averaged.clone()
    moments = {key: value.clone() for key, value in optimizer.state[codebook].items()}
    assert use.restart(3, grid, optimizer, [averaged, other]) == 3
    used, unused = [0, 3, 5], [1, 2, 4, 6, 7]
    assert torch.equal(codebook[used], before[used]) and torch.equal(averaged[used], copied[used])
    assert not other[used].any()
    restarted = [tuple(row) for row in codebook[unused].tolist()]
    assert len(set(restarted)) == len(unused) and set(restarted) <= set(rows_of(grid))
    for table in (averaged, other):
        assert torch.equal(table[unused], codebook[unused])
    for key, value in optimizer.state[codebook].items():
        if value.dim() == 0:
            assert torch.equal(value, moments[key])
        else:
            assert moments[key].ne(0).all()
            assert torch.equal(value[used], moments[key][used]) and not value[unused].any()
    assert not use.counts.any()
    assert codebook.requires_grad


def test_restarts_at_every_so_many_steps_alone(codebook, grid):
    before = codebook.detach().clone()
    optimizer = stepped(nn.Parameter(before.clone()))
    never, every = CodebookUse(codebook, 0), CodebookUse(codebook, 3)
    for step in range(7):
        for use in (never, every):
            use.count(torch.arange(CODEWORDS).view(1, 2, 4))
        assert never.restart(step, grid, optimizer) is None
        assert every.restart(step, grid, optimizer) == (CODEWORDS if step in (2, 5) else None)
    # Every codeword was in use.
    assert torch.equal(codebook, before)
    # What was counted before a restart is forgotten: nothing was in use since.
    assert every.restart(5, grid, optimizer) == CODEWORDS
    assert every.restart(8, grid, optimizer) == 0
    assert {tuple(row) for row in codebook.tolist()} <= set(rows_of(grid))


def test_the_same_step_makes_the_same_choice(codebook, grid):
    def chosen(step: int) -> torch.Tensor:
        table = nn.Parameter(codebook.detach().clone())
        use = CodebookUse(table, 1)
        use.count(torch.zeros(1, 1, 1, dtype=torch.int64))
        torch.rand(step)
        use.restart(step, grid, stepped(table))
        return table.detach()[1:]

    assert torch.equal(chosen(4), chosen(4))
    assert not torch.equal(chosen(4), chosen(5))


def test_a_restart_leaves_the_random_numbers_of_others(codebook, grid):
    state = torch.get_rng_state()
    CodebookUse(codebook, 1).restart(0, grid, stepped(codebook))
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_features_than_unused_codewords(codebook):
    few = torch.tensor([[7.0, 8.0, 9.0], [17.0, 18.0, 19.0]]).T.reshape(1, WIDTH, 1, 2)
    optimizer = stepped(codebook)
    before = codebook.detach().clone()
    use = CodebookUse(codebook, 1)
    use.count(torch.tensor([[[0, 2]]]))
    assert use.restart(0, few, optimizer) == 2
    assert {tuple(row) for row in codebook[[1, 3]].tolist()} == {(7, 8, 9), (17, 18, 19)}
    still = [0, 2, 4, 5, 6, 7]
    assert torch.equal(codebook[still], before[still])
    assert optimizer.state[codebook]["exp_avg"][still].ne(0).all()


def test_features_of_another_precision_and_no_moments_yet(codebook, grid):
    optimizer = make_optimizer([("quantize.embedding.weight", codebook)], OptimizerConfig(), 1e-3)
    CodebookUse(codebook, 1).restart(0, grid.bfloat16(), optimizer)
    assert codebook.dtype == torch.float32
    assert {tuple(row) for row in codebook.tolist()} <= set(rows_of(grid.bfloat16()))
