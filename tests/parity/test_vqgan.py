"""Our VQGAN against diffusers' `VQModel`: the same random weights, saved by diffusers and loaded by us."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from diffusers import VQModel
from tolerances import RELATIVE, assert_close, relative_error
from torch import Tensor
from upstream import AMUSED_VQ, PYTHIA_14M, SMALL_VQ, TAMING_VQ, make_neox, make_vq, plain_convolutions, save

from dove_fast import DOVE
from dove_fast.models.vqgan import VQGAN

CASES = {"amused": (AMUSED_VQ, 256), "small": (SMALL_VQ, 64), "attention": (TAMING_VQ, 64)}


class Pair(NamedTuple):
    theirs: VQModel
    ours: VQGAN
    images: Tensor


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory) -> Pair:
    config, image_size = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make_vq(0, **config)
    save(theirs, directory / "vq")
    save(make_neox(1, **PYTHIA_14M, vocab_size=64), directory / "neox")
    model = DOVE.from_components(directory / "vq", directory / "neox", image_size=image_size)
    images = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(2))
    return Pair(theirs, model.vqgan, images)


@torch.no_grad()
def test_state_dict_is_theirs(pair):
    assert {n: t.shape for n, t in pair.ours.state_dict().items()} == {
        n: t.shape for n, t in pair.theirs.state_dict().items()
    }


@torch.no_grad()
def test_encoder(pair):
    with plain_convolutions():
        assert_close(pair.ours.encode(pair.images), pair.theirs.encode(pair.images).latents)


def squared_distances(features: Tensor, codebook: Tensor) -> Tensor:
    """Return (B h w, K) fp64 squared distances of features (B, C, h, w) to every codeword, summed elementwise."""
    rows = features.double().permute(0, 2, 3, 1).flatten(0, 2)
    return torch.stack([(row - codebook.double()).square().sum(1) for row in rows])


@torch.no_grad()
def test_codes_are_nearest_and_theirs(pair):
    features = pair.theirs.encode(pair.images).latents
    codebook = pair.theirs.quantize.embedding.weight
    quantized, codes = pair.ours.quantize(features)
    _, _, (_, _, their_codes) = pair.theirs.quantize(features)
    distances = squared_distances(features, codebook)
    rows = torch.arange(len(distances))

    best = distances.min(dim=1).values
    assert torch.equal(distances[rows, codes.flatten()], best)
    # cdist in fp32 errs by some eps (|x|^2 + |c|^2), so theirs may be another codeword, but no farther than that.
    scale = features.square().sum(1).max() + codebook.square().sum(1).max()
    assert (distances[rows, their_codes.flatten()] - best).max() <= 16 * torch.finfo(torch.float32).eps * scale
    assert torch.equal(quantized.permute(0, 2, 3, 1), codebook[codes])


def theirs_decode(pair: Pair, quantized: Tensor) -> Tensor:
    return pair.theirs.decoder(pair.theirs.post_quant_conv(quantized))


@torch.no_grad()
def test_decoder(pair):
    """Codewords drawn at random: those of a picture alone make this decoder an ill-conditioned one, see below."""
    codebook = pair.theirs.quantize.embedding.weight
    side = pair.images.shape[-1] // 16
    drawn = torch.randint(len(codebook), (1, side, side), generator=torch.Generator().manual_seed(0))
    quantized = codebook[drawn].permute(0, 3, 1, 2).contiguous()
    with plain_convolutions():
        assert_close(pair.ours.decode(quantized), theirs_decode(pair, quantized))


@torch.no_grad()
def test_decoder_is_as_near_to_fp64_as_theirs(pair):
    """The random aMUSEd decoder's fp32 result is 1.2e-5 from its fp64 one, in diffusers too.

    Two fp32 decoders that do not round alike are then that far apart. Ours may be no farther from fp64 than theirs.
    """
    quantized, _ = pair.ours.quantize(pair.theirs.encode(pair.images).latents)
    ours, theirs = pair.ours.decode(quantized), theirs_decode(pair, quantized)
    pair.theirs.double()
    try:
        exact = theirs_decode(pair, quantized.double())
    finally:
        pair.theirs.float()
    assert relative_error(ours, exact) <= max(relative_error(theirs, exact), RELATIVE[torch.float32])


@torch.no_grad()
def test_fp64(pair):
    """No part of a VQModel is fp32 by nature, so in fp64 the two agree to fp64 rounding."""
    images = pair.images.double()[..., :64, :64]
    theirs, ours = pair.theirs.double(), pair.ours.double()
    try:
        features = theirs.encode(images).latents
        assert_close(ours.encode(images), features)
        quantized, _ = ours.quantize(features)
        assert_close(ours.decode(quantized), theirs.decoder(theirs.post_quant_conv(quantized)))
    finally:
        theirs.float(), ours.float()
