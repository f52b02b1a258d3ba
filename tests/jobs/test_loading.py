"""The model that a job runs."""

from __future__ import annotations

import pytest
import torch
from made_pictures import make_pictures
from small_models import micro_model

from dove_fast import BackendError, DOVEConfig
from dove_fast.cli import main
from dove_fast.jobs import load_model


def test_without_a_checkpoint_it_is_the_same_untrained_model_every_time():
    state = torch.random.get_rng_state()
    first = load_model(device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert load_model(device="cpu").fingerprint == first.fingerprint
    assert not first.trained
    assert first.model.config == DOVEConfig.tiny()
    assert not first.model.training


def test_the_fingerprint_is_the_checkpoints_whatever_dtype_it_runs_in(tmp_path):
    model = micro_model()
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", device="cpu", dtype="bfloat16")
    assert loaded.trained
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
