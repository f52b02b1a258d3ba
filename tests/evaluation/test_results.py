"""The file of an evaluation: there and back, a golden one, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from made_evaluations import made_evaluation

from dove_fast.evaluation.results import Evaluation, read_evaluation, write_evaluation

# As format 1 was first written; later versions read it, too.
GOLDEN = {
    "format_version": 1,
    "context": {
        "version": "0.1.0",
        "checkpoint": "tiny",
        "fingerprint": "sha256:6e",
        "data": "photos",
        "images": 2,
        "set_aside": 0,
        "image_size": 64,
        "transform": "short-side-bicubic-center-crop/1",
        "resample": "bicubic, antialiased",
        "eos_threshold": 0.5,
        "device": "cpu",
        "device_name": "A processor",
        "dtype": "float32",
        "threads": 1,
        "batch_size": 32,
        "torch": "2.13.0",
        "seconds": 3,
        "measures": [
            {"name": "PSNR", "parameters": "dB", "extractor": None, "sha256": None, "resize": None, "left_out": None}
        ],
        "warnings": [],
    },
    "rows": [
        {
            "name": "adaptive",
            "kind": "adaptive",
            "tokens": 5.5,
            "psnr": {"mean": 20, "p5": 19.0, "p50": 20.0, "p95": 21.0},
            "ssim": {"mean": 0.5, "p5": 0.4, "p50": 0.5, "p95": 0.6},
            "lpips": None,
            "rfid": None,
        }
    ],
    "lengths": {"mean": 5.5, "percentiles": {"50": 5.0}, "histogram": [0, 2]},
    "complexity": {"rank_correlation": None, "points": [{"complexity": 1.0, "length": 2, "psnr": 20.0}]},
    "codebooks": [],
    "grounding": None,
    "probes": [],
}


def test_there_and_back(tmp_path):
    evaluation = made_evaluation()
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    assert read_evaluation(tmp_path) == read_evaluation(tmp_path / "evaluation.json") == evaluation
    assert list(tmp_path.iterdir()) == [tmp_path / "evaluation.json"]
    assert next(iter(evaluation.to_dict())) == "format_version"


def test_a_file_of_format_1_is_read(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(GOLDEN))
    found = read_evaluation(tmp_path)
    assert found.rows[0].psnr.mean == 20.0 and isinstance(found.rows[0].psnr.mean, float)
    assert found.lengths.percentiles == {50: 5.0} and found.lengths.num_tokens == 2
    assert found.context.vqgan is None and found.complexity.points[0].length == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2: written by another dove_fast"),
        ({"rows": None}, "evaluation.rows must be "),
        ({"rows": [{}]}, r"evaluation.rows\[0\] lacks name, kind, tokens, psnr, ssim, lpips, rfid"),
        ({"more": 1}, "evaluation has no field more"),
        ({"lengths": {"mean": True, "percentiles": {}, "histogram": []}}, "lengths.mean must be float, got True"),
        ({"lengths": {"mean": 1.5, "percentiles": {}, "histogram": [1.5]}}, r"histogram\[0\] must be int, got 1.5"),
        ({"context": "cpu"}, "evaluation.context must be a JSON object, got 'cpu'"),
    ],
)
def test_what_is_no_evaluation(tmp_path, change, message):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**GOLDEN, **change}))
    with pytest.raises(ValueError, match=f"evaluation.json: .*{message}"):
        read_evaluation(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no evaluation at .*; `dove-fast evaluate` writes one"):
        read_evaluation(tmp_path)
    for text in ("[1]", "{}", "no json"):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match=r"evaluation\.json: "):
            read_evaluation(tmp_path)


def test_json_has_no_nan(tmp_path):
    evaluation = dataclasses.replace(
        made_evaluation(), rows=(dataclasses.replace(made_evaluation().rows[0], rfid=math.nan),)
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_evaluation(tmp_path / "evaluation.json", evaluation)
    assert not list(tmp_path.iterdir())


def test_from_dict_takes_what_to_dict_gives():
    evaluation = made_evaluation()
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation
