"""Configurations: presets, JSON both ways, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dove_fast import DOVE, DOVEConfig
from dove_fast.config import GPTNeoXConfig, VQGANConfig


@pytest.mark.parametrize("preset", [DOVEConfig.base(), DOVEConfig.tiny()], ids=["base", "tiny"])
def test_json_round_trip(preset, tmp_path):
    assert DOVEConfig.from_json(preset.to_json()) == preset
    preset.to_json(tmp_path / "config.json")
    assert DOVEConfig.from_json(tmp_path / "config.json") == preset
    assert DOVEConfig.from_dict(preset.to_dict()) == preset
    assert hash(DOVEConfig.from_dict(preset.to_dict())) == hash(preset)
    json.dumps(preset.to_dict())


def test_base_has_the_published_sizes():
    config = DOVEConfig.base()
    assert (config.vqgan.stride, config.num_features, config.num_tokens) == (16, 256, 256)
    assert (config.generator.head_dim, config.generator.rotary_dim) == (64, 16)


def test_tiny_sizes():
    config = DOVEConfig.tiny()
    assert (config.image_size, config.vqgan.stride, config.num_tokens) == (64, 8, 64)
    weights = sum(parameter.numel() for parameter in DOVE(config).parameters())
    assert round(weights / 1e6, 1) == 4.6


def test_fields_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DOVEConfig.tiny().image_size = 32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_size": 250}, ValueError, "image_size must be a multiple of the VQGAN's stride 16, got 250"),
        ({"image_size": "256"}, TypeError, "image_size must be an int, got '256'"),
        ({"image_size": True}, TypeError, "image_size must be an int, got True"),
        ({"image_size": 1024}, ValueError, "generator.max_position_embeddings must be at least 8192"),
        ({"eos_threshold": 1.0}, ValueError, "eos_threshold must lie between 0 and 1, both excluded, got 1.0"),
        ({"eos_threshold": None}, TypeError, "eos_threshold must be a number, got None"),
        ({"eos_bias_init": float("inf")}, ValueError, "eos_bias_init must be finite, got inf"),
        ({"quantize": "soft"}, ValueError, "quantize must be one of nearest, none, got 'soft'"),
        ({"decoder_attends_padding": 1}, TypeError, "decoder_attends_padding must be true or false, got 1"),
        ({"image_range": (1, -1)}, ValueError, "image_range must be increasing, got (1.0, -1.0)"),
        ({"image_range": (0, 1, 2)}, ValueError, "image_range must be a pair (low, high)"),
        ({"image_range": 1}, TypeError, "image_range must be a sequence, got 1"),
        ({"vqgan": {}}, TypeError, "vqgan must be a VQGANConfig, got {}"),
        ({"token_decoder": GPTNeoXConfig()}, ValueError, "token_decoder.vocab_size must be 0"),
        (
            {"token_decoder": GPTNeoXConfig(hidden_size=256, vocab_size=0)},
            ValueError,
            "token_decoder.hidden_size must be 512, got 256",
        ),
    ],
)
def test_dove_errors(changes, error, message):
    with pytest.raises(error) as caught:
        DOVEConfig(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (VQGANConfig, {"block_out_channels": ()}, ValueError, "at least one level"),
        (VQGANConfig, {"block_out_channels": (128, 100)}, ValueError, "multiples of norm_num_groups=32, got 100"),
        (VQGANConfig, {"layers_per_block": 0}, ValueError, "layers_per_block must be at least 1, got 0"),
        (VQGANConfig, {"down_block_types": ("X",) * 5}, ValueError, "down_block_types must be among"),
        (VQGANConfig, {"up_block_types": ("UpDecoderBlock2D",)}, ValueError, "one entry a level (5), got 1"),
        (GPTNeoXConfig, {"num_attention_heads": 7}, ValueError, "multiple of num_attention_heads=7, got 512"),
        (GPTNeoXConfig, {"rotary_pct": 1.5}, ValueError, "rotary_pct must be between 0 and 1, got 1.5"),
        (GPTNeoXConfig, {"rotary_pct": 0.05}, ValueError, "even number of rotated channels a head, got 3 of 64"),
        (GPTNeoXConfig, {"layer_norm_eps": 0}, ValueError, "must be positive"),
    ],
)
def test_part_errors(kind, changes, error, message):
    with pytest.raises(error) as caught:
        kind(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, "not valid JSON"),
        ('{"model_type": "gpt_neox"}', ValueError, "model_type must be 'dove', got 'gpt_neox'"),
        ('{"image_sise": 256}', ValueError, "has no field 'image_sise'; the fields are image_size,"),
        ('{"vqgan": {"groups": 1}}', ValueError, "vqgan has no field 'groups'"),
        ('{"vqgan": 3}', TypeError, "vqgan must be a JSON object, got int"),
    ],
)
def test_json_errors(text, error, message):
    with pytest.raises(error) as caught:
        DOVEConfig.from_json(text)
    assert message in str(caught.value)
