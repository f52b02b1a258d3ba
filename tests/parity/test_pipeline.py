"""The whole tokenizer against the straight-line pipeline of diffusers' and transformers' modules."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from small_models import sample_images, sharpen_attention
from tolerances import EOS_LOGIT_MARGIN, RELATIVE, assert_close
from torch import Tensor
from upstream import PYTHIA_14M, SMALL_VQ, TAMING_VQ, UpstreamPipeline, make_neox, make_vq, plain_convolutions, save

from dove_fast import DOVE

IMAGE_SIZE, NUM_TOKENS, VOCAB = 64, 64, 64


class Pair(NamedTuple):
    ours: DOVE
    theirs: UpstreamPipeline
    images: Tensor
    queries: list[Tensor | None]
    threshold: float


def build(directory, vq_config, dtype) -> Pair:
    vq = make_vq(0, **vq_config)
    generator = make_neox(1, vocab_size=VOCAB, **PYTHIA_14M)
    decoder = make_neox(2, vocab_size=VOCAB, **PYTHIA_14M)
    sharpen_attention(generator, 8)
    ours = DOVE.from_components(
        save(vq, directory / "vq"),
        save(generator, directory / "generator"),
        save(decoder, directory / "decoder"),
        image_size=IMAGE_SIZE,
        dtype=dtype,
    )
    # The features of random weights are small; queries must not drown them.
    ours.in_proj.weight.data.mul_(5)
    theirs = UpstreamPipeline(
        vq.to(dtype),
        generator.to(dtype),
        decoder.to(dtype),
        ours.in_proj,
        ours.eos_head,
        ours.out_proj,
        num_tokens=NUM_TOKENS,
    )
    random = torch.Generator().manual_seed(3)
    images = sample_images(6, image_size=IMAGE_SIZE).to(dtype)
    queries = [None, *(torch.randint(0, VOCAB, (n,), generator=random) for n in (3, 0, 11, 1)), None]
    # A quantile of the probabilities, so that the images stop early, late and never.
    logits = torch.stack([theirs.states(image, query)[1] for image, query in zip(images, queries, strict=True)])
    threshold = float(logits.sigmoid().quantile(0.95))
    return Pair(ours, theirs, images, queries, threshold)


@pytest.fixture(scope="module", params=["small-fp32", "attention-fp32", "small-fp64"])
def pair(request, tmp_path_factory) -> Pair:
    name, dtype = request.param.split("-")
    return build(
        tmp_path_factory.mktemp(request.param),
        {"small": SMALL_VQ, "attention": TAMING_VQ}[name],
        {"fp32": torch.float32, "fp64": torch.float64}[dtype],
    )


def test_tokens(pair):
    tokens = pair.ours.tokenize(pair.images, pair.queries, eos_threshold=pair.threshold, engine="oracle")
    cut = math.log(pair.threshold / (1 - pair.threshold))
    lengths, near = [], 0
    for row, (image, query) in enumerate(zip(pair.images, pair.queries, strict=True)):
        states, eos_logits = pair.theirs.states(image, query)
        length = pair.theirs.length(eos_logits, pair.threshold)
        lengths.append(length)
        if (eos_logits[:length] - cut).abs().min() <= EOS_LOGIT_MARGIN:
            near += 1
            continue
        assert len(tokens[row]) == length
        assert_close(tokens[row], states[:length])
    # The threshold is itself one of the logits or between two of them, so at most one row may be that close.
    assert near <= 1
    assert len(set(lengths)) >= 3 and min(lengths) < NUM_TOKENS, f"the lengths are not spread: {lengths}"


def test_eos_probabilities(pair):
    _, stats = pair.ours.tokenize(pair.images, pair.queries, length=NUM_TOKENS, stats=True)
    for row, (image, query) in enumerate(zip(pair.images, pair.queries, strict=True)):
        _, eos_logits = pair.theirs.states(image, query)
        assert_close(stats.eos_probability[row], eos_logits[-1].sigmoid(), RELATIVE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("attends_padding", [True, False])
def test_decoding(pair, attends_padding, monkeypatch):
    """Features to rounding; then one side's codes feed both decoders, as near ties may give another codeword."""
    monkeypatch.setattr(pair.theirs, "attends_padding", attends_padding)
    monkeypatch.setattr(
        pair.ours, "config", dataclasses.replace(pair.ours.config, decoder_attends_padding=attends_padding)
    )
    tokens = pair.ours.tokenize(pair.images, pair.queries, eos_threshold=pair.threshold)
    captured = []
    handle = pair.ours.vqgan.quantize.register_forward_hook(
        lambda module, inputs, outputs: captured.append((inputs[0], outputs[0]))
    )
    images = pair.ours.decode(tokens)
    handle.remove()
    features, quantized = (torch.cat(parts) for parts in zip(*captured, strict=True))
    for row in range(len(tokens)):
        assert_close(features[row : row + 1], pair.theirs.features(tokens[row]))
        assert_close(images[row : row + 1], pair.theirs.pixels(quantized[row : row + 1]))


@torch.no_grad()
def test_decoding_without_codebook(pair, monkeypatch):
    """With quantize="none" nothing is discrete, so tokens to pixels agree in one go.

    Both sides convolve with torch's own code: with AVX-512 oneDNN's rounding alone puts ours, a batch, 7e-6 from the
    fp64 pixels and theirs, one image, 5e-6, from features that are 3e-7 from theirs on both sides. With torch's own
    it is 4e-6.
    """
    monkeypatch.setattr(pair.ours, "config", dataclasses.replace(pair.ours.config, quantize="none"))
    tokens = pair.ours.tokenize(pair.images, pair.queries, eos_threshold=pair.threshold)
    with plain_convolutions():
        images = pair.ours.decode(tokens)
        for row in range(len(tokens)):
            assert_close(images[row : row + 1], pair.theirs.pixels(pair.theirs.features(tokens[row])))
