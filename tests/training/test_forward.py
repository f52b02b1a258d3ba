"""The training forward against the plain one over all positions: the same values, losses and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import NUM_TOKENS, micro_config, micro_model, sample_images
from tolerances import RELATIVE, assert_close, relative_error

from dove_fast import DOVE
from dove_fast.losses import DOVELoss, LossConfig, PatchDiscriminator
from dove_fast.training import training_forward

# What the issue asks for: sums in another order, through a network and back.
GRADIENTS = {torch.float64: 1e-10, torch.float32: 1e-5}

QUERIES = [None, torch.tensor([1, 2, 3]), None, torch.arange(9), torch.tensor([4]), None]


@pytest.fixture(scope="module")
def sharp():
    return micro_model().double()


def plain(dtype=torch.float64, **changes):
    """A model with the usual initialisation, whose conditioning does not decide what a test sees."""
    torch.manual_seed(0)
    model = DOVE(micro_config(**changes)).eval()
    model.vqgan.quantize.embedding.weight.data.normal_(std=0.5)
    return model.to(dtype)


def by_all_positions(model, images, queries, lengths):
    """The oracle with its graph: reconstruction, EOS logits."""
    ids = [torch.empty(0, dtype=torch.int64) if query is None else query for query in queries]
    states, _ = model.generate(model.encode(images), ids)
    kept = torch.arange(NUM_TOKENS) < torch.tensor(lengths)[:, None]
    padded = torch.where(kept[..., None], states, 0.0)
    return model.decode_padded(padded, torch.tensor(lengths)), model.eos_logits(states)


def loss_of(reconstruction, eos_logits, images, lengths):
    torch.manual_seed(7)
    discriminator = PatchDiscriminator(16, 1).to(images.dtype)
    config = LossConfig(perceptual_weight=0.0, adversarial_start=0, eos_weight_start=1.0, eos_weight_end=1.0)
    loss = DOVELoss(config, discriminator=discriminator)
    # Between the images' errors, so that lengths are pushed both ways.
    with torch.no_grad():
        loss.threshold.update((images - reconstruction).square().mean(dim=(1, 2, 3)).median() * 1.001)
    return loss(images, reconstruction, eos_logits, torch.tensor(lengths), step=3).total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attends_padding", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lengths", [[1, 5, 16, 2, 7, 9], [16] * 6, [1] * 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_losses_and_gradients(attends_padding, recompute, lengths, dtype):
    model = plain(dtype, decoder_attends_padding=attends_padding)
    images = sample_images(6).to(dtype)
    expected_images, expected_logits = by_all_positions(model, images, QUERIES, lengths)
    expected_loss = loss_of(expected_images, expected_logits, images, lengths)
    expected = gradients(model, expected_loss)
    found = training_forward(model, images, QUERIES, lengths=lengths, recompute=recompute)
    assert found.lengths.tolist() == lengths
    behind = torch.arange(NUM_TOKENS) >= torch.tensor(lengths)[:, None]
    assert found.eos_logits.isnan().equal(behind)
    loss = loss_of(found.reconstruction, found.eos_logits, images, lengths)
    assert_close(loss.detach(), expected_loss.detach(), GRADIENTS[dtype])
    assert_close(found.reconstruction.detach(), expected_images.detach(), GRADIENTS[dtype])
    actual = gradients(model, loss)
    assert expected.keys() == actual.keys()
    both = [(expected[name], actual[name], name) for name in expected]
    # The codebook is not trained by this loss, and the query embedding only where its ids came.
    assert [name for wanted, _, name in both if wanted is None] == ["vqgan.quantize.embedding.weight"]
    for wanted, got, name in both:
        if wanted is None:
            assert got is None
        elif wanted.norm() > 1e-9:
            assert relative_error(got, wanted) <= GRADIENTS[dtype], name
    together = [torch.cat([pair[side].flatten() for pair in both if pair[0] is not None]) for side in (1, 0)]
    assert_close(*together, GRADIENTS[dtype])


@pytest.mark.parametrize("block_size", [1, 3, 16, 99])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_change_rounding_alone(sharp, block_size, recompute):
    """Lengths, values and gradients, with rows that leave between blocks and queries of different lengths."""
    model = copy.deepcopy(sharp)
    found = []
    for options in ({"block_size": block_size, "recompute": recompute}, {}):
        forward = training_forward(model, sample_images(12).double(), QUERIES * 2, **options)
        loss = forward.reconstruction.square().mean() + forward.eos_logits.nan_to_num().square().mean()
        found.append((forward, gradients(model, loss)))
    (blocks, grads), (plain, expected) = found
    assert blocks.tokens.host_lengths == plain.tokens.host_lengths and len(set(plain.tokens.host_lengths)) > 2
    assert_close(blocks.reconstruction.detach(), plain.reconstruction.detach(), GRADIENTS[torch.float64])
    for name, wanted in expected.items():
        if wanted is not None and wanted.norm() > 1e-9:
            assert relative_error(grads[name], wanted) <= GRADIENTS[torch.float64], name


def test_finds_the_oracles_lengths(sharp):
    images = sample_images(12).double()
    queries = [QUERIES[row % 6] for row in range(12)]
    expected = sharp.tokenize(images, queries, engine="oracle")
    assert len(set(expected.host_lengths)) > 2
    found = training_forward(sharp, images, queries)
    assert found.tokens.host_lengths == expected.host_lengths
    assert_close(found.tokens.values.detach(), expected.values)


def test_positions_saved(sharp):
    lengths = [1, 5, 16, 2, 7, 9]
    found = training_forward(sharp, sample_images(6).double(), QUERIES, lengths=lengths)
    prefixes = 6 * sharp.config.num_features + 3 + 9 + 1
    # Whole blocks of a quarter of T.
    assert found.positions_computed == prefixes + 4 + 8 + 16 + 4 + 8 + 12
    by_steps = training_forward(sharp, sample_images(6).double(), QUERIES, lengths=lengths, block_size=1)
    assert by_steps.positions_computed == prefixes + sum(lengths)
    assert found.positions_of_all == prefixes + 6 * NUM_TOKENS


def test_a_frozen_encoder_has_no_graph():
    model = plain()
    images = sample_images(6).double()
    assert training_forward(model, images).features.requires_grad
    for part in (model.vqgan.encoder, model.vqgan.quant_conv):
        part.requires_grad_(False)
    found = training_forward(model, images, lengths=[4] * 6)
    assert not found.features.requires_grad and found.reconstruction.requires_grad
    # Features that were kept give the same.
    kept = training_forward(model, images, lengths=[4] * 6, features=found.features)
    assert torch.equal(kept.reconstruction, found.reconstruction)
    kept.reconstruction.sum().backward()
    assert model.in_proj.weight.grad is not None and model.vqgan.encoder.conv_in.weight.grad is None


def test_a_reconstruction_that_nothing_reads_has_no_graph():
    model = plain()
    images = sample_images(3).double()
    with_graph = training_forward(model, images, lengths=[4] * 3)
    found = training_forward(model, images, lengths=[4] * 3, reconstruct="values")
    assert with_graph.reconstruction.requires_grad and not found.reconstruction.requires_grad
    assert torch.equal(found.reconstruction, with_graph.reconstruction)
    assert found.grid.requires_grad and found.eos_logits.requires_grad
    without = training_forward(model, images, lengths=[4] * 3, reconstruct="no")
    assert without.reconstruction is None
    assert torch.equal(without.grid, found.grid)


def test_the_gradient_passes_straight_through_the_codebook():
    model = plain()
    training_forward(model, sample_images(2).double(), lengths=[4, 4]).reconstruction.square().sum().backward()
    assert model.out_proj.weight.grad.abs().sum() > 0
    assert model.vqgan.quantize.embedding.weight.grad is None


def test_autocast_and_training_mode(sharp):
    model = copy.deepcopy(sharp).float().train()
    images = sample_images(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = training_forward(model, images, lengths=[3, 4, 5, 6])
        assert found.eos_logits.dtype == torch.float32
        loss = loss_of(found.reconstruction.float(), found.eos_logits, images, [3, 4, 5, 6])
    loss.backward()
    assert model.training
    for name, parameter in model.generator.named_parameters():
        assert name == "embed_in.weight" or parameter.grad.isfinite().all(), name


def test_layers_with_hooks(sharp):
    """A hook of the last layer's projection is called for the prefix, too."""
    model = copy.deepcopy(sharp)
    model.generator.layers[-1].attention.query_key_value.register_forward_hook(lambda _, __, out: out * 1.5)
    images = sample_images(6).double()
    expected = model.tokenize(images, QUERIES, engine="oracle")
    found = training_forward(model, images, QUERIES)
    assert found.tokens.host_lengths == expected.host_lengths
    assert_close(found.tokens.values.detach(), expected.values)


