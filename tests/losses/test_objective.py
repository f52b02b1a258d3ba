"""The whole losses against a straight-line version, and what each part of them does."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import RELATIVE, assert_close
from torch import nn

from dove_fast.losses import (
    DOVELoss,
    LossConfig,
    PatchDiscriminator,
    QDOVELoss,
    eos_loss,
    hinge_loss,
    region_mean,
    region_mse,
)

SIDE, STEPS = 16, 6


class Distance(nn.Module):
    """A stand-in for LPIPS: a distance map."""

    def forward(self, x, x_hat):
        return (x - x_hat).abs().mean(dim=1, keepdim=True)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images, reconstruction = torch.rand(2, 4, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    logits = torch.randn(4, STEPS, generator=generator, dtype=torch.float64)
    return {
        "images": images,
        "reconstruction": reconstruction.requires_grad_(),
        "eos_logits": logits.requires_grad_(),
        "lengths": torch.tensor([1, 3, 4, 6]),
    }


@pytest.fixture
def mask():
    mask = torch.zeros(4, 1, SIDE, SIDE, dtype=torch.bool)
    mask[0, :, 2:9, 4:12] = mask[1, :, :, :3] = mask[2] = True
    mask[3, :, 5:, 5:] = True
    return mask


def make(kind=QDOVELoss, **fields):
    torch.manual_seed(0)
    config = LossConfig(**{"adversarial_start": 5} | fields)
    discriminator = PatchDiscriminator(16, 1).double() if config.adversarial_weight else None
    loss = kind(config, perceptual=Distance() if config.perceptual_weight else None, discriminator=discriminator)
    for error in (0.1, 0.2):
        loss.threshold.update(error)
    return loss, discriminator


@pytest.mark.parametrize("step", [0, 4, 5, 10**6])
@pytest.mark.parametrize("with_mask", [False, True])
def test_is_the_method(batch, mask, step, with_mask):
    loss, discriminator = make(perceptual_weight=0.7, irrelevant_weight=0.25, eos_weight_end=0.5)
    mask = mask if with_mask else None
    terms = loss(**batch, step=step, mask=mask)
    config = loss.config
    mse = region_mse(batch["images"], batch["reconstruction"], mask)
    seen = region_mean(Distance()(batch["images"], batch["reconstruction"]), mask)
    inside, outside = (config.mse_weight * a + config.perceptual_weight * b for a, b in zip(mse, seen, strict=True))
    expected = inside + config.irrelevant_weight * outside
    if step >= 5:
        expected = expected - config.adversarial_weight * discriminator(batch["reconstruction"]).mean(dim=(1, 2, 3))
    weight = config.eos_weight(step)
    lengths = eos_loss(batch["eos_logits"], batch["lengths"], mse[0], 0.15000000000000002)
    assert lengths.any()
    expected = (expected + weight * lengths).mean()
    assert_close(terms.total.detach(), expected.detach(), RELATIVE[torch.float64])
    assert_close(terms.errors, mse[0].detach())
    assert terms.eos_weight == weight
    assert not any(getattr(terms, name).requires_grad for name in ("mse", "perceptual", "adversarial", "eos", "errors"))
    wanted = torch.autograd.grad(expected, [batch["reconstruction"], batch["eos_logits"]])
    found = torch.autograd.grad(terms.total, [batch["reconstruction"], batch["eos_logits"]])
    for mine, other in zip(found, wanted, strict=True):
        assert_close(mine, other, RELATIVE[torch.float64])


def test_dove_is_q_dove_of_whole_images(batch, mask):
    (dove, _), (q_dove, _) = make(DOVELoss), make()
    everything = torch.ones_like(mask)
    assert_close(dove(**batch, step=9).total.detach(), q_dove(**batch, step=9, mask=everything).total.detach())
    with pytest.raises(ValueError, match="DOVELoss has no regions, got a mask"):
        dove(**batch, step=9, mask=mask)


def test_the_weight_of_length_grows_log_linearly():
    config = LossConfig(eos_weight_start=1e-6, eos_weight_end=1e-2, eos_weight_steps=100)
    found = [math.log10(config.eos_weight(step)) for step in (0, 25, 50, 75, 100, 10**9)]
    assert found == pytest.approx([-6, -5, -4, -3, -2, -2])


def test_features_count_by_their_share_of_the_region(batch, mask):
    loss, _ = make(mse_weight=0.0, perceptual_weight=0.0, adversarial_weight=0.0, feature_weight=2.0)
    generator = torch.Generator().manual_seed(2)
    features, made = torch.randn(2, 4, 5, 4, 4, generator=generator, dtype=torch.float64).unbind()
    features.requires_grad_()
    made.requires_grad_()
    terms = loss(**batch, step=0, mask=mask, forced=True, features=(features, made))
    expected = []
    for row in range(4):
        # A feature covers 4 x 4 pixels; it weighs what the region has of them.
        share = mask[row, 0].double().unfold(0, 4, 4).unfold(1, 4, 4).mean(dim=(2, 3))
        errors = (made[row] - features[row]).square().mean(dim=0)
        expected.append((share * errors).sum() / share.sum())
    assert_close(terms.features, torch.stack(expected).mean().detach(), RELATIVE[torch.float64])
    assert terms.irrelevant > 0
    expected = 2 * terms.features + loss.config.irrelevant_weight * terms.irrelevant
    assert_close(terms.total.detach(), expected, RELATIVE[torch.float64])
    gradients = torch.autograd.grad(terms.total, (features, made), allow_unused=True)
    assert gradients[0] is None
    # The first region ends within features of the third row: from there on the gradient is w_irr's.
    assert gradients[1][0, :, 3:].abs().max() < loss.config.irrelevant_weight < gradients[1][0, :, :3, 1:3].abs().min()


def test_features_alone_need_no_pixels(batch, mask):
    loss, _ = make(mse_weight=0.0, perceptual_weight=0.0, adversarial_weight=0.0, feature_weight=2.0)
    generator = torch.Generator().manual_seed(2)
    features, made = torch.randn(2, 4, 5, 4, 4, generator=generator, dtype=torch.float64).unbind()
    made.requires_grad_()
    mask[1] = False
    given = {"step": 0, "mask": mask, "forced": True, "features": (features, made)}
    with_pixels, without = loss(**batch, **given), loss(**batch | {"reconstruction": None}, **given)
    assert_close(without.total.detach(), with_pixels.total.detach(), RELATIVE[torch.float64])
    gradients = [torch.autograd.grad(terms.total, made)[0] for terms in (with_pixels, without)]
    assert_close(gradients[1], gradients[0], RELATIVE[torch.float64])
    assert without.mse.isnan() and with_pixels.mse > 0
    assert without.errors.isnan().tolist() == [False, True, False, False]
    counted = without.errors[[0, 2, 3]]
    # The region without a pixel counts as 0 in the mean of the four.
    assert_close(counted.sum() / 4, without.features, RELATIVE[torch.float64])


@pytest.mark.parametrize(
    ("weights", "forced"), [({}, False), ({"mse_weight": 1.0}, True), ({"feature_weight": 0.0}, True)]
)
def test_pixels_that_something_reads_must_be_there(batch, weights, forced):
    alone = {"mse_weight": 0.0, "perceptual_weight": 0.0, "adversarial_weight": 0.0, "feature_weight": 1.0}
    loss, _ = make(**alone | weights)
    features = torch.zeros(4, 5, 4, 4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="reconstruction can be None only where lengths are forced, and features alone"
    ):
        loss(**batch | {"reconstruction": None}, step=0, forced=forced, features=(features, features))


def test_features_that_do_not_fit(batch):
    loss, _ = make(perceptual_weight=0.0, adversarial_weight=0.0, feature_weight=1.0)
    features = torch.zeros(4, 5, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="feature_weight is not 0, which needs `features`"):
        loss(**batch, step=0)
    with pytest.raises(ValueError, match=r"must have one shape \(B, C, h, w\), got \(4, 5, 4, 4\) and \(4, 5, 2, 2\)"):
        loss(**batch, step=0, features=(features, features[:, :, :2, :2]))
    with pytest.raises(ValueError, match=r"images of \(16, 16\) pixels are not whole multiples of \(3, 3\) features"):
        loss(**batch, step=0, features=(features[:, :, :3, :3], features[:, :, :3, :3]))


def test_forced_lengths_teach_eos_nothing(batch):
    loss, _ = make()
    terms = loss(**batch, step=9, forced=True)
    assert terms.eos == 0
    (gradient,) = torch.autograd.grad(terms.total, batch["eos_logits"])
    assert not gradient.any()


def test_a_region_without_a_pixel_asks_for_nothing(batch, mask):
    loss, _ = make()
    mask[1] = False
    terms = loss(**batch, step=9, mask=mask)
    assert terms.errors.isnan().tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(terms.total, batch["eos_logits"])
    assert gradient.isfinite().all() and not gradient[1].any() and gradient.any()


def test_the_discriminator_gets_no_gradient_from_the_total(batch):
    loss, discriminator = make()
    loss(**batch, step=9).total.backward()
    assert batch["reconstruction"].grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_adaptive_weight(batch):
    loss, discriminator = make(adaptive_adversarial=True, perceptual_weight=0.0, eos_weight_end=1e-8)
    weight = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
    made = batch["reconstruction"].detach() * weight
    terms = loss(**batch | {"reconstruction": made}, step=9, last_layer=weight)
    (of_mse,) = torch.autograd.grad(region_mse(batch["images"], made)[0].mean(), weight, retain_graph=True)
    (of_adversary,) = torch.autograd.grad(-discriminator(made).mean(), weight, retain_graph=True)
    factor = of_mse.norm() / (of_adversary.norm() + 1e-4)
    assert_close(terms.total.detach(), (terms.mse + 0.1 * factor * terms.adversarial + 1e-8 * terms.eos), 1e-12)
    with pytest.raises(ValueError, match="adaptive_adversarial needs `last_layer`"):
        loss(**batch, step=9)


def test_the_discriminator_learns_to_tell_them_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(16, 2)
    loss = DOVELoss(LossConfig(perceptual_weight=0.0), discriminator=discriminator)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    images = torch.rand(4, 3, 32, 32).round()
    made = torch.rand(4, 3, 32, 32, requires_grad=True)
    losses = []
    for _ in range(30):
        value = loss.discriminator_loss(images, made)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < 0.2 < 0.8 < losses[0] < 1.2
    assert made.grad is None
    # It is not the loss's: a checkpoint of the loss holds tau alone.
    assert list(loss.state_dict()) == ["_extra_state"] and not list(loss.parameters())


def test_hinge():
    real, made = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert hinge_loss(real, made).item() == pytest.approx(0.5 * ((0 + 1) / 2 + (0 + 1.5) / 2))


def test_tau_is_part_of_the_state():
    loss, _ = make()
    again, _ = make()
    again.threshold.update(9.0)
    again.load_state_dict(loss.state_dict())
    assert again.threshold.value == loss.threshold.value == pytest.approx(0.15)


def test_refusals():
    for fields, error, message in (
        ({"mse_weight": -1.0}, ValueError, "LossConfig.mse_weight must be finite and not negative, got -1.0"),
        ({"mse_weight": float("nan")}, ValueError, "LossConfig.mse_weight must be finite"),
        ({"eos_weight_start": 0.0}, ValueError, "LossConfig.eos_weight_start must be above 0, got 0.0"),
        ({"threshold_window": 1.5}, TypeError, "LossConfig.threshold_window must be an int, got 1.5"),
        ({"perceptual_weight": True}, TypeError, "LossConfig.perceptual_weight must be a number, got True"),
        ({"adaptive_adversarial": 1}, TypeError, "LossConfig.adaptive_adversarial must be true or false, got 1"),
    ):
        with pytest.raises(error, match=message):
            LossConfig(**fields)
    with pytest.raises(ValueError, match=r"perceptual_weight is 1\.0, which needs `perceptual`"):
        DOVELoss(LossConfig())
    with pytest.raises(ValueError, match=r"adversarial_weight is 0\.1, which needs `discriminator`"):
        DOVELoss(LossConfig(perceptual_weight=0.0))
    plain = DOVELoss(LossConfig(perceptual_weight=0.0, adversarial_weight=0.0))
    with pytest.raises(ValueError, match="made without a discriminator"):
        plain.discriminator_loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="channels must be a multiple of 16, got 20"):
        PatchDiscriminator(20)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        PatchDiscriminator(16, 0)
