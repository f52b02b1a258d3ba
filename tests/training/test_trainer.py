"""A whole run of a micro model: going on after any stop, parts that stay frozen, batches that are split."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_runs import make_run, run_settings, write_toml

from dove_fast import DOVE
from dove_fast.errors import CheckpointError
from dove_fast.failures import JobError
from dove_fast.training import objective, train, training_forward
from dove_fast.training.checkpoint import latest_checkpoint, optimizer_tensors
from dove_fast.training.distributed import Ranks
from dove_fast.training.log import RunLog, read_log
from dove_fast.training.step import Stepper
from dove_fast.training.trainer import Trainer

ALONE = Ranks(0, 1, torch.device("cpu"))
NO_PIXELS = {"mse_weight": 0.0, "perceptual_weight": 0.0, "adversarial_weight": 0.0}


def lines_of(output):
    """A run's log without what time decides."""
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in read_log(output)]


def weights_of(directory):
    return DOVE.from_pretrained(directory).state_dict()


def assert_same_weights(left, right):
    left, right = weights_of(left), weights_of(right)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a stop: its folder, and its report."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(make_run(folder), ALONE)


def test_a_run_writes_what_it_promises(whole):
    folder, report = whole
    assert (report.step, report.computed, report.skipped, report.interrupted) == (12, 12, 0, False)
    lines = lines_of(folder / "run")
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert trained[-1]["threshold"] is not None and trained[0]["eos_weight"] == pytest.approx(1e-3)
    assert len({line["length_mean"] for line in trained}) > 6
    assert trained[-1]["eos_weight"] == pytest.approx(1e-2)
    assert all(line["adversarial"] == 0 for line in trained[:5]) and trained[6]["adversarial"] != 0
    assert [line["step"] for line in trained if "codewords_used" in line] == [4, 8, 12]
    validated = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in validated] == [5, 10] and validated[0]["length_q1"] >= 1
    names = sorted(path.name for path in (folder / "run/checkpoints").iterdir())
    assert names == ["step-000000009", "step-000000012"]
    pictures = sorted(path.name for path in (folder / "run/pictures").iterdir())
    assert pictures == ["lengths-000000010.png", "reconstructions-000000010.png"]
    # What is exported are the averaged weights, and the tokenizer comes along.
    assert_same_weights(report.model, folder / "run/checkpoints/step-000000012/ema")
    assert DOVE.from_pretrained(report.model).tokenizer.encode("the left half").tolist() == [1, 2, 4]


def test_a_finished_run_is_left_as_it_is(whole):
    folder, _ = whole
    before = lines_of(folder / "run")
    again = train(make_run(folder), ALONE)
    assert (again.step, again.computed) == (12, 0) and lines_of(folder / "run") == before


