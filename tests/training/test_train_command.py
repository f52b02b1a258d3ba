"""`dove-fast train`: exit codes, one clear line on stderr, and signals between two steps."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading

import pytest
import torch
from made_pictures import add_bad
from made_runs import run_settings, write_toml
from PIL import Image
from small_models import micro_config
from tokenizers import Tokenizer, models

from dove_fast import DOVE
from dove_fast.cli import main
from dove_fast.training.interrupt import stop_requested

# Two steps, and nothing between them.
SHORT = {
    "run": {"steps": 2, "accumulation": 1, "codebook_restart_steps": 0},
    "report": {"validation_steps": 0, "picture_steps": 0, "checkpoint_steps": 0},
}


@pytest.fixture
def train(tmp_path, capsys):
    """Run the command on a made run with fields changed by section; returns (exit code, stdout, stderr)."""

    def run(**changes):
        sections = {name: {**SHORT.get(name, {}), **changes.get(name, {})} for name in {*SHORT, *changes}}
        return of_file(write_toml(tmp_path / "run.toml", run_settings(tmp_path, **sections)))

    def of_file(path):
        code = main(["train", str(path), "--device", "cpu"])
        return code, *capsys.readouterr()

    run.of_file = of_file
    return run


@contextlib.contextmanager
def logging_as_in_a_process():
    """Without pytest's handlers, beside which `logging.basicConfig` does nothing."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def refused(result, *texts):
    code, out, err = result
    assert (code, out) == (2, ""), err
    for text in texts:
        assert text in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("dove-fast: ")


def test_exit_0_and_again(tmp_path, train):
    constant = {"schedule": "constant"}
    code, out, err = train(optimizer=constant)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith(f"{tmp_path}/run: 2 of 2 steps, 2 now, ") and first.endswith(" steps/s")
    assert second == f"the model is in {tmp_path}/run/model"
    assert DOVE.from_pretrained(tmp_path / "run/model").config == micro_config()
    code, out, err = train(optimizer=constant)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{tmp_path}/run: 2 of 2 steps, 0 now", second]
    # A longer run goes on.
    code, out, err = train(run={"steps": 3}, optimizer=constant)
    assert (code, err) == (0, "") and out.startswith(f"{tmp_path}/run: 3 of 3 steps, 1 now, ")


def test_reports_may_change_when_a_run_goes_on(tmp_path, train):
    assert train()[0] == 0
    changes = {"report": {"log_steps": 2, "keep_checkpoints": 1}, "data": {"workers": 1}, "run": {"nonfinite_limit": 3}}
    assert train(**changes)[0] == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["report"]["keep_checkpoints"] == 1


@pytest.mark.parametrize(
    ("section", "key", "value", "text"),
    [
        ("run", "seed", 4, "[run] seed = 3, now it is 4"),
        ("loss", "mse_weight", 2.0, "[loss] mse_weight = 1.0, now it is 2.0"),
        ("data", "text_dropout", 0.25, "[data] text_dropout = 0.5, now it is 0.25"),
        ("discriminator", "channels", 32, "[discriminator] channels = 16, now it is 32"),
    ],
)
def test_exit_2_for_a_run_with_other_settings(tmp_path, train, section, key, value, text):
    assert train()[0] == 0
    refused(train(**{section: {key: value}}), f"{tmp_path}/run holds a run with {text}", "choose another [run] output")


def test_exit_2_for_a_file_that_cannot_be_used(tmp_path, train):
    refused(train.of_file(tmp_path / "none.toml"), f"no such configuration: {tmp_path}/none.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    refused(train.of_file(tmp_path / "broken.toml"), f"{tmp_path}/broken.toml is not valid TOML")
    (tmp_path / "empty.toml").write_text("")
    refused(train.of_file(tmp_path / "empty.toml"), "the section [run] is missing")


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"run": {"step": 5}}, ("[run] has no field 'step'; the fields are output, stage, ",)),
        ({"optimiser": {"beta1": 0.5}}, ("no section [optimiser]; the sections are run, model, ",)),
        ({"run": {"stage": "both"}}, ("[run] stage must be one of 'vqgan', 'dove', got 'both'",)),
        ({"optimizer": {"learning_rate": "1e-4"}}, ("[optimizer] learning_rate must be a number, got '1e-4'",)),
        ({"loss": {"mse_weight": -1.0}}, ("mse_weight must be finite and not negative, got -1.0",)),
    ],
)
def test_exit_2_for_what_is_no_configuration(tmp_path, train, changes, texts):
    refused(train(**changes), *texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["folder", "webdataset", "visual-genome", "open-images"])
def test_exit_2_for_data_that_are_not_there(tmp_path, train, kind):
    refused(train(data={"kind": kind, "path": str(tmp_path / "nowhere")}), str(tmp_path / "nowhere"))


