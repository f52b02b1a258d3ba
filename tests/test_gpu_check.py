"""scripts/gpu_check.py without a GPU: on made trees, whose tests have the mark and need no device."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from timed_stages import Check, Stage, run_stages

SCRIPT = Path(gpu_check.__file__).with_suffix(".sh")


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """A made tree with a test, an op and its benchmark; everything passes."""
    root, out = tmp_path / "root", tmp_path / "out"
    out.mkdir()
    write(root / "pytest.ini", "[pytest]\nmarkers = gpu\npython_files = test_*.py bench_*.py\n")
    write(root / "benchmarks" / "bench_pack.py", "def test_pack(benchmark):\n    benchmark(lambda: 1)\n")
    options = "".join(f"    parser.addoption('{name}')\n" for name in ("--device", "--seconds"))
    write(root / "benchmarks" / "conftest.py", f"def pytest_addoption(parser):\n{options}")
    write(root / "dove_fast" / "ops" / "pack" / "__init__.py", "")
    write(root / "tests" / "ops" / "test_pack.py", gpu_test("assert True"))
    return Check(out, root=root, total=120, grace=10)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def gpu_test(body: str, head: str = "import pytest") -> str:
    other = "def test_other():\n    assert False\n"
    return f"{head}\nimport pytest\n\n@pytest.mark.gpu\ndef test_it():\n    {body}\n\n{other}"


def run(check: Check, *names: str) -> tuple[int, dict]:
    """Run the stages of these names -> (exit code, summary.json)."""
    code = run_stages(check, [stage for stage in gpu_check.STAGES if stage.name in names])
    return code, json.loads((check.out / "summary.json").read_bytes())


def command(name: str, *words: str, most: float = 60, least: float = 0) -> Stage:
    """Return a stage of one command."""

    def start(check: Check, limit: float) -> dict:
        ended = check.command(name, words, limit)
        return {"status": "failed" if ended.code or ended.stopped else "passed", "exit_code": ended.code}

    return Stage(name, start, most, least)


def python(name: str, code: str, **limits: float) -> Stage:
    return command(name, sys.executable, "-c", code, **limits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    for interpreter in (sys.executable, ""):
        environment = {**os.environ, "PYTHON": interpreter}
        if not interpreter:
            write(tmp_path / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            (tmp_path / "python").chmod(0o755)
            environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        words = ["bash", str(SCRIPT), str(tmp_path / "out")]
        result = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr == "gpu_check needs a GPU: torch.cuda.is_available() is False\n"
        assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_without_an_output_directory():
    result = subprocess.run(["bash", str(SCRIPT)], env={**os.environ, "PYTHON": sys.executable}, capture_output=True)
    assert result.returncode == 2


def test_all_is_well(check):
    code, summary = run(check, "tests", "benchmarks")
    assert code == 0 and summary["passed"]
    assert summary["stages"]["tests"]["counts"] == {"passed": 1, "failed": 0, "errors": 0, "skipped": 0}
    assert summary["stages"]["tests"]["exit_code"] == 0
    (figure,) = summary["benchmarks"]
    assert figure["file"] == "bench_pack.py" and figure["correctness"] == "tests passed"
    assert figure["median_seconds"] > 0
    assert "1 passed" in (check.out / "tests.log").read_text()
    assert "--benchmark-only" in (check.out / "benchmarks.log").read_text()


def test_a_failed_op_has_no_figures(check):
    write(check.root / "tests" / "ops" / "test_pack.py", gpu_test("assert False"))
    write(check.root / "dove_fast" / "ops" / "other" / "__init__.py", "")
    benchmarks = check.root / "benchmarks"
    for name in ("other", "pipeline"):
        write(benchmarks / f"bench_{name}.py", (benchmarks / "bench_pack.py").read_text())
    code, summary = run(check, "tests", "benchmarks")
    assert code == 1 and not summary["passed"]
    assert summary["stages"]["tests"]["status"] == "failed"
    (failed,) = summary["stages"]["tests"]["failed_tests"]
    assert failed.endswith("tests/ops/test_pack.py::test_it")
    assert [item["file"] for item in summary["benchmarks"]] == ["bench_other.py"]
    assert summary["benchmarks"][0]["correctness"] == "this op's tests passed, others failed"
    packs, pipelines = summary["stages"]["benchmarks"]["left_out"]
    assert packs.startswith("bench_pack.py was left out: 1 tests failed, such as")
    assert pipelines.startswith("bench_pipeline.py was left out: 1 tests failed")
    assert "assert False" in (check.out / "tests.log").read_text()


def test_skipped_is_not_passed(check):
    write(check.root / "tests" / "ops" / "test_pack.py", gpu_test("pytest.skip('no such luck')"))
    code, summary = run(check, "tests", "benchmarks")
    assert code == 1
    assert summary["stages"]["tests"]["status"] == "skipped"
    assert summary["stages"]["tests"]["note"] == "no such luck"
    assert summary["stages"]["tests"]["counts"]["skipped"] == 1


def test_a_file_that_cannot_be_imported_is_left_out(check):
    write(check.root / "tests" / "test_far.py", gpu_test("assert True", head="import nearby"))
    write(check.root / "tests" / "nearby.py", "import dove_fast.ops\nfrom absent_package.part import thing\n")
    write(check.root / "benchmarks" / "bench_pack.py", "import absent_package\n")
    code, summary = run(check, "tests", "benchmarks")
    assert code == 0
    tests, benchmarks = summary["stages"]["tests"], summary["stages"]["benchmarks"]
    assert tests["left_out"] == ["test_far.py was left out: absent_package is not installed"]
    assert tests["counts"]["passed"] == 1
    assert benchmarks["status"] == "skipped"
    assert benchmarks["left_out"] == ["bench_pack.py was left out: absent_package is not installed"]


@pytest.mark.parametrize("package", ["pytest", "pytest_benchmark", "triton"])
def test_missing_packages(check, monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    stage = {"pytest": "tests", "pytest_benchmark": "benchmarks", "triton": "resource_table"}[package]
    code, summary = run(check, stage)
    assert code == 1, "without tests nothing is passed"
    assert summary["stages"][stage]["status"] == "skipped"
    assert "is not installed" in summary["stages"][stage]["note"]


def test_a_stage_that_takes_too_long(check):
    """It is interrupted, then killed with its children, and what comes behind it has its time."""
    check.grace = 1
    ignores = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ignores += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    ignores += "print(child.pid, flush=True); time.sleep(60)"
    start = time.monotonic()
    code = run_stages(
        check,
        [
            python("sleeps", "import time; time.sleep(60)", most=3),
            python("ignores", ignores, most=4),
            python("fails", "raise SystemExit(3)"),
            python("works", "print('here')"),
        ],
    )
    assert code == 1
    assert time.monotonic() - start < 30
    stages = json.loads((check.out / "summary.json").read_bytes())["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "sleeps": "failed",
        "ignores": "failed",
        "fails": "failed",
        "works": "passed",
    }
    assert stages["fails"]["exit_code"] == 3
    assert stages["ignores"]["exit_code"] == -signal.SIGKILL
    assert "KeyboardInterrupt" in (check.out / "sleeps.log").read_text()
    assert (check.out / "works.log").read_text().endswith("here\n")
    child = int((check.out / "ignores.log").read_text().split()[-1])
    assert not alive(child)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may still wait for its parent."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_later_stages_keep_their_time(check):
    check.total, check.grace = 12, 1
    code = run_stages(
        check, [python("sleeps", "import time; time.sleep(60)", most=60, least=0), python("works", "", least=8)]
    )
    assert code == 1
    stages = check.summary["stages"]
    assert stages["sleeps"]["limit_seconds"] <= 4
    assert stages["works"]["status"] == "passed"
    check.total = 0
    run_stages(check, [python("works", "")])
    assert check.summary["stages"]["works"]["note"] == "no time was left for it"


@pytest.mark.slow
def test_a_stopped_pytest_keeps_its_results(check):
    check.grace = 5
    body = "import time\n    time.sleep(0 if number < 3 else 100)"
    marks = "@pytest.mark.gpu\n@pytest.mark.parametrize('number', range(6))\ndef test_it(number):\n"
    write(check.root / "tests" / "ops" / "test_pack.py", f"import pytest\n\n{marks}    {body}\n")
    bench = "import time, pytest\n\n@pytest.mark.parametrize('number', range(6))\ndef test_pack(benchmark, number):\n"
    write(check.root / "benchmarks" / "bench_pack.py", f"{bench}    {body}\n    benchmark(lambda: 1)\n")
    stages = [
        Stage("tests", gpu_check.tests, 15, 0),
        Stage("benchmarks", gpu_check.benchmarks, 20, 0),
    ]
    assert run_stages(check, stages) == 1
    tests = check.summary["stages"]["tests"]
    assert tests["note"] == "stopped at its limit of 15 s"
    assert not tests["finished"]
    assert tests["counts"]["passed"] == 3
    assert len(check.summary["benchmarks"]) == 3
    assert {item["correctness"] for item in check.summary["benchmarks"]} == {"tests did not finish"}
    assert "stopped by the time limit" in check.summary["stages"]["benchmarks"]["note"]


def test_a_stage_with_a_mistake_does_not_cost_the_others(check):
    def wrong(check: Check, limit: float) -> dict:
        raise KeyError("nothing")

    assert run_stages(check, [Stage("wrong", wrong, 60, 0), python("works", "")]) == 1
    assert "KeyError: 'nothing'" in check.summary["stages"]["wrong"]["note"]
    assert check.summary["stages"]["works"]["status"] == "passed"


@pytest.mark.parametrize("there", [True, False], ids=["with a module", "without one"])
def test_build(check, monkeypatch, there):
    """A module with CUDA code is used as it is; where it is older than its sources, or none is there, one is built."""
    module = check.root / "_C.so"
    info = f"{{'cuda': {there}, 'version': '0'}}"
    native = f"import types\ndef _import():\n    return types.SimpleNamespace(__file__={str(module)!r}), ''\n"
    write(check.root / "dove_fast" / "__init__.py", f"def build_info():\n    return {info}\n")
    write(check.root / "dove_fast" / "native.py", native)
    write(check.root / "csrc" / "pack.cu", "")
    write(check.root / "CMakeLists.txt", "")
    write(check.root / "setup.py", "import os, sys\nprint(sys.argv, os.environ['DOVE_FAST_CUDA'])\n")
    write(module, "")
    tools = {"pybind11": True, "nvcc": True}
    find_spec, which = importlib.util.find_spec, gpu_check.shutil.which
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (tools[name] or None) if name in tools else find_spec(name)
    )
    monkeypatch.setattr(
        gpu_check.shutil, "which", lambda name, **k: (tools[name] or None) if name in tools else which(name, **k)
    )
    monkeypatch.delenv("CUDACXX", raising=False)
    build = gpu_check.build(check, 60)
    if there:
        assert build["status"] == "skipped"
        assert build["note"] == "the module that is here has CUDA kernels and was not built again"
        os.utime(module, (0, 0))
        build = gpu_check.build(check, 60)
    assert "['setup.py', 'build_ext', '--inplace'] 1" in (check.out / "build.log").read_text()
    assert build["status"] == ("passed" if there else "failed")
    tools["nvcc"] = tools["pybind11"] = False
    build = gpu_check.build(check, 60)
    assert build["status"] == "skipped"
    assert build["note"].startswith("pybind11, nvcc: not installed, so ")
    assert ("not tested" in build["note"]) == (not there)


@pytest.mark.parametrize("code", [0, 3])
def test_traces(check, code):
    write(check.root / "scripts" / "trace_stages.py", TRACER.replace("CODE", str(code)))
    _, summary = run(check, "trace")
    record = summary["stages"]["trace"]
    assert record["status"] == ("failed" if code else "passed")
    assert record["exit_code"] == code
    words = (check.out / "trace" / "words").read_text(encoding="utf-8").split()
    assert words[words.index("--device") + 1] == "cuda" and "--cuda-graphs" not in words
    if not code:
        assert "--cuda-graphs" in (check.out / "trace-graphs" / "words").read_text(encoding="utf-8")


TRACER = """
import pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir()
(out / "words").write_text(" ".join(sys.argv[2:]))
sys.exit(CODE)
"""