def test_autocast_does_not_narrow_the_residual(sharp):
    """With and without a query in the batch: what the layers add up starts in the weights' dtype."""
    model = copy.deepcopy(sharp).float()
    none = torch.empty(0, dtype=torch.int64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.encode(sample_images(2))
        assert model.in_proj(features).dtype == torch.bfloat16
        for queries in ([none, none], [none, torch.tensor([1])]):
            assert {prefix.dtype for prefix in model.prefixes(features, queries)} == {torch.float32}
        alone = training_forward(model, sample_images(4)[:1], lengths=[8]).tokens.values
        others = training_forward(
            model, sample_images(4), [None, torch.tensor([1]), None, None], lengths=[8] * 4
        ).tokens[0]
    assert_close(others, alone, RELATIVE[torch.bfloat16])


def test_without_gradients(sharp):
    with torch.no_grad():
        found = training_forward(sharp, sample_images(3).double())
    assert not found.reconstruction.requires_grad and not found.eos_logits.requires_grad


def test_refusals(sharp):
    images = sample_images(2).double()
    for options, message in (
        ({"lengths": [1]}, "lengths must have one entry an image, 2, got 1"),
        ({"lengths": [1, 17]}, "lengths must be from 1 to 16, got 17 in row 1"),
        ({"lengths": [0, 3]}, "lengths must be from 1 to 16, got 0 in row 0"),
        ({"features": torch.zeros(2, 3, 4)}, r"features must have shape \(2, 16, 4\), got \(2, 3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            training_forward(sharp, images, **options)
    with pytest.raises(ValueError, match="images must have shape"):
        training_forward(sharp, images[:, :, :5])
