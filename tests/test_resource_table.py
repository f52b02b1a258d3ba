"""Every kernel compiled without a GPU, within the rules of scripts/resource_table.py; and that the rules can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resource_table

import dove_fast
from dove_fast.ops.launch import why_no_triton

SCRIPT = Path(resource_table.__file__)

needs_triton = pytest.mark.skipif(
    why_no_triton() is not None or resource_table.cuobjdump() is None, reason="needs Triton and cuobjdump"
)


def run(tmp_path: Path, *options: str, code: int = 0, **environment: str) -> dict:
    path = tmp_path / "table.json"
    command = [sys.executable, str(SCRIPT), "--json", str(path), *options]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == code, result.stdout + result.stderr
    return json.loads(path.read_bytes())


which = pytest.mark.parametrize("which", [[], pytest.param(["--slow"], marks=pytest.mark.slow)], ids=["short", "all"])


@needs_triton
@which
def test_every_kernel_is_within_the_rules(tmp_path, which):
    table = run(tmp_path, *which)
    assert table["failures"] == []
    compiled = {row["name"].partition("/")[0] for row in table["rows"] if row["backend"] == "triton"}
    ops = {"eos_scan", "group_norm_silu", "layer_norm_pair", "pack", "prefix_attention", "unpack", "vq_lookup"}
    assert ops <= compiled
    arches = {row["arch"] for row in table["rows"] if row["backend"] == "cuda"}
    built = [name.partition("-") for name in dove_fast.build_info()["cuda_archs"]]
    assert arches == {arch for arch, _, kind in built if kind == "real"}
    assert ("cuda" in table["missing"]) == (not built)
    of_matrices = {row["arch"] for row in table["rows"] if row["backend"] == "cuda" and row["tensor_cores"]}
    assert of_matrices == arches, "the CUDA kernels with matrix products are known by their names"


@needs_triton
@which
def test_every_kernel_compiles_where_integers_are_one(tmp_path, which):
    options = ["--module", "kernels_with_ones", *which]
    table = run(tmp_path, *options, PYTHONPATH=os.pathsep.join((str(Path(__file__).parent), str(SCRIPT.parent))))
    assert table["failures"] == []
    assert {"prefix_attention", "group_norm_silu"} <= {row["name"].partition("/")[0] for row in table["rows"]}


@needs_triton
def test_rules_fail(tmp_path):
    options = ["--module", "failing_kernels", "--cache", str(tmp_path / "cache")]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    table = run(tmp_path, *options, code=1, **environment)
    found = {}
    for row in table["rows"]:
        found.setdefault(row["name"], set()).update(
            text.split()[0] + " " + text.split()[-1] for text in row["failures"]
        )
    assert found == {
        "good": set(),
        "FFMA only": {"has must"},
        "FFMA only, as meant": set(),
        "spills": {"spills allowed", "has memory"},
        "spills, as allowed": set(),
        "too much shared memory": {"needs 166912", "needs 232448"},
        "wrong arguments": {"does 'steps']"},
    }
    assert len(table["failures"]) == sum(len(row["failures"]) for row in table["rows"])
    good = {row["arch"]: row for row in table["rows"] if row["name"] == "good"}
    assert list(good["80"]["tensor_instructions"]) == ["HMMA"]
    assert list(good["90"]["tensor_instructions"]) == ["HGMMA"]
    assert good["80"]["registers"] > 32
    # From the cache: the same figures.
    again = run(tmp_path, *options, code=1, **environment)
    for before, after in zip(table["rows"], again["rows"], strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}


HELPER = """
import triton, triton.language as tl
from dove_fast.ops.launch import KernelCase, Tile

@triton.jit
def helper(x):
    return x * 3.0 + 1.0

@triton.jit
def kernel(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x + i, helper(tl.load(x + i)))

def cases():
    return [KernelCase("one", kernel, {"x": "*fp32:16"}, Tile({"SIZE": 128}), archs=(80,))]
"""


@needs_triton
def test_cache_follows_the_functions_that_a_kernel_calls(tmp_path):
    binaries = []
    for text in (HELPER, HELPER.replace("+ 1.0", "+ 2.0"), HELPER):
        (tmp_path / "changing.py").write_text(text)
        options = ["--module", "changing", "--cache", str(tmp_path / "cache"), "--jobs", "1"]
        (row,) = run(tmp_path, *options, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")["rows"]
        binaries.append(row["binary"])
    assert binaries[0] == binaries[2] != binaries[1]


def test_a_worker_that_dies_is_a_failure(tmp_path):
    if why_no_triton() is not None:
        pytest.skip(why_no_triton())
    (tmp_path / "dying.py").write_text("import os\ndef cases():\n    os._exit(9)\n")
    table = run(tmp_path, "--module", "dying", "--jobs", "1", code=1, PYTHONPATH=str(tmp_path))
    assert "process 1 of 1 ended with 9" in table["failures"][0]


def test_without_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(resource_table.importlib.util, "find_spec", lambda name: None)
    rows, why = resource_table.triton_rows([], False, tmp_path, 1)
    assert rows == []
    assert "pip install triton" in why
    text = resource_table.markdown({"rows": [], "failures": [], "missing": {"triton": why}})
    assert "triton: not looked at, Triton is not installed" in text
