"""Figures on held-out pictures against straight formulas, and when the lengths are called wrong."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import micro_model, sample_images
from tolerances import RELATIVE, assert_close
from torch import nn

from dove_fast.training.batches import TrainingBatch
from dove_fast.training.validation import Validation, length_warning, spread, validate

SIDE = 8


class Blurred(nn.Module):
    """A model that brightens pictures by half, beyond white too, and gives the n-th one n tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.seen = 0
        self.modes: list[bool] = []
        self.queries: list[torch.Tensor] = []

    @property
    def device(self) -> torch.device:
        return self.gain.device

    def reconstruct(self, images, queries):
        self.modes.append(self.training)
        self.queries += queries
        lengths = torch.arange(self.seen + 1, self.seen + len(images) + 1)
        self.seen += len(images)
        return images.float() / 255 * self.gain - 0.1, SimpleNamespace(lengths=lengths)


def batch_of(count: int, seed: int, mask: torch.Tensor | None = None) -> TrainingBatch:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=random)
    return TrainingBatch(images, [torch.tensor([row]) for row in range(count)], mask, Counter())


def shown_by(images: torch.Tensor) -> np.ndarray:
    return np.clip(images.numpy() / 255.0 * 1.5 - 0.1, 0, 1)


def test_errors_are_the_formula():
    batches = [batch_of(2, seed) for seed in range(3)]
    model = Blurred()
    found = validate(model, iter(batches), stage="dove", show=3)
    images = torch.cat([batch.images for batch in batches])
    shown = shown_by(images)
    errors = ((shown - images.numpy() / 255.0) ** 2).mean(axis=(1, 2, 3))
    assert_close(found.mse.double(), torch.from_numpy(errors), RELATIVE[torch.float32])
    assert found.psnr == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-5)
    assert found.lengths.tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(found.images, images[:3].float() / 255)
    assert_close(found.reconstructions.double(), torch.from_numpy(shown[:3]), RELATIVE[torch.float32])
    assert shown.min() == 0 and shown.max() == 1
    assert torch.cat(model.queries).tolist() == [0, 1] * 3
    assert not found.mse.requires_grad and model.gain.grad is None


def test_errors_are_those_of_the_region():
    mask = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    mask[0, :, 1:4, 2:7] = True
    mask[1] = True
    masked, whole = batch_of(2, 0, mask), batch_of(2, 1)
    found = validate(Blurred(), [masked, whole], stage="dove", show=1)
    squares = [(shown_by(batch.images) - batch.images.numpy() / 255.0) ** 2 for batch in (masked, whole)]
    expected = [squares[0][0, :, 1:4, 2:7].mean(), squares[0][1].mean(), squares[1][0].mean(), squares[1][1].mean()]
    assert found.mse.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("show", [1, 2, 3, 4, 100])
def test_the_first_pictures_are_shown(show):
    batches = [batch_of(2, seed) for seed in range(2)]
    found = validate(Blurred(), batches, stage="dove", show=show)
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(found.images, images[:show].float() / 255)
    assert found.reconstructions.shape == found.images.shape
    assert len(found.mse) == 4


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored(training):
    model = Blurred().train(training)
    validate(model, [batch_of(2, 0)], stage="dove", show=1)
    assert model.training is training


def test_stages_of_a_model():
    model = micro_model().train()
    images = (sample_images(6) * 255).round().to(torch.uint8)
    batches = [
        TrainingBatch(images[rows], [torch.empty(0, dtype=torch.int64)] * 3, None, Counter())
        for rows in (slice(0, 3), slice(3, 6))
    ]
    side = model.config.grid_size
    with torch.no_grad():
        reconstruction, tokens = model.eval().reconstruct(images)
        plain = model.render(model.encode(images).transpose(1, 2).unflatten(2, (side, side)))
    assert len(set(tokens.lengths.tolist())) > 1
    for stage, expected, lengths in (("dove", reconstruction, tokens.lengths), ("vqgan", plain, None)):
        found = validate(model, batches, stage=stage, show=6)
        error = (expected.clamp(0, 1) - images.float() / 255).square().mean(dim=(1, 2, 3))
        assert_close(found.mse, error, RELATIVE[torch.float32])
        assert_close(found.reconstructions, expected.clamp(0, 1), RELATIVE[torch.float32])
        assert (found.lengths is None) if lengths is None else torch.equal(found.lengths, lengths)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_psnr_is_the_mean_of_the_pictures():
    nothing = torch.zeros(0, 3, SIDE, SIDE)
    assert Validation(torch.tensor([0.1, 0.001]), None, nothing, nothing).psnr == pytest.approx((10 + 30) / 2)
    # A picture without an error is not infinitely good, or it alone would be the mean.
    assert Validation(torch.tensor([0.0]), None, nothing, nothing).psnr == pytest.approx(120)


@pytest.mark.parametrize("ramp_over", [True, False])
def test_nearly_all_of_one_token(ramp_over):
    for ones, total in ((10, 10), (99, 100), (199, 200)):
        lengths = torch.tensor([1] * ones + [7] * (total - ones))
        warning = length_warning(lengths, 16, ramp_over=ramp_over)
        assert "get one token" in warning and "lower [loss] eos_weight_end" in warning
    assert length_warning(torch.tensor([1] * 98 + [7] * 2), 16, ramp_over=ramp_over) is None


def test_nearly_all_of_every_token():
    for longest, total in ((10, 10), (99, 100)):
        lengths = torch.tensor([16] * longest + [7] * (total - longest))
        warning = length_warning(lengths, 16, ramp_over=True)
        assert "get all 16 tokens" in warning and "raise [loss] eos_weight_end" in warning
        # So it begins.
        assert length_warning(lengths, 16, ramp_over=False) is None
    assert length_warning(torch.tensor([16] * 98 + [7] * 2), 16, ramp_over=True) is None
    assert length_warning(torch.tensor([15] * 100), 16, ramp_over=True) is None


def test_lengths_that_are_spread_and_a_model_of_one_token():
    assert length_warning(torch.tensor([1] * 8 + [16] * 8), 16, ramp_over=True) is None
    assert length_warning(torch.ones(8, dtype=torch.int64), 1, ramp_over=False) is None


def test_spread():
    lengths = np.random.default_rng(0).integers(1, 257, 101)
    found = spread(torch.from_numpy(lengths))
    quartiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    names = ("length_min", "length_q1", "length_median", "length_q3", "length_max")
    assert found == pytest.approx({"length_mean": lengths.mean(), **dict(zip(names, quartiles, strict=True))})
    assert all(math.isnan(value) for value in spread(torch.empty(0, dtype=torch.int64)).values())