@pytest.mark.parametrize("stop", [1, 6, 7])
def test_goes_on_to_the_bit(whole, tmp_path, stop):
    """Stopped by a failure behind step `stop`, at or between checkpoints, and started again."""
    folder, report = whole
    output = {"output": str(tmp_path / "run")}
    config = make_run(folder, run=output)

    class StoppedError(Exception):
        pass

    def stop_there(progress):
        if progress.step == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, ALONE, on_progress=stop_there)
    again = train(config, ALONE)
    # The checkpoint of a step is written behind its progress.
    assert again.computed == 12 - (stop - 1) // 3 * 3
    assert lines_of(tmp_path / "run") == lines_of(folder / "run")
    assert_same_weights(again.model, report.model)
    assert_same_weights(
        tmp_path / "run/checkpoints/step-000000012/model", folder / "run/checkpoints/step-000000012/model"
    )


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "dove_fast.cli", "train", str(config), "--device", "cpu"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_log(output)):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def test_goes_on_after_sigkill_and_sigterm(whole, tmp_path):
    folder, report = whole
    output = tmp_path / "run"
    config = write_toml(tmp_path / "run.toml", run_settings(folder, run={"output": str(output)}))
    for step, number in ((2, signal.SIGKILL), (5, signal.SIGKILL), (8, signal.SIGTERM)):
        process = start(config)
        wait_for_step(output, step, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (-number if number == signal.SIGKILL else 130), err
        if number == signal.SIGTERM:
            # A checkpoint of the very step that was under way.
            assert "interrupted" in err and "steps" in out
            assert latest_checkpoint(output).name == f"step-{lines_of(output)[-1]['step']:09d}"
    process = start(config)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "12 of 12 steps" in out
    assert lines_of(output) == lines_of(folder / "run")
    assert_same_weights(output / "model", report.model)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    """The same batches, lengths and threshold; gradients are averaged in another order."""
    changes = {
        "run": {"accumulation": 1, "steps": 6, "output": str(tmp_path / "one")},
        # By halves of the batch the adaptive factor is another one.
        "loss": {"adaptive_adversarial": False, "adversarial_start": 2},
        # Crops that now and then leave nothing of a box.
        "data": {"smallest_crop": 0.3},
    }
    train(make_run(tmp_path, **changes), ALONE)
    changes["run"]["output"] = str(tmp_path / "two")
    config = write_toml(tmp_path / "two.toml", run_settings(tmp_path, **changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "dove_fast.cli", "train", str(config), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for computed in (6, 3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"6 of 6 steps, {computed} now") == 1
        # As if it had been killed behind step 3.
        shutil.rmtree(latest_checkpoint(tmp_path / "two"))
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        assert alone["step"] < 6 or alone["left_out"] > 0
        for name, value in alone.items():
            wanted = pytest.approx(value, rel=2e-4, abs=1e-6) if isinstance(value, (int, float)) else value
            assert shared[name] == wanted, (alone["step"], name)


def test_accumulation_changes_rounding_alone(tmp_path):
    rows = []
    for parts in (1, 2, 4):
        run = {"accumulation": parts, "steps": 4, "output": str(tmp_path / f"by{parts}")}
        train(make_run(tmp_path, run=run, loss={"adversarial_weight": 0.0}), ALONE)
        rows.append([line["mse"] for line in lines_of(tmp_path / f"by{parts}") if line["kind"] == "train"])
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)
    assert rows[2] == pytest.approx(rows[0], rel=1e-4)


@pytest.mark.parametrize(
    ("run", "loss", "trained", "still"),
    [
        (
            {"frozen": "vqgan"},
            {"codebook_weight": 0.0, "adaptive_adversarial": False},
            ("generator.", "out_proj"),
            ("vqgan.",),
        ),
        (
            {"frozen": "encoder"},
            {"codebook_weight": 0.0},
            ("vqgan.decoder.", "in_proj", "eos_head"),
            ("vqgan.encoder.", "vqgan.quant_conv", "vqgan.quantize"),
        ),
        (
            {"frozen": "vqgan", "forced_length_share": 1.0, "longest_forced_length": 2},
            {"codebook_weight": 0.0, "adaptive_adversarial": False, "feature_weight": 1.0} | NO_PIXELS,
            ("generator.", "out_proj"),
            ("vqgan.",),
        ),
        ({"frozen": "nothing"}, {}, ("vqgan.encoder.conv_in", "vqgan.quantize", "token_decoder."), ()),
        ({"stage": "vqgan"}, {}, ("vqgan.encoder.", "vqgan.quantize"), ("generator.", "token_decoder.", "in_proj")),
    ],
)
def test_what_is_frozen_stays(tmp_path, run, loss, trained, still):
    run = {"steps": 3, "codebook_restart_steps": 0, "ema_decay": 0.0, **run}
    config = make_run(tmp_path, run=run, loss={"commitment_weight": 0.0, **loss})
    trainer = Trainer(config, ALONE, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    (tmp_path / "run").mkdir()
    trainer.run()
    after = trainer.model.state_dict()
    for name, tensor in before.items():
        if name.startswith(still):
            assert torch.equal(tensor, after[name]), name
    for prefix in trained:
        names = [name for name in before if name.startswith(prefix)]
        assert any(not torch.equal(before[name], after[name]) for name in names), prefix


def test_forced_lengths_have_a_longest(tmp_path, monkeypatch):
    seen = []

    def noted(model, images, queries=None, *, lengths=None, **options):
        seen.extend(lengths)
        return training_forward(model, images, queries, lengths=lengths, **options)

    monkeypatch.setattr(objective, "training_forward", noted)
    train(make_run(tmp_path, run={"steps": 6, "forced_length_share": 1.0, "longest_forced_length": 3}), ALONE)
    assert set(seen) == {1, 2, 3}
    with pytest.raises(ValueError, match=r"\[run\] longest_forced_length is 100, the model has \d+ tokens"):
        train(make_run(tmp_path / "other", run={"longest_forced_length": 100}), ALONE)


def test_features_alone_make_pixels_only_where_eos_decides(tmp_path):
    run = {"steps": 8, "frozen": "vqgan", "forced_length_share": 0.5, "codebook_restart_steps": 0}
    loss = {"codebook_weight": 0.0, "adaptive_adversarial": False, "feature_weight": 1.0} | NO_PIXELS
    train(make_run(tmp_path, run=run, loss=loss, report={"log_steps": 1}), ALONE)
    lines = [line for line in lines_of(tmp_path / "run") if line["kind"] == "train"]
    assert {line["forced_lengths"] for line in lines} == {True, False}
    for line in lines:
        assert (line["mse"] is None) == line["forced_lengths"]
        assert line["features"] > 0


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    # A learning rate that throws the weights to infinity.
    changes = {
        "run": {"steps": 30, "nonfinite_limit": 3, "ema_decay": 0.0, "codebook_restart_steps": 0},
        "optimizer": {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0},
        "loss": {"adversarial_weight": 0.0, "adaptive_adversarial": False},
        "report": {"validation_steps": 0, "picture_steps": 0},
    }
    with pytest.raises(JobError, match="4 steps in a row were not finite, the limit is 3"):
        train(make_run(tmp_path, **changes), ALONE)
    skipped = [line["skipped"] for line in lines_of(tmp_path / "run")]
    assert skipped[0] == 0 and skipped[-1] == 3
    # Weights that were finite at the last checkpoint stay on disk.
    assert json.loads((latest_checkpoint(tmp_path / "run") / "state.json").read_text())["skipped"] <= 3


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    config = make_run(tmp_path, run={"codebook_restart_steps": 0, "forced_length_share": 0.0})
    trainer = Trainer(config, ALONE, tmp_path / "run")
    stepper = trainer.stepper
    for step in range(2):
        assert stepper.step(step, trainer.batches[step]).finite
    forward = stepper._objective.forward

    def poisoned(*arguments, **options):
        result = forward(*arguments, **options)
        return replace(result, terms=replace(result.terms, total=result.terms.total * float("nan")))

    def state():
        moments = optimizer_tensors(stepper.optimizer, stepper.trained, "optimizer")
        tensors = {**stepper.model.state_dict(), **moments}
        tensors |= {f"ema.{name}": tensor for name, tensor in stepper.averaged.state_dict().items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}, stepper.loss.threshold.state_dict()

    before, tau = state()
    stepper._objective.forward = poisoned
    assert not stepper.step(2, trainer.batches[2]).finite
    after, same_tau = state()
    assert tau == same_tau
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    stepper._objective.forward = forward
    assert stepper.step(3, trainer.batches[3]).finite
    assert not torch.equal(state()[0]["in_proj.weight"], before["in_proj.weight"])


def test_skips_that_are_scattered_do_not_stop_a_run(tmp_path, monkeypatch):
    config = make_run(tmp_path, run={"nonfinite_limit": 1, "steps": 8}, report={"validation_steps": 0})
    step = Stepper.step

    def every_second(self, number, batch):
        outcome = step(self, number, batch)
        return replace(outcome, finite=number % 2 == 0)

    monkeypatch.setattr(Stepper, "step", every_second)
    assert train(config, ALONE).skipped == 4


def test_refuses_what_does_not_fit(whole, tmp_path):
    folder, _ = whole
    with pytest.raises(ValueError, match=r"\[optimizer\] learning_rate = 0.001, now it is 0.1"):
        train(make_run(folder, optimizer={"learning_rate": 0.1}), ALONE)
    with pytest.raises(ValueError, match="adaptive_adversarial measures gradients at the VQGAN decoder's last layer"):
        make_run(folder, run={"frozen": "vqgan", "codebook_restart_steps": 0}, loss={"codebook_weight": 0.0})
    with pytest.raises(ValueError, match="multiple of 1 processes times accumulation = 3"):
        train(make_run(folder, run={"accumulation": 3, "output": str(tmp_path / "a")}), ALONE)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(make_run(folder, run={"output": str(tmp_path / "b")}), ALONE)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="no tokenizer"):
        train(make_run(folder, model={"tokenizer": ""}, run={"output": str(tmp_path / "c")}), ALONE)


def test_one_process_a_run(tmp_path):
    def train_again(progress):
        with pytest.raises(JobError, match="another process trains in"):
            train(config, ALONE)

    config = make_run(tmp_path, run={"steps": 1}, report={"validation_steps": 0})
    assert train(config, ALONE, on_progress=train_again).step == 1


def test_other_data_are_noticed(tmp_path):
    config = make_run(tmp_path, run={"steps": 2}, data={"kind": "folder", "path": str(tmp_path / "pictures")})
    train(config, ALONE)
    (tmp_path / "pictures/00.jpg").rename(tmp_path / "pictures/00a.jpg")
    with pytest.raises(ValueError, match="had other samples than"):
        train(config, ALONE)
    (tmp_path / "pictures/00a.jpg").unlink()
    with pytest.raises(ValueError, match=r"had 12 samples, .* now has 11"):
        train(config, ALONE)


def test_goes_on_without_texts(tmp_path):
    """The query embedding never gets a gradient then, and has no moments."""
    changes = {"data": {"kind": "folder", "path": str(tmp_path / "pictures")}, "optimizer": {"schedule": "constant"}}
    train(make_run(tmp_path, run={"steps": 2}, **changes), ALONE)
    assert train(make_run(tmp_path, run={"steps": 4}, **changes), ALONE).computed == 2


def test_goes_on_without_what_it_started_from(tmp_path):
    constant = {"schedule": "constant"}
    train(make_run(tmp_path, run={"steps": 2}, optimizer=constant), ALONE)
    (tmp_path / "start/config.json").unlink()
    assert train(make_run(tmp_path, run={"steps": 3}, optimizer=constant), ALONE).computed == 1


def test_killed_while_the_settings_were_written(tmp_path):
    config = make_run(tmp_path, run={"steps": 1}, report={"validation_steps": 0})
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ".dove-0123456789abcdef.tmp"
    left.write_text("{")
    assert train(config, ALONE).step == 1
    assert not left.exists()


@pytest.mark.parametrize("where", ["RunLog.write", "RunLog.sync", "Trainer._export"])
def test_a_full_disk_anywhere(tmp_path, monkeypatch, where):
    config = make_run(tmp_path, run={"steps": 4}, report={"validation_steps": 0})

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = where.split(".")
    with monkeypatch.context() as patched:
        patched.setattr({"RunLog": RunLog, "Trainer": Trainer}[owner], name, fail)
        with pytest.raises(JobError, match="No space left on device; run the same command again to go on"):
            train(config, ALONE)
    assert train(config, ALONE).step == 4


def test_steps_may_change_where_the_curve_does_not(tmp_path):
    train(make_run(tmp_path, run={"steps": 2}), ALONE)
    with pytest.raises(ValueError, match=r"\[run\] steps = 2, now it is 4"):
        train(make_run(tmp_path, run={"steps": 4}), ALONE)


def test_settings_of_before_a_field_was_new(tmp_path):
    train(make_run(tmp_path, run={"steps": 1}), ALONE)
    path = tmp_path / "run/run.json"
    content = json.loads(path.read_text())
    del content["config"]["run"]["recompute"]
    path.write_text(json.dumps(content))
    assert train(make_run(tmp_path, run={"steps": 1}), ALONE).computed == 0


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"format_version": 1, "config": {}, "downloaded": false}',
        '{"format_version"',
        '{"format_version": 99, "config": {}}',
    ],
)
def test_settings_that_are_damaged(tmp_path, content):
    config = make_run(tmp_path, run={"steps": 1}, report={"validation_steps": 0})
    train(config, ALONE)
    (tmp_path / "run/run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json (is damaged|has format version 99|holds no run)"):
        train(config, ALONE)


def test_a_checkpoint_that_is_damaged(tmp_path):
    config = make_run(tmp_path, run={"steps": 4}, report={"validation_steps": 0})
    train(config, ALONE)
    (tmp_path / "run/checkpoints/step-000000004/ema/model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-000000004 is damaged .* remove it to go on from the checkpoint"):
        train(config, ALONE)


def test_a_full_disk_stops_a_run_that_can_go_on(tmp_path, monkeypatch):
    config = make_run(tmp_path, run={"steps": 4}, report={"validation_steps": 0})

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("dove_fast.training.trainer.write_checkpoint", fail)
        with pytest.raises(JobError, match="No space left on device; run the same command again to go on"):
            train(config, ALONE)
    assert train(config, ALONE).step == 4
