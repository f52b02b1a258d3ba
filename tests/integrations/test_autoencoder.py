"""The adapter in the places of diffusers' autoencoders, by diffusers' own code where it has some."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from small_models import micro_model, sample_images
from tolerances import assert_close

from dove_fast import DOVE
from dove_fast.integrations.autoencoder import DOVEAutoencoder


@pytest.fixture(scope="module")
def model():
    return micro_model()


@pytest.fixture(scope="module")
def images():
    return sample_images(6) * 2 - 1


def vq_model(model: DOVE) -> VQModel:
    """A diffusers VQModel with the same VQGAN."""
    config = model.config.vqgan
    vq = VQModel(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        vq_embed_dim=config.vq_embed_dim,
        num_vq_embeddings=config.num_vq_embeddings,
        norm_num_groups=config.norm_num_groups,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        mid_block_add_attention=config.mid_block_add_attention,
    )
    vq.load_state_dict(model.vqgan.state_dict())
    return vq.eval()


def typical_use(vae, images):
    """What code around a diffusers autoencoder does, with the latents handed on as they are."""
    vae = vae.to("cpu").eval().requires_grad_(False)
    images = images.to(device=vae.device, dtype=vae.dtype)
    latents = vae.encode(images).latents
    sample = vae.decode(latents).sample
    (again,) = vae.encode(images, return_dict=False)
    tuples = vae.decode(again, return_dict=False)
    whole = vae(images).sample
    assert_close(vae(images, return_dict=False)[0], whole)
    size = 2 ** (len(vae.config.block_out_channels) - 1)
    return latents, sample, tuples, whole, size


def test_it_takes_the_place_of_a_vq_model(model, images):
    _, ours, ours_tuple, ours_whole, ours_size = typical_use(DOVEAutoencoder(copy.deepcopy(model)), images)
    _, theirs, theirs_tuple, theirs_whole, theirs_size = typical_use(vq_model(model), images)
    assert ours.shape == theirs.shape == ours_whole.shape == theirs_whole.shape
    for results in ((ours, ours_tuple[0], ours_whole), (theirs, theirs_tuple[0], theirs_whole)):
        assert_close(results[1], results[0])
        assert_close(results[2], results[0])
    assert ours_size == theirs_size == images.shape[-1] // model.config.grid_size


@pytest.mark.parametrize("image_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_images_are_those_of_the_model(images, image_range):
    model = micro_model(image_range=image_range)
    vae = DOVEAutoencoder(model)
    out = vae.encode(images)
    expected = model.tokenize((images + 1) / 2)
    assert_close(out.latents.values, expected.values)
    assert out.latents.host_lengths == expected.host_lengths and out[0] is out.latents
    assert_close((vae.decode(out.latents).sample + 1) / 2, model.decode(expected))
    assert len(set(out.latents.host_lengths)) > 1


def test_options_and_queries_are_those_of_tokenize(model, images):
    vae = DOVEAutoencoder(model)
    queries = [torch.tensor([3, 4]), None, "", None, torch.tensor([5]), None]
    latents = vae.encode(images, queries=queries, max_length=5, eos_threshold=0.4).latents
    expected = model.tokenize((images + 1) / 2, queries, max_length=5, eos_threshold=0.4)
    assert latents.host_lengths == expected.host_lengths
    assert_close(latents.values, expected.values)
    assert vae.encode(images, True, length=3).latents.host_lengths == (3,) * 6
    (latents,) = vae.encode(images, False, length=2)
    assert latents.host_lengths == (2,) * 6


def test_what_it_says_of_itself(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    vae = DOVEAutoencoder.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16 and vae.device == torch.device("cpu") and not vae.training
    config = vae.config
    assert (config.sample_size, config.latent_channels, config.max_tokens) == (16, 32, 16)
    assert config.block_out_channels == model.config.vqgan.block_out_channels
    assert (config.in_channels, config.out_channels, config.scaling_factor) == (3, 3, 1.0)
    assert vae.encode(torch.zeros(1, 3, 16, 16)).latents.values.shape[1] == config.latent_channels


def test_refusals(model, images):
    vae = DOVEAutoencoder(model)
    with pytest.raises(TypeError, match="model must be a DOVE, got VQGAN"):
        DOVEAutoencoder(model.vqgan)
    with pytest.raises(TypeError, match=r"x must be a floating tensor in \[-1, 1\], got torch.uint8"):
        vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="16"):
        vae.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="tokens must be RaggedTokens, got Tensor"):
        vae.decode(images)
