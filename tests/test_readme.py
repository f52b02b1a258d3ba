"""The README's Python, run as it stands but for the sizes and the paths."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from upstream import PYTHIA_14M, SMALL_VQ, make_neox, make_vq, save

from dove_fast import RaggedTokens
from dove_fast.cli import main

ROOT = Path(__file__).parent.parent


def test_python_blocks(tmp_path):
    """They run as written, one after the other, but for paths and sizes."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    block = "\n".join(blocks)
    photos, store = ROOT / "examples" / "photos", tmp_path / "photos.tokens"
    assert main(["tokenize", str(photos), str(store), "--device", "cpu"]) == 0
    save(make_vq(0, **SMALL_VQ), tmp_path / "vq")
    save(make_neox(1, **PYTHIA_14M), tmp_path / "neox")
    for written, run in {
        "examples/photos/chelsea.jpg": str(photos / "chelsea.jpg"),
        "DOVEConfig.base()": "DOVEConfig.tiny()",
        "path/to/VQModel": str(tmp_path / "vq"),
        "path/to/GPTNeoX": str(tmp_path / "neox"),
        "image_size=256": "image_size=64",
        "256, 256": "64, 64",
        '"path/to/photos.tokens"': repr(str(store)),
        "path/to/model": str(tmp_path / "model"),
        # For the whole process: not for the other tests'.
        "dove_fast.keep_freed_memory()": "dove_fast.keep_freed_memory",
        "LengthHistogram(256,": "LengthHistogram(64,",
    }.items():
        assert written in block, f"the README no longer has {written}"
        block = block.replace(written, run)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["tokens"], RaggedTokens)
    assert isinstance(names["again"], torch.Tensor)
    assert names["again"].shape == (8, 3, 64, 64)
    assert names["store"][0].key == "astronaut.jpg"
    assert names["item"].index == 7


def test_the_training_loop_of_the_docs():
    text = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "TRAINING.md", "exec"), names)
    assert names["loss"].threshold.value > 0 and names["terms"].total.isfinite()
