"""The tables, plots and files of an evaluation."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from made_evaluations import made_evaluation

from dove_fast.evaluation.outputs import check_output, made_output, write_outputs
from dove_fast.evaluation.plots import COMPLEXITY_PLOT, LENGTHS_PLOT, QUALITY_PLOT, draw_complexity, draw_plots
from dove_fast.evaluation.results import read_evaluation
from dove_fast.evaluation.table import markdown
from dove_fast.store.records import InputError, read_errors

PLOTS = {QUALITY_PLOT, LENGTHS_PLOT, COMPLEXITY_PLOT}


def cells(page: str, start: str) -> list[str]:
    """The cells of the table row that starts so."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_every_figure_stands_in_its_row():
    page = markdown(made_evaluation(warnings=("beware",)))
    assert cells(page, "2 tokens") == [
        "2 tokens",
        "2.0",
        "21.00 (11.50 to 31.75)",
        "0.8100 (0.7100 to 0.9100)",
        "0.2200 (0.1200 to 0.3200)",
        "18.91",
        "2.62",
        "256",
    ]
    assert cells(page, "VQGAN alone")[-3:] == ["7.04", "1.51", "32"]
    assert cells(page, "mean tokens") == ["mean tokens", "2.75 of 4"]
    assert cells(page, "rank correlation")[-1] == "0.720"
    assert cells(page, "VQGAN alone | 160")[1:] == ["160", "27 of 32, 84.4%", "21.8"]
    assert cells(page, "adaptive | 163")[1:] == ["163", "30 of 32, 93.8%", "24.8"]
    assert cells(page, "adaptive | with |")[2:] == ["3.5", "29.03", "26.02", "0.00125", "0.00250"]
    assert cells(page, "adaptive | without |")[2:] == ["4.2", "28.24", "25.61", "0.00150", "0.00275"]
    assert [cells(page, f"{length} |") for length in (1, 2, 3, 4)] == [["1", "2"], ["2", "1"], ["3", "4"], ["4", "3"]]
    assert "77 texts with their regions, 12.5% of the picture" in page and "text too long: 5" in page
    assert "3.50 tokens with the text, 4.25 without it" in page
    assert cells(page, "digits")[1:] == ["pooled tokens", "128", "91.25%", "1,400", "397"]
    assert "**Beware.**" in page


def test_what_it_was_measured_with_stands_beside_it():
    page = markdown(made_evaluation())
    assert "1,234 images of photos|held-out, 64 x 64 pixels, 3 inputs set aside" in page
    assert "- rFID: Frechet; by Inception, weights' SHA-256 0123abcd; resize: bilinear" in page
    assert "- LPIPS: left out, no backbone weights" in page
    assert "cpu (A processor), float32, 2 threads, batches of 32; dove_fast 0.1.0, torch 2.13.0" in page
    assert "- VQGAN alone: of path/to/vqgan, sha256:def" in page
    assert "- PSNR: dB; N = 1,234" in page


def test_what_was_not_measured_is_a_dash():
    evaluation = made_evaluation()
    rows = tuple(dataclasses.replace(row, lpips=None, rfid=None) for row in evaluation.rows)
    evaluation = dataclasses.replace(evaluation, rows=rows, grounding=None, probes=())
    page = markdown(evaluation)
    assert cells(page, "4 tokens")[4:6] == ["-", "-"]
    assert "Texts" not in page and "Linear probes" not in page


def test_a_bar_in_a_name_breaks_no_table():
    evaluation = made_evaluation()
    rows = (dataclasses.replace(evaluation.rows[0], name="a|b"),)
    assert "| a\\|b |" in markdown(dataclasses.replace(evaluation, rows=rows))


