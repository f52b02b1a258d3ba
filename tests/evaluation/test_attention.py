"""Attention probabilities against transformers' own, and what is read off them."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import micro_model, sample_images
from tolerances import assert_close
from upstream import PYTHIA_14M, SMALL_VQ, make_bidirectional, make_neox, make_vq, save

from dove_fast import DOVE
from dove_fast.evaluation.attention import attention_weights, decoder_attention, padding_mask, step_attention
from dove_fast.models.gpt_neox import step_embeddings

NONE = torch.empty(0, dtype=torch.int64)
QUERIES = [torch.tensor([3, 9]), NONE, torch.tensor([1, 2, 30, 4])]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    theirs = make_neox(0, attention="eager", **PYTHIA_14M)
    # With the usual initialisation attention is nearly uniform, and any would pass.
    for layer in theirs.layers:
        layer.attention.query_key_value.weight.data.mul_(8)
    save(theirs, folder / "neox")
    save(make_vq(1, **SMALL_VQ), folder / "vq")
    ours = DOVE.from_components(folder / "vq", folder / "neox", image_size=64)
    inputs = torch.randn(2, 90, PYTHIA_14M["hidden_size"], generator=torch.Generator().manual_seed(2))
    return theirs, ours, inputs


@torch.no_grad()
def test_causal(pair):
    theirs, ours, inputs = pair
    expected = theirs(inputs_embeds=inputs, output_attentions=True).attentions
    found = list(attention_weights(ours.generator, inputs))
    assert len(found) == len(expected) == 6
    for layer, (weights, other) in enumerate(zip(found, expected, strict=True)):
        assert weights.shape == (2, 4, 90, 90)
        assert_close(weights, other)
        assert other[:, :, -1].max() > 3 / 90, f"layer {layer} tells nothing apart"
        assert (weights.triu(1) == 0).all()


@torch.no_grad()
def test_bidirectional(pair):
    theirs, ours, inputs = pair
    theirs = make_bidirectional(copy.deepcopy(theirs))
    expected = theirs(inputs_embeds=inputs, output_attentions=True).attentions
    for weights, other in zip(attention_weights(ours.token_decoder, inputs), expected, strict=True):
        assert_close(weights, other)
        assert weights[0, 0, 0, 1:].sum() > 0


@torch.no_grad()
def test_masked_positions_get_nothing(pair):
    _, ours, inputs = pair
    mask = torch.arange(90) < torch.tensor([[30], [90]])
    for weights in attention_weights(ours.token_decoder, inputs, mask):
        assert (weights[0, :, :, 30:] == 0).all() and (weights[1, :, :, 30:] > 0).any()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 90))


@torch.no_grad()
def test_steps_of_a_batch_with_queries_of_several_lengths():
    model = micro_model()
    features = model.encode(sample_images(3))
    found = step_attention(model, features, QUERIES)
    assert found.to_image.shape == (2, 3, 16, 16)
    torch.testing.assert_close(found.on_image + found.on_query + found.on_steps, torch.ones(2, 3, 16))
    assert (found.on_query[:, 1] == 0).all() and (found.on_query[:, ::2] > 0).all()
    steps = step_embeddings(16, 32, device=torch.device("cpu"), dtype=torch.float32)
    for row, query in enumerate(QUERIES):
        inputs = torch.cat([model.in_proj(features[row]), model.generator.embed_in(query), steps])
        for layer, weights in enumerate(attention_weights(model.generator, inputs[None])):
            torch.testing.assert_close(found.to_image[layer, row], weights[0].mean(dim=0)[-16:, :16])
            # The first step sees itself and no other step.
            own = weights[0].mean(dim=0)[-16, -16:]
            torch.testing.assert_close(found.on_steps[layer, row, 0], own[0])


@torch.no_grad()
@pytest.mark.parametrize("attends_padding", [True, False])
def test_token_decoder(attends_padding):
    model = micro_model(decoder_attends_padding=attends_padding)
    lengths = torch.tensor([3, 16])
    assert (padding_mask(model, lengths, 16) is None) is attends_padding
    padded = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)) * (
        torch.arange(16) < lengths[:, None]
    ).unsqueeze(-1)
    found = decoder_attention(model, padded, lengths)
    assert found.shape == (2, 2, 16, 16)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 2, 16))
    assert bool((found[:, 0, :, 3:] == 0).all()) is not attends_padding
