"""Summaries of stores and checkpoints, and how they are shown."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_stores import fill, settings, write
from rich.console import Console
from small_models import micro_model

from dove_fast import CheckpointError, StoreError, TokenStore
from dove_fast.jobs import summarize_checkpoint, summarize_store
from dove_fast.jobs.display import show_checkpoint, show_installation, show_store
from dove_fast.jobs.info import describe_default_backend, length_histogram
from dove_fast.store.writer import StoreWriter

# A store of an earlier version, with tokens in int8.
INT8 = Path(__file__).parents[1] / "store" / "format-2-int8"


def shown(show, summary, width=100, encoding="utf-8") -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(summary, "some/[bold]name", Console(file=buffer, width=width))
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)


def test_a_store_in_numbers(tmp_path):
    summary = summarize_store(write(tmp_path / "s", 40, bad=frozenset({3})))
    lengths = TokenStore(tmp_path / "s").lengths
    assert (summary.images, summary.errors, summary.tokens) == (39, 1, int(lengths.sum()))
    assert summary.mean == pytest.approx(lengths.mean())
    assert summary.percentiles() == {5: 1, 25: 2, 50: 3, 75: 4, 95: 5}
    text = shown(show_store, summary)
    for part in (
        "some/[bold]name",
        "39",
        f"{lengths.mean():.2f}",
        "1, 5",
        "percentile 95",
        "t/1, 64 pixels",
        "sha256:0",
    ):
        assert part in text


def test_a_store_that_is_not_complete_in_numbers(tmp_path):
    writer = StoreWriter(tmp_path / "s", settings(40), {"torch": "test"})
    writer.begin()
    assert summarize_store(tmp_path / "s").images == 0
    fill(writer, bad=frozenset({3}), only=[0, 1, 5])
    summary = summarize_store(tmp_path / "s")
    assert (summary.images, summary.errors, summary.units_done, summary.units) == (8, 1, 3, 14)
    assert summary.tokens == summary.lengths.sum()
    assert "3 of 14 units; its job runs" in shown(show_store, summary)
    fill(writer)
    all_units = summarize_store(tmp_path / "s")
    assert (all_units.units_done, all_units.complete) == (14, False)
    assert "not complete" in shown(show_store, all_units)
    writer.finish()
    whole = summarize_store(tmp_path / "s")
    assert (whole.units_done, whole.units, whole.complete) == (14, 14, True)
    # The second unit lost an image.
    assert summary.lengths.tolist() == [*whole.lengths[:5], *whole.lengths[14:17]]
    assert "not complete" not in shown(show_store, whole)


@pytest.mark.parametrize(("setting", "value"), [("config", {"vqgan": 3}), ("later", 1)])
def test_an_unfinished_store_with_a_damaged_manifest_is_refused(tmp_path, setting, value):
    StoreWriter(tmp_path / "s", settings(40), {"torch": "test"}).begin()
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    manifest["settings"][setting] = value
    (tmp_path / "s/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="damaged manifest"):
        summarize_store(tmp_path / "s")


@pytest.mark.parametrize("complete", [True, False])
def test_codes_and_the_error_of_int8(tmp_path, complete):
    plain = summarize_store(write(tmp_path / "plain", 8))
    assert not plain.codes and plain.quantization_error is None
    assert "codes" not in shown(show_store, plain) and "int8 error" not in shown(show_store, plain)
    store = tmp_path / "s"
    shutil.copytree(INT8, store)
    manifest = json.loads((store / "manifest.json").read_text())
    kept = manifest["totals"]["quantization_error"]
    if not complete:
        manifest |= {"complete": False, "shards": None, "totals": None}
        (store / "manifest.json").write_text(json.dumps(manifest))
    summary = summarize_store(store)
    assert summary.complete == complete
    assert summary.codes == manifest["settings"]["codes"]
    assert summary.quantization_error == pytest.approx(kept)
    assert f"{kept:.2e}" in shown(show_store, summary)
    assert f"{summary.config.num_features} an image" in shown(show_store, dataclasses.replace(summary, codes=True))


def test_the_histogram_counts_every_image_once():
    lengths = np.array([1, 4, 5, 64, 64, 33], np.int32)
    histogram = length_histogram(lengths, 64)
    assert histogram[0] == (1, 4, 2)
    assert histogram[1] == (5, 8, 1)
    assert histogram[-1] == (61, 64, 2)
    assert len(histogram) == 16
    for most in (1, 5, 16, 17, 100, 256):
        counts = length_histogram(np.arange(1, most + 1), most)
        assert sum(count for _, _, count in counts) == most
        assert [first for first, _, _ in counts[1:]] == [last + 1 for _, last, _ in counts[:-1]]
        assert (counts[0][0], counts[-1][1]) == (1, most)
        assert len(counts) <= 16


def test_bars_are_as_long_as_their_counts(tmp_path):
    text = shown(show_store, summarize_store(write(tmp_path / "s", 8)))
    bars = [line.count("█") for line in text.splitlines() if "-" in line and "█" in line]
    # Lengths 1, 1, 2, 3, 3, 4, 5, 5 in ranges of four: 6 and 2.
    assert bars == [40, 13]


def test_an_output_without_unicode_gets_plain_signs(tmp_path):
    text = shown(show_store, summarize_store(write(tmp_path / "s", 8)), encoding="ascii")
    assert "#" * 40 in text


def test_an_empty_store_is_shown(tmp_path):
    summary = summarize_store(write(tmp_path / "s", 2, bad=frozenset({0, 1})))
    assert summary.percentiles() == {}
    assert "set aside" in shown(show_store, summary)


def test_the_default_backend_is_that_of_the_environment(monkeypatch):
    def says(name: str) -> str:
        monkeypatch.setenv("DOVE_FAST_BACKEND", name)
        buffer = io.StringIO()
        show_installation(Console(file=buffer, width=200))
        (line,) = (line for line in buffer.getvalue().splitlines() if "default backend" in line)
        return line

    assert "auto (DOVE_FAST_BACKEND is not set)" in says("")
    assert "auto (from DOVE_FAST_BACKEND) " in says("auto")
    assert "reference (from DOVE_FAST_BACKEND) " in says("reference")
    assert "fast (from DOVE_FAST_BACKEND), which is unknown: every op will refuse it; valid: auto, ref" in says("fast")
    assert "cuda (from DOVE_FAST_BACKEND), which cannot run" in says("cuda")
    assert "prefix_attention" in says("cuda")
    monkeypatch.delenv("DOVE_FAST_BACKEND")
    assert describe_default_backend() == "auto (DOVE_FAST_BACKEND is not set)"


def test_a_checkpoint_in_numbers(tmp_path):
    model = micro_model()
    model.save_pretrained(tmp_path / "m")
    summary = summarize_checkpoint(tmp_path / "m")
    assert summary.config == model.config
    assert summary.dtypes == ("F32",)
    for part in ("vqgan", "in_proj", "generator", "eos_head", "token_decoder", "out_proj"):
        tensors = getattr(model, part).state_dict().values()
        assert summary.parameters[part] == sum(tensor.numel() for tensor in tensors)
    text = shown(show_checkpoint, summary)
    for part in ("some/[bold]name", "generator.hidden_size", f"{sum(summary.parameters.values()):,}", "F32"):
        assert part in text


def test_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint directory at"):
        summarize_checkpoint(tmp_path / "m")
    micro_model().save_pretrained(tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        summarize_checkpoint(tmp_path / "m")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        summarize_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names gone\.safetensors, which does not exist"):
        summarize_checkpoint(tmp_path / "m")
    (tmp_path / "m/config.json").write_text('{"image_size": "big"}')
    with pytest.raises(CheckpointError, match=r"config\.json: .*image_size must be an int"):
        summarize_checkpoint(tmp_path / "m")
    (tmp_path / "m/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        summarize_checkpoint(tmp_path / "m")
