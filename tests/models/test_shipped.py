"""The trained model that comes with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_models import micro_model

from dove_fast import DOVE, CheckpointError, DOVEConfig, RaggedTokens
from dove_fast.cli import main
from dove_fast.data import decode_image, list_inputs
from dove_fast.data.crop import RandomCrop, cut
from dove_fast.evaluation import laplacian_variance, rank_correlation
from dove_fast.models.shipped import SHIPPED
from dove_fast.store.shard import quantize_tokens

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
CROPS = 24
# Of all that the package installs of a checkpoint, in bytes.
MOST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def model() -> DOVE:
    return DOVE.from_pretrained("tiny")


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    """Crops of the sample photographs at many scales: a check of the shipped weights, not of what is held out."""
    random, crop = np.random.default_rng(0), RandomCrop(0.15)
    pictures = [decode_image(item.path).image for item in list_inputs(PHOTOS)]
    return torch.stack([cut(image, crop.draw(*image.size, random), 64) for image in pictures for _ in range(CROPS)])


def test_it_is_the_tiny_preset_in_float32_and_small_on_the_disk(model):
    assert model.config == DOVEConfig.tiny()
    assert model.dtype == torch.float32
    assert not model.training
    assert DOVE.from_pretrained("tiny", dtype=torch.bfloat16).dtype == torch.bfloat16
    files = [file for file in SHIPPED["tiny"].iterdir() if file.is_file()]
    assert sorted(file.name for file in files) == ["README.md", "config.json", "model.safetensors"]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    with safe_open(SHIPPED["tiny"] / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118 - not a mapping


def test_a_path_of_that_name_goes_first(tmp_path, monkeypatch):
    other = micro_model()
    other.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert DOVE.from_pretrained("tiny").fingerprint() == other.fingerprint()
    assert DOVE.from_pretrained(Path("tiny")).fingerprint() == other.fingerprint()


def test_a_path_is_not_a_name(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    for missing in (Path("tiny"), "./tiny"):
        with pytest.raises(FileNotFoundError, match="no checkpoint directory at tiny"):
            DOVE.from_pretrained(missing)
    # Its directory is the same model, in the same dtype.
    assert DOVE.from_pretrained(SHIPPED["tiny"]).fingerprint() == model.fingerprint()
    (tmp_path / "tiny").mkdir()
    with pytest.raises(CheckpointError, match=r"no config.json; the model that comes with the package is at .*tiny"):
        DOVE.from_pretrained("tiny")


def test_lengths_follow_complexity(model, crops):
    lengths = torch.cat([model.tokenize(rows).lengths for rows in crops.split(64)]).double()
    complexity = laplacian_variance(crops).double()
    assert rank_correlation(lengths, complexity) >= 0.6
    flat = torch.stack([torch.full((3, 64, 64), shade, dtype=torch.uint8) for shade in range(0, 256, 17)])
    flat_length = model.tokenize(flat).lengths.double().mean()
    assert flat_length <= model.config.num_tokens / 4
    assert lengths[complexity.argsort(descending=True)[: len(crops) // 10]].mean() >= 2 * flat_length
    low, high = lengths.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert high - low >= model.config.num_tokens / 8


def test_more_tokens_show_more(model, crops):
    pixels = crops.float() / 255
    found = []
    for length in (1, 4, 16, 64):
        made = torch.cat([model.reconstruct(rows, length=length)[0] for rows in pixels.split(64)]).clamp(0, 1)
        found.append(float(-10 * (pixels - made).square().mean(dim=(1, 2, 3)).log10().mean()))
    assert found == sorted(found), found
    assert found[-1] >= 22


def test_it_has_not_learnt_texts(model, crops):
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        model.tokenize(crops[:1], ["the left half"])


def test_info_describes_it(model, capsys):
    assert main(["info", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "Checkpoint tiny" in out and "Parameters, F16" in out
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in out


def test_int8_costs_a_hundredth_of_a_decibel(model, crops):
    tokens = model.tokenize(crops)
    steps, scales = quantize_tokens(tokens.values)
    kept = RaggedTokens.from_rows(list((steps * scales[:, None]).split(list(tokens.host_lengths))))

    def psnr(tokens: RaggedTokens) -> float:
        errors = (model.decode(tokens).clamp(0, 1) - crops / 255).square().flatten(1).mean(dim=1)
        return float(-10 * errors.log10().mean())

    assert 0 < psnr(tokens) - psnr(kept) < 0.02
