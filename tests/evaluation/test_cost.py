"""The cost model against torch's counter over the real modules, against counted pairs, and the published figures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_models import micro_config, micro_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dove_fast import DOVE, DOVEConfig, RaggedTokens
from dove_fast.evaluation.cost import (
    codebook_flop,
    decoder_flop,
    encoder_flop,
    generator_flop,
    image_cost,
    one_pass_flop,
    token_bytes,
    token_decoder_flop,
)
from dove_fast.store.layout import TOKEN_DTYPES


def counted(function):
    """Return the FLOP of (linear layers and convolutions, attention) that torch counts while `function` runs.

    Plain attention is counted as the products that it is made of; the engine's, one op of ours, is not.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        # What is kept with the model is computed at the first call.
        function()
        with FlopCounterMode(display=False) as counter:
            function()
    by_op = counter.get_flop_counts()["Global"]
    attention = by_op.get(torch.ops.aten.bmm, 0)
    return sum(by_op.values()) - attention, attention


def with_attention():
    """A VQGAN with attention on one level each way, and in the middle."""
    config = micro_config()
    plain, attends = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
    vqgan = dataclasses.replace(
        config.vqgan,
        layers_per_block=2,
        mid_block_add_attention=True,
        down_block_types=(plain, attends, attends),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    return dataclasses.replace(config, vqgan=vqgan)


@pytest.mark.parametrize("make", [micro_config, with_attention, DOVEConfig.tiny])
def test_the_vqgan_is_what_torch_counts(make):
    config = make()
    model = DOVE(config).eval()
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    assert sum(counted(lambda: model.encode(images))) == encoder_flop(config)
    grid = torch.zeros(1, config.vqgan.vq_embed_dim, config.grid_size, config.grid_size)
    assert sum(counted(lambda: model.vqgan.decode(grid))) == decoder_flop(config)


@pytest.mark.parametrize("query", [0, 5])
def test_the_oracle_is_what_torch_counts(query):
    model = micro_model()
    config = model.config
    features, ids = torch.zeros(1, config.num_features, 4), [torch.arange(query)]
    linear, attention = counted(lambda: model.generate(features, ids))
    # torch counts the whole square of causal attention.
    positions = config.num_features + query + config.num_tokens
    seen = sum(range(1, positions + 1))
    assert linear + attention * seen // positions**2 == one_pass_flop(config, query)
    padded = torch.zeros(1, config.num_tokens, config.generator.hidden_size)
    whole = sum(counted(lambda: model.token_decoder(padded)))
    assert whole == token_decoder_flop(config, config.num_tokens)
    projected = sum(counted(lambda: model.grid(model.token_decoder(padded))))
    assert projected == image_cost(config, config.num_tokens).token_decoder


@pytest.mark.parametrize("query", [0, 5])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_the_engines_linear_layers_are_what_torch_counts(query, length):
    # In fp64 no weight is packed, so that torch sees every product; EOS is scanned by the reference there.
    model = micro_model().double()
    config = model.config
    images, ids = torch.zeros(1, 3, 16, 16, dtype=torch.float64), [torch.arange(query)]
    rows = {"block_size": length, "length": length}
    linear, _ = counted(lambda: model.tokenize(images, ids, **rows))
    width, layers = config.generator.hidden_size, config.generator.num_hidden_layers
    prefix = config.num_features + query
    pairs = (layers - 1) * sum(range(1, prefix + 1)) + layers * sum(prefix + step + 1 for step in range(length))
    # A length that is given asks no EOS head.
    head = 2 * width * length
    expected = linear - encoder_flop(config) + 4 * width * pairs
    assert generator_flop(config, length, query) - head == expected


@pytest.mark.parametrize("attends_padding", [True, False])
def test_the_token_decoders_linear_layers_are_what_torch_counts(attends_padding):
    model = micro_model(decoder_attends_padding=attends_padding).double()
    config = model.config
    width, layers, most = config.token_decoder.hidden_size, config.token_decoder.num_hidden_layers, config.num_tokens
    for length in (1, 7, 16):
        tokens = RaggedTokens.from_rows([torch.randn(length, width, dtype=torch.float64)])

        def decode(tokens=tokens):
            return model.generation.decode(model.token_decoder, tokens, attends_padding=attends_padding)

        linear, _ = counted(decode)
        pairs = layers * most * (most if attends_padding else length)
        assert token_decoder_flop(config, length) == linear + 4 * width * pairs


def test_the_base_model():
    """Figures that were counted by hand; those by length are cut after the first decimal, and keep no first layer."""
    config = DOVEConfig.base()
    giga = 1e9
    assert encoder_flop(config) / giga == pytest.approx(216.3, abs=0.05)
    assert decoder_flop(config) / giga == pytest.approx(477.4, abs=0.05)
    assert one_pass_flop(config) / giga == pytest.approx(19.3 + 1.6, abs=0.1)
    assert token_decoder_flop(config, 256) / giga == pytest.approx(9.7 + 0.8, abs=0.1)
    assert codebook_flop(config) / giga == pytest.approx(0.27, abs=0.005)
    for length, whole, less in ((32, 9.9, 0.2), (96, 12.6, 0.6), (160, 15.3, 0.9), (256, 19.5, 1.5)):
        kept = length * 2 * 512 * (3 * 512 + 2 * 2048) / giga
        assert kept == pytest.approx(less, abs=0.05)
        assert math.floor(10 * (generator_flop(config, length) / giga + kept)) / 10 == whole


def test_image_cost():
    config = DOVEConfig.tiny()
    cost = image_cost(config, 20, query=3)
    assert (cost.length, cost.positions) == (20, 64 + 3 + 20)
    assert cost.tokenize == encoder_flop(config) + generator_flop(config, 20, 3)
    assert cost.decode == cost.token_decoder + cost.codebook + cost.decoder
    assert cost.one_pass > cost.generator > image_cost(config, 19, query=3).generator > image_cost(config, 19).generator
    assert cost.token_decoder > image_cost(config, 19).token_decoder
    assert image_cost(dataclasses.replace(config, quantize="none"), 20).codebook == 0


def test_token_bytes():
    config = DOVEConfig.tiny()
    expected = {"float32": 10 * 128 * 4, "bfloat16": 10 * 128 * 2, "float16": 10 * 128 * 2, "int8": 10 * (128 + 4)}
    assert image_cost(config, 10).token_bytes == expected
    assert set(expected) == set(TOKEN_DTYPES)
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got 'int4'"):
        token_bytes(config, 10, "int4")
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        token_bytes(config, -1, "int8")


def test_refusals():
    config = DOVEConfig.tiny()
    for length in (0, 65):
        with pytest.raises(ValueError, match=f"length must be from 1 to 64, got {length}"):
            image_cost(config, length)
    for query in (-1, 512 - 127):
        with pytest.raises(ValueError, match=f"query must be from 0 to 384 tokens, got {query}"):
            image_cost(config, 1, query)