def test_exit_2_for_a_model_that_is_not_there(tmp_path, train):
    nowhere = tmp_path / "nowhere"
    refused(train(model={"checkpoint": str(nowhere)}), f"no checkpoint directory at {nowhere}")
    refused(train(model={"checkpoint": "", "config": str(nowhere)}), str(nowhere))
    refused(train(model={"tokenizer": str(nowhere)}), str(nowhere))


def test_exit_2_for_a_tokenizer_that_is_too_large(tmp_path, train):
    # The model's embedding has 32 rows.
    words = {f"w{index}": index for index in range(33)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "large.json"))
    refused(
        train(model={"tokenizer": str(tmp_path / "large.json")}),
        "the tokenizer has ids up to 32",
        "query embedding 32 rows: give the model a larger generator.vocab_size",
    )


def test_exit_2_for_an_output_of_others(tmp_path, train):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    refused(train(), f"{tmp_path}/run is not empty and holds no run", "choose another [run] output")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "arguments", [[], ["a.toml", "b.toml"], ["a.toml", "--device", "tpu"], ["a.toml", "--steps", "5"]]
)
def test_exit_2_for_wrong_arguments(arguments, capsys):
    assert main(["train", *arguments]) == 2
    assert "usage: dove-fast" in capsys.readouterr().err


def test_help_has_examples_and_exit_codes(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  dove-fast train run.toml\n" in out and "torchrun" in out and "exit codes: 0 done;" in out


def test_exit_3_with_the_trace_for_what_nobody_expected(train, monkeypatch):
    monkeypatch.setattr("dove_fast.training.objective.Objective.forward", lambda *_, **__: 1 / 0)
    code, _, err = train()
    assert code == 3
    assert "ZeroDivisionError" in err
    last = "stopped by an unexpected error; run the same command again to go on from the last checkpoint"
    assert err.splitlines()[-1] == f"dove-fast: {last}"
    monkeypatch.undo()
    assert train()[0] == 0


def test_random_weights_follow_from_the_seed(tmp_path, train):
    """From a file of sizes alone."""
    (tmp_path / "sizes.json").write_text(micro_config().to_json())
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(weights))
        output = tmp_path / name
        model = {"checkpoint": "", "config": str(tmp_path / "sizes.json")}
        assert train(model=model, run={"output": str(output), "seed": seed, "steps": 1})[0] == 0
        weights.append(DOVE.from_pretrained(output / "model").state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not torch.equal(weights[0]["in_proj.weight"], weights[2]["in_proj.weight"])


# LPIPS


PERCEPTUAL = {"perceptual_weight": 1.0, "adversarial_weight": 0.0, "adaptive_adversarial": False}


def test_random_weights_of_lpips_are_logged(tmp_path, train):
    with logging_as_in_a_process():
        code, _, err = train(loss=PERCEPTUAL, run={"steps": 1})
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith("dove-fast: LPIPS has a random vgg backbone, so its distances are not the published ones")
    (logged,) = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert logged["perceptual"] > 0


def test_exit_2_without_lpips_or_its_weights(tmp_path, train, monkeypatch):
    weights = tmp_path / "vgg16.safetensors"
    refused(train(loss=PERCEPTUAL, perceptual={"weights": str(weights)}), f"no file of backbone weights at {weights}")
    monkeypatch.setitem(sys.modules, "lpips", None)
    refused(train(loss=PERCEPTUAL, run={"output": str(tmp_path / "b")}), "LPIPS needs lpips", "'dove-fast[train]'")
    # Where its weight is 0 it is not asked for.
    assert train(run={"output": str(tmp_path / "c")})[0] == 0


def test_exit_2_without_tensorboard(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(train(report={"tensorboard": True}), "[report] tensorboard", "pip install 'dove-fast[train]'")


# Data


def test_what_is_left_out_is_counted(tmp_path, train):
    run_settings(tmp_path)
    add_bad(tmp_path / "pictures")
    data = {"kind": "folder", "path": str(tmp_path / "pictures")}
    code, _, err = train(data=data, run={"batch_size": 14, "steps": 2})
    assert (code, err) == (0, "")
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    # Both bad pictures, in each of two epochs.
    assert last["left_out"] >= 4 and last["step"] == 2


def test_a_list_of_paths_is_a_folder_too(tmp_path, train):
    Image.new("RGB", (20, 20), (9, 99, 199)).save(tmp_path / "only.png")
    (tmp_path / "list.txt").write_text("# one\nonly.png\n")
    assert train(data={"kind": "folder", "path": str(tmp_path / "list.txt")})[0] == 0


# Signals


def test_a_signal_is_kept_until_it_is_asked_for():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with stop_requested() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            assert stop.is_set()
            # Who does not want to wait asks again.
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with stop_requested() as stop:
            assert not stop.is_set()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_handlers_come_back_after_an_error():
    def fail():
        with stop_requested():
            assert signal.getsignal(signal.SIGTERM) != before
            raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requested() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.is_set() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_no_handler():
    found = []

    def work():
        with stop_requested() as stop:
            found.append((stop.is_set(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == [(False, before)]
