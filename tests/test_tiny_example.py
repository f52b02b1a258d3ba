"""The scripts of examples/tiny, on a few pictures: what made the shipped model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dove_fast.data import WebDataset
from dove_fast.text import TextTokenizer
from dove_fast.training import TrainConfig
from dove_fast.training.log import read_log

TINY = Path(__file__).parents[1] / "examples" / "tiny"
PHOTOS = TINY.parent / "photos"
STAGES = ("vqgan", "prefixes", "dove")


@pytest.fixture
def script(monkeypatch):
    """Returns a function that imports a script of the example."""
    monkeypatch.syspath_prepend(str(TINY))
    yield importlib.import_module
    for name in ("prepare", "regions", "report", "curves"):
        sys.modules.pop(name, None)


@pytest.fixture
def shards(script, tmp_path, monkeypatch) -> Path:
    prepare = script("prepare")
    monkeypatch.setattr(prepare, "CROPS_PER_PICTURE", 12)
    monkeypatch.setattr(prepare, "CROPS_PER_SHARD", 50)
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(PHOTOS), str(tmp_path / "shards")])
    prepare.main()
    return tmp_path / "shards"


def test_the_tokenizer_knows_every_caption(script, tmp_path):
    regions = script("regions")
    regions.write_tokenizer(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    for form in regions.FORMS:
        for name in (*regions.HALVES, *regions.QUALITIES, *(name for row in regions.PLACES for name in row)):
            assert 0 not in tokenizer.encode(form.format(name)).tolist(), "every word is known"


def test_pictures_are_set_aside_whole_and_captioned(shards):
    held_out, train = WebDataset(str(shards / "held-out")), WebDataset(str(shards / "train"))
    assert len(list((shards / "train").iterdir())) == 2
    pictures = {
        name: {samples[index].picture.key.rsplit("-", 1)[0].rsplit("/", 1)[-1] for index in range(len(samples))}
        for name, samples in (("held-out", held_out), ("train", train))
    }
    assert len(pictures["held-out"]) == 1 and len(pictures["train"]) == 6
    assert not pictures["held-out"] & pictures["train"]
    assert len(held_out) == 12 * 3
    for index in range(len(held_out)):
        sample = held_out[index]
        ((left, top, right, bottom),) = sample.boxes
        assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96
        assert sample.text and sample.frame == (96, 96)


def test_a_region_is_what_its_caption_says(script):
    regions = script("regions")
    pixels = np.full((96, 96, 3), 60, np.uint8)
    pixels[70:, :20] = 250
    found = {}
    for seed in range(60):
        for region in regions.regions(pixels, np.random.default_rng(seed)):
            found[region["text"].rpartition("the ")[2].rstrip("?")] = region["boxes"]
    assert found["brightest part"] == [[0.0, 64.0, 32.0, 96.0]]
    assert found["right half"] == [[48.0, 0.0, 96.0, 96.0]]
    assert found["top"] == [[32.0, 0.0, 64.0, 32.0]]


def test_report_and_curves(script, shards, tmp_path, monkeypatch):
    report, curves = script("report"), script("curves")
    monkeypatch.setattr(report, "IMAGES", 64)
    monkeypatch.setattr(sys, "argv", ["report.py", "tiny", str(shards / "held-out"), str(tmp_path / "out")])
    report.main()
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    committed = json.loads((TINY / "report" / "report.json").read_text())
    assert figures.keys() == committed.keys()
    assert figures["images"] == 64
    assert figures["psnr_by_length"].keys() == committed["psnr_by_length"].keys() == {str(n) for n in report.LENGTHS}
    with Image.open(tmp_path / "out" / "strip.png") as strip:
        assert min(strip.size) > 64 * report.STRIP
    assert (tmp_path / "out" / "lengths.svg").read_text().startswith("<?xml")
    curves.draw(tmp_path / "curves.svg", [TINY / "logs" / stage for stage in STAGES])
    assert all(stage in (tmp_path / "curves.svg").read_text() for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_the_logs_are_those_of_the_recipe(stage):
    config = TrainConfig.from_toml(TINY / f"{stage}.toml")
    log = read_log(TINY / "logs" / stage)
    assert [line["step"] for line in log if line["kind"] == "train"] == list(
        range(config.report.log_steps, config.run.steps + 1, config.report.log_steps)
    )
    assert log[-1]["kind"] == "validation" and log[-1]["step"] == config.run.steps
