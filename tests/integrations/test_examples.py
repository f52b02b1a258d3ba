"""The scripts of examples/integrations, run as they stand; what they find is checked."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image
from tolerances import RELATIVE, assert_close

from dove_fast import DOVE

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
PHOTOS = EXAMPLES.parent / "photos"
TOLERANCE = RELATIVE[torch.float32]


def script(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")


def test_every_example_is_run_and_listed():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    readme = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tested, f"{path.name} has no test here"
        assert path.name in readme, f"README.md does not name {path.name}"


def test_vision_language():
    found = script("vision_language").main()
    assert found["difference"] < TOLERANCE
    assert found["losses"][-1] < 0.2 * found["losses"][0]
    right = sum(answer == name for answer, name in zip(found["answers"], found["names"], strict=True))
    assert right >= 5, found["answers"]


def test_training_data(tmp_path):
    found = script("training_data").main(tmp_path)
    store, (first, second) = found["store"], found["epochs"]
    keys = sorted(store.keys)
    for epoch in (first, second):
        assert sorted(key for batch in epoch for key in batch.keys) == keys
    assert [batch.keys for batch in first] != [batch.keys for batch in second]
    for batch, again in zip(second[2:], found["rest"], strict=True):
        assert batch.keys == again.keys and torch.equal(batch.tokens.values, again.tokens.values)
    assert found["rows"].host_lengths == tuple(store.lengths.tolist())
    assert torch.equal(found["rows"].values, store.ragged(range(len(store))).values)
    assert store.lengths.sum() <= found["bucketed"] < 0.8 * found["shuffled"]


def test_nested_tensors():
    assert script("nested_tensors").main() < TOLERANCE


def test_autoencoder(tmp_path, capsys):
    tmp_path = tmp_path / "made" / "pictures"
    found = script("autoencoder").main(tmp_path)
    model = DOVE.from_pretrained("tiny")
    expected = model.tokenize((found["images"] + 1) / 2)
    assert found["latents"].host_lengths == expected.host_lengths
    assert_close((found["decoded"] + 1) / 2, model.decode(expected))
    names = {path.stem for path in PHOTOS.glob("*.jpg")}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    out = capsys.readouterr().out
    assert all(str(path) in out for path in tmp_path.glob("*.png"))
    with Image.open(tmp_path / "hubble.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
    assert found["psnr"].min() > 10 and found["psnr"].max() < 40


@pytest.mark.slow
def test_portable_models(tmp_path):
    errors = script("portable_models").main(tmp_path)
    assert set(errors) == {path.name for path in tmp_path.iterdir()}
    assert max(errors.values()) < TOLERANCE
