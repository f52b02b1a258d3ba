"""The model that a job runs."""

from __future__ import annotations

import pytest
import torch
from made_pictures import make_pictures
from small_models import micro_model

from dove_fast import DOVE, BackendError
from dove_fast.cli import main
from dove_fast.jobs import load_model


def test_without_a_checkpoint_it_is_the_shipped_model_whatever_lies_around(tmp_path, monkeypatch):
    micro_model().save_pretrained(tmp_path / "tiny")
    shipped = DOVE.from_pretrained("tiny").fingerprint()
    monkeypatch.chdir(tmp_path)
    loaded = load_model(device="cpu")
    assert loaded.fingerprint == shipped
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert load_model("tiny", device="cpu").fingerprint == micro_model().fingerprint()


def test_the_fingerprint_is_the_checkpoints_whatever_dtype_it_runs_in(tmp_path):
    model = micro_model()
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.fingerprint == model.fingerprint()


def test_what_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        load_model(dtype="int8")
    for device in ("gpu", "cuda:x", "meta"):
        with pytest.raises(ValueError, match=f"device must be cpu, cuda or cuda:N, got '{device}'"):
            load_model(device=device)
    with pytest.raises(BackendError, match=r"device cuda:99 is not here: torch sees .* CUDA devices; use --device cpu"):
        load_model(device="cuda:99")
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "nowhere")


@pytest.mark.gpu
def test_a_gpu_is_taken_where_there_is_one():
    assert load_model().model.device == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["mistyped", "cuda"])
def test_a_backend_that_cannot_run_is_refused_before_the_job(monkeypatch, tmp_path, capsys, name):
    """`cuda` is known, and not for tensors on the CPU."""
    monkeypatch.setenv("DOVE_FAST_BACKEND", name)
    with pytest.raises(BackendError, match="from DOVE_FAST_BACKEND"):
        load_model(device="cpu")
    pictures, store = make_pictures(tmp_path / "pictures", 1), tmp_path / "store"
    assert main(["tokenize", str(pictures), str(store), "--device", "cpu"]) == 2
    assert "from DOVE_FAST_BACKEND" in capsys.readouterr().err
    assert not store.exists()
