"""What `dove-fast evaluate` prints, writes and refuses."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from made_pictures import add_bad, make_pictures
from small_models import micro_model

from dove_fast.cli import main
from dove_fast.evaluation.results import read_evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    micro_model().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_pictures(tmp_path / "photos", 5)


@pytest.fixture
def evaluate(tmp_path, photos, checkpoint, capsys):
    """Run the command on the pictures, into `out`; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        words = ("evaluate", checkpoint, photos, tmp_path / "out", "--device", "cpu", "--lengths", "4,8", *arguments)
        code = main([*map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_tables_plots_and_a_file_for_programs(evaluate, tmp_path, checkpoint, photos):
    code, out, err = evaluate("--batch-size", 2)
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json",
        "evaluation.md",
        "quality.svg",
        "lengths.svg",
        "complexity.svg",
    }
    found = read_evaluation(tmp_path / "out")
    assert [row.name for row in found.rows] == ["VQGAN alone", "4 tokens", "8 tokens", "adaptive"]
    assert found.context.checkpoint == str(checkpoint) and found.context.data == str(photos)
    assert found.context.batch_size == 2
    for row in found.rows:
        assert f"{row.psnr.mean:.2f}" in out and f"{row.ssim.mean:.4f}" in out
    assert "LPIPS: left out" in out and "rFID: left out" in out and "5 images at " in out
    assert all(f"{row.gflop:.2f}" in out for row in found.rows)
    # A random model's tokens may be better than its VQGAN, which is said.
    assert err == "".join(f"dove-fast: {line}\n" for line in found.context.warnings)


def test_inputs_set_aside(evaluate, photos, tmp_path):
    add_bad(photos)
    code, _, err = evaluate("--no-plots")
    assert code == 1 and "2 inputs set aside, see" in err
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / "quality.svg").exists()
    code, _, err = evaluate("--overwrite", "--max-errors", 1)
    assert code == 3 and "more than 1 input could not be read" in err


def test_too_many_that_cannot_be_read_are_named(evaluate, photos, tmp_path):
    add_bad(photos)
    code, _, err = evaluate("--max-errors", 1)
    assert code == 3 and "more than 1 input could not be read" in err and "errors.jsonl" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["errors.jsonl"]
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 2
    # The same command again.
    assert evaluate("--no-plots")[0] == 1


def test_plots_of_an_earlier_evaluation_go(evaluate, tmp_path):
    assert evaluate()[0] == 0 and (tmp_path / "out" / "quality.svg").exists()
    assert evaluate("--no-plots", "--overwrite")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json", "evaluation.md"}


def test_an_output_that_cannot_be_made(checkpoint, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dove_fast.evaluation.quality.QualityMeter.add", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    assert main(["evaluate", str(checkpoint), str(photos), str(tmp_path / "file" / "out"), "--device", "cpu"]) == 2
    assert "file" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), str(photos), str(checkpoint), "--device", "cpu", "--overwrite"]) == 2
    assert "is a checkpoint; choose another output" in capsys.readouterr().err


def test_without_an_output(checkpoint, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(checkpoint), str(photos), "--device", "cpu", "--lengths", "4", "--no-plots"]
    assert main(words) == 0 and "evaluation: 5 images" in capsys.readouterr().out
    assert read_evaluation(tmp_path / "evaluation").context.images == 5


def test_a_bar_for_each_stage(evaluate, monkeypatch):
    labels = []

    @contextlib.contextmanager
    def bar(label):
        labels.append(label)
        yield lambda state: labels.append(state.done)

    monkeypatch.setattr("dove_fast.jobs.display.progress_bar", bar)
    assert evaluate("--no-plots", "--probe", "digits", "--probe-images", 60)[0] == 0
    names = [label for label in labels if isinstance(label, str)]
    assert names == ["features of digits", "classifiers of digits", "images"] and labels[-1] == 5


def test_an_output_that_holds_an_evaluation(evaluate, tmp_path):
    assert evaluate("--no-plots", "--images", 2)[0] == 0
    before = read_evaluation(tmp_path / "out")
    code, _, err = evaluate("--no-plots", "--images", 3)
    assert code == 2 and "holds an evaluation already" in err
    assert read_evaluation(tmp_path / "out") == before
    assert evaluate("--no-plots", "--images", 3, "--overwrite")[0] == 0
    assert read_evaluation(tmp_path / "out").context.images == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "40"), "from 1 to this model's 16, got 40"),
        (("--lengths", "4,x"), "must be token counts such as 8,16,32, got '4,x'"),
        (("--images", "0"), "must be at least 1, got 0"),
        (("--lpips-weights", "nowhere.pth"), "no file of backbone weights at nowhere.pth"),
        (("--inception-weights", "nowhere.pth"), "no file of Inception weights at nowhere.pth"),
        (("--vqgan", "nowhere"), "nowhere"),
        (("--probe", "nowhere"), "no labelled data set 'nowhere'"),
        (("--eos-threshold", "2"), "eos_threshold"),
    ],
)
def test_wrong_use(evaluate, tmp_path, arguments, message):
    code, _, err = evaluate(*arguments)
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_help(capsys):
    assert main(["evaluate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "CHECKPOINT DATA [OUT]" in out and "exit codes:" in out and "evaluation.md" in out