def test_plots_are_the_same_every_time(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_plots(tmp_path / folder, made_evaluation())
    assert {path.name for path in (tmp_path / "a").iterdir()} == PLOTS
    for name in PLOTS:
        content = (tmp_path / "a" / name).read_bytes()
        assert ElementTree.fromstring(content).tag.endswith("svg")
        assert content == (tmp_path / "b" / name).read_bytes()


def drawn(path) -> str:
    """The texts of a plot: matplotlib leaves each as a comment beside its outlines."""
    return " ".join(part.split("-->")[0] for part in path.read_text().split("<!--")[1:])


def test_a_panel_for_every_measure_that_has_numbers(tmp_path):
    evaluation = made_evaluation()
    draw_plots(tmp_path, evaluation)
    texts = drawn(tmp_path / QUALITY_PLOT)
    assert all(label in texts for label in ("PSNR", "SSIM", "LPIPS", "rFID", "VQGAN alone, 16 codes", "1,234 images"))
    rows = tuple(dataclasses.replace(row, lpips=None, rfid=None) for row in evaluation.rows)
    draw_plots(tmp_path, dataclasses.replace(evaluation, rows=rows))
    texts = drawn(tmp_path / QUALITY_PLOT)
    assert "PSNR" in texts and "LPIPS" not in texts and "rFID" not in texts


def test_the_scatter_says_the_correlation_and_how_many(tmp_path):
    complexity = made_evaluation().complexity
    draw_complexity(tmp_path / "c.svg", complexity, 3)
    assert "rank correlation 0.72, 3 images" in drawn(tmp_path / "c.svg")
    draw_complexity(tmp_path / "c.svg", dataclasses.replace(complexity, rank_correlation=None), 500)
    assert "rank correlation not defined, 500 images, 3 shown" in drawn(tmp_path / "c.svg")


def test_a_directory_of_outputs(tmp_path):
    evaluation, target = made_evaluation(), tmp_path / "deep" / "out"
    errors = [InputError("a.jpg", "photos/a.jpg", "truncated")]
    write_outputs(target, evaluation, errors)
    assert {path.name for path in target.iterdir()} == PLOTS | {"evaluation.json", "evaluation.md", "errors.jsonl"}
    assert read_evaluation(target) == evaluation and read_errors(target) == errors
    page = (target / "evaluation.md").read_text()
    assert page == markdown(evaluation, sorted(PLOTS, key=page.index))
    assert all(f"]({name})" in page for name in PLOTS)
    with pytest.raises(ValueError, match="holds an evaluation already; choose another output, or --overwrite it"):
        check_output(target, overwrite=False)
    check_output(target, overwrite=True)
    write_outputs(target, evaluation, plots=False)
    assert {path.name for path in target.iterdir()} == {"evaluation.json", "evaluation.md"}
    assert "svg" not in (target / "evaluation.md").read_text()


def test_an_output_that_stopped_halfway_holds_no_evaluation(tmp_path, monkeypatch):
    write_outputs(tmp_path, made_evaluation(), plots=False)

    def full(*_):
        raise RuntimeError("full")

    monkeypatch.setattr("dove_fast.evaluation.outputs.markdown", full)
    with pytest.raises(RuntimeError, match="full"):
        write_outputs(tmp_path, made_evaluation(), plots=False)
    assert not (tmp_path / "evaluation.json").exists()
    check_output(tmp_path, overwrite=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest.json", "is a token store; choose another output"),
        ("config.json", "is a checkpoint; choose another output"),
        ("photo.jpg", r"holds no evaluation, but 'photo\.jpg'; choose another output, or empty it"),
    ],
)
def test_an_output_that_is_something_else(tmp_path, name, message):
    (tmp_path / name).write_text("{}")
    (tmp_path / "errors.jsonl").write_text("")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path, overwrite=overwrite)
    (tmp_path / name).unlink()
    # What an evaluation leaves that was stopped.
    check_output(tmp_path, overwrite=False)


def test_an_output_is_made_before_the_work(tmp_path):
    def fail(place, leaving=None):
        with made_output(place):
            assert place.is_dir() and not list(place.iterdir())
            if leaving is not None:
                (place / leaving).write_text("")
            raise RuntimeError("work")

    with pytest.raises(RuntimeError, match="work"):
        fail(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError, match="work"):
        fail(tmp_path / "a", "errors.jsonl")
    assert (tmp_path / "a" / "errors.jsonl").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), made_output(tmp_path / "file" / "out"):
        pytest.fail("the work must not begin")


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="exists and is not a directory"):
        check_output(tmp_path / "file", overwrite=True)


def test_without_matplotlib_the_error_names_the_way_out():
    code = (
        "import sys, json\n"
        "sys.modules['matplotlib'] = None\n"
        "from dove_fast.evaluation.plots import check_matplotlib\n"
        "try:\n"
        "    check_matplotlib()\n"
        "except ImportError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = json.loads(result.stdout)
    assert "pip install 'dove-fast[eval]'" in message and "--no-plots" in message
