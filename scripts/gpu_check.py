"""Build, test and measure on a machine with a GPU, within 8 minutes and without a network.

    scripts/gpu_check.sh OUTDIR [--commit NAME]

OUTDIR gets summary.json, the log of each stage, resource_table.md, and traces. Stages run one behind the other, each
within a limit of its own: the build of the CUDA kernels, `pytest -m gpu`, compute-sanitizer, the resource table, traces
of the stages of `tokenize`, the benchmarks with the time that is left. Packages are those that are installed: what is
missing is said in a sentence, and the rest is done. Exit 0: nothing failed, and the tests ran; 1: not so, see
summary.json; 2: no GPU or wrong use, nothing done.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from timed_stages import ROOT, TOTAL, Check, Ended, Record, Stage, run_stages

# What there is to work with.

MACHINE = """
import json, os, platform
found = {"python": platform.python_version(), "cpus": os.cpu_count(), "error": None}
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        it = torch.cuda.get_device_properties(0)
        found |= {"device": it.name, "capability": f"{it.major}.{it.minor}", "memory_bytes": it.total_memory}
        found |= {"multiprocessors": it.multi_processor_count, "devices": torch.cuda.device_count()}
    else:
        found["error"] = "torch.cuda.is_available() is False"
except ImportError as error:
    found["error"] = f"torch cannot be imported ({error}); PYTHON=... names another interpreter"
print(json.dumps(found))
"""

PACKAGES = ("triton", "numpy", "pytest", "pytest-benchmark", "hypothesis", "diffusers", "transformers", "pybind11")


def machine(check: Check) -> Record:
    """Return the device and the versions; with an `error` where nothing can be done."""
    found = check.ask(MACHINE) or {"error": "a Python process that asks torch for the device did not end well"}
    found["interpreter"] = sys.executable
    found["system"] = platform.platform()
    found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["packages"] = {name: _version(name) for name in PACKAGES}
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(name: str | None) -> str:
    """Return the commit that is checked, with "+" behind it where files were changed."""
    head = _output("git", "rev-parse", "HEAD")
    if name or head is None:
        return name or "unknown: this is no git checkout, and --commit was not given"
    return head + ("+" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def missing_imports(path: Path, folders: Sequence[Path]) -> list[str]:
    """Return the packages that a file imports, itself or by files in `folders`, and that are not installed."""
    missing: set[str] = set()
    waiting, seen = [path], {path}
    while waiting:
        for node in ast.parse(waiting.pop().read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in (name.partition(".")[0] for name in names):
                local = [folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").exists()]
                waiting += [file for file in local if file not in seen]
                seen.update(local)
                if not local and name != "dove_fast" and importlib.util.find_spec(name) is None:
                    missing.add(name)
    return sorted(missing)


# The stages.


def build(check: Check, limit: float) -> Record:
    """Build the extension in the tree, with CUDA; one that is there and no older than its sources is used."""
    ask = "import dove_fast, json; from dove_fast import native; native._import()\n"
    ask += "file = getattr(native._import()[0], '__file__', None)\n"
    ask += "print(json.dumps({**dove_fast.build_info(), 'file': file}))"
    info = check.summary["module"] = check.ask(ask) or {"cuda": False}
    if info["cuda"]:
        sources = [check.root / "CMakeLists.txt", check.root / "setup.py", *(check.root / "csrc").rglob("*.*")]
        newest = max(path.stat().st_mtime for path in sources)
        if newest <= Path(info["file"]).stat().st_mtime:
            return {"status": "skipped", "note": "the module that is here has CUDA kernels and was not built again"}
    missing = [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
    missing += [n for n in ("cmake", "ninja") if importlib.util.find_spec(n) is None and shutil.which(n) is None]
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = os.pathsep.join(map(str, homes)) or None
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc") or (places and shutil.which("nvcc", path=places))):
        missing.append("nvcc")
    if missing:
        then = "the module that is here was used, though its files are older than the sources"
        if not info["cuda"]:
            then = "the CUDA kernels were not built and not tested, and the Triton ones were"
        return {"status": "skipped", "note": f"{', '.join(missing)}: not installed, so {then}"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ended = check.command("build", command, limit, DOVE_FAST_CUDA="1")
    info = check.summary["module"] = check.ask(ask) or {"cuda": False}
    good = ended.code == 0 and info["cuda"]
    record: Record = {"status": "passed" if good else "failed", "exit_code": ended.code}
    if not good:
        record["note"] = _stopped(ended, limit) or "the CUDA kernels are not there and were not tested, see build.log"
    return record


def _stopped(ended: Ended, limit: float) -> str | None:
    return f"stopped at its limit of {limit:.0f} s" if ended.stopped else None


def tests(check: Check, limit: float) -> Record:
    """Run `pytest -m gpu` on every test file that has such tests, but compute-sanitizer's."""
    files = [path for path in sorted((check.root / "tests").rglob("test_*.py")) if path.name != SANITIZER]
    return _pytest(check, "tests", [path for path in files if "mark.gpu" in path.read_text("utf-8")], limit)


SANITIZER = "test_compute_sanitizer.py"


def sanitizer(check: Check, limit: float) -> Record:
    """Run the tests that run compute-sanitizer."""
    return _pytest(check, "sanitizer", [check.root / "tests" / SANITIZER], limit)


def _pytest(check: Check, stage: str, files: Sequence[Path], limit: float) -> Record:
    if importlib.util.find_spec("pytest") is None:
        return {"status": "skipped", "note": "pytest is not installed"}
    folders = [check.root / "tests", check.root / "scripts"]
    missing = {path: missing_imports(path, folders) for path in files}
    lacking = [
        f"{path.name} was left out: {', '.join(names)} is not installed" for path, names in missing.items() if names
    ]
    chosen = [path for path, names in missing.items() if not names]
    if not chosen:
        return {"status": "skipped", "left_out": lacking, "note": "no test file is left"}
    environment, parallel = {}, []
    # Most of the time goes into compiling kernels, on one core a process.
    processes = min(8, (os.cpu_count() or 1) // 2)
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        parallel = ["-n", str(processes), "--dist", "worksteal"]
        environment["OMP_NUM_THREADS"] = str((os.cpu_count() or 1) // processes)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        environment["OUTCOMES"] = str(outcomes)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider", *parallel]
        ended = check.command(stage, [*command, "-p", "pytest_outcomes", *chosen], limit, **environment)
        record = read_outcomes(outcomes)
    # A run that was stopped, or broke off, says nothing of the tests that it did not reach. 5: there was no test.
    finished = ended.code in (0, 1, 5) and not ended.stopped
    record |= {"exit_code": ended.code, "finished": finished, "left_out": lacking, "note": _stopped(ended, limit)}
    if not finished or ended.code == 1:
        return record | {"status": "failed"}
    if record["counts"]["passed"]:
        return record | {"status": "passed"}
    return record | {"status": "skipped", "note": "; ".join(record["skipped"]) or "no test was found"}


def read_outcomes(path: Path) -> Record:
    """Return the counts of what scripts/pytest_outcomes.py wrote, the tests that failed, and why some were skipped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # By test: one that passes may still fail when it is cleaned up.
    last = {line["test"]: line for line in map(json.loads, lines)}.values()
    counts = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0) | Counter(line["outcome"] for line in last)
    failed = [line["test"] for line in last if line["outcome"] in ("failed", "errors")]
    skipped = Counter(line["reason"] for line in last if line["outcome"] == "skipped")
    return {"counts": counts, "failed_tests": failed, "skipped": dict(skipped)}


def resource_table(check: Check, limit: float) -> Record:
    """Compile every kernel as scripts/resource_table.py does, with this machine's Triton."""
    if importlib.util.find_spec("triton") is None:
        return {"status": "skipped", "note": "Triton is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "table.json"
        command = [sys.executable, check.root / "scripts" / "resource_table.py", "--jobs", str(os.cpu_count() or 2)]
        command += ["--json", rows, "--markdown", check.out / "resource_table.md"]
        ended = check.command("resource_table", command, limit)
        table = json.loads(rows.read_bytes()) if rows.exists() else {"rows": [], "failures": [], "missing": {}}
    check.summary["resource_table"] = table["rows"]
    record = {
        "status": "passed" if ended.code == 0 else "failed",
        "exit_code": ended.code,
        "rules_broken": table["failures"],
    }
    notes = [_stopped(ended, limit), *(f"{name}: not looked at, {why}" for name, why in table["missing"].items())]
    record["note"] = "; ".join(filter(None, notes)) or None
    return record


# Where traces go, and the options that they are taken with.
TRACES: dict[str, list[str]] = {"trace": [], "trace-graphs": ["--cuda-graphs"]}


def trace(check: Check, limit: float) -> Record:
    """Trace the stages of `tokenize` as they are and with CUDA graphs, in bf16."""
    for name, options in TRACES.items():
        command = [sys.executable, check.root / "scripts" / "trace_stages.py", check.out / name, "--device", "cuda"]
        command += ["--dtype", "bfloat16", "--batch", "64", *options]
        ended = check.command("trace", command, limit / 2)
        if ended.code != 0:
            return {"status": "failed", "exit_code": ended.code, "note": _stopped(ended, limit / 2) or "see trace.log"}
    return {"status": "passed", "exit_code": 0}


def benchmarks(check: Check, limit: float) -> Record:
    """Run each benchmark file on the GPU in an equal share of the time, but those of an op whose tests failed."""
    figures = check.summary["benchmarks"] = []
    if importlib.util.find_spec("pytest_benchmark") is None:
        return {"status": "skipped", "note": "pytest-benchmark is not installed"}
    end = time.monotonic() + limit
    correctness = _correctness(check)
    left_out, stopped, codes = [], [], [0]
    files = sorted((check.root / "benchmarks").glob("bench_*.py"))
    for index, path in enumerate(files):
        share = (end - time.monotonic()) / (len(files) - index)
        why = _why_left_out(check, path) or ("no time was left for it" if share < 2 * check.grace else None)
        if why is not None:
            left_out.append(f"{path.name} was left out: {why}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "pytest", path, "-q", "-ra", "-p", "no:cacheprovider"]
            command += ["--benchmark-only", f"--benchmark-json={results}", "--device", "cuda", "--seconds", "0.5"]
            ended = check.command("benchmarks", command, share)
            # An interrupted run has what was measured until then; a killed one leaves an empty file.
            text = results.read_bytes() if results.exists() else b""
        for item in json.loads(text)["benchmarks"] if text else []:
            named = {"file": path.name, "name": item["name"], "correctness": correctness}
            figures.append({**named, "median_seconds": item["stats"]["median"], **item["extra_info"]})
        if ended.stopped:
            stopped.append(path.name)
        elif ended.code != 5:  # 5: all its sizes are for other devices
            codes.append(ended.code)
    status = "failed" if any(codes) else "passed" if figures else "skipped"
    notes = [f"{len(figures)} figures"]
    if stopped:
        notes.append(f"stopped by the time limit, with the figures so far: {', '.join(stopped)}")
    return {"status": status, "exit_code": max(codes, key=abs), "left_out": left_out, "note": "; ".join(notes)}


def _failed_tests(check: Check) -> list[str]:
    stages = check.summary["stages"]
    return [test for name in ("tests", "sanitizer") for test in stages.get(name, {}).get("failed_tests", [])]


def _correctness(check: Check) -> str:
    """Return what the tests say of the figures that are taken at all."""
    stages = check.summary["stages"]
    tested = stages.get("tests", {})
    if not tested.get("finished"):
        return "tests did not finish"
    if stages.get("sanitizer", {}).get("status") == "failed":
        return "compute-sanitizer's tests failed"
    return "tests passed" if tested["status"] == "passed" else "this op's tests passed, others failed"


def _why_left_out(check: Check, path: Path) -> str | None:
    op = path.stem.removeprefix("bench_")
    wrong = _failed_tests(check)
    if (check.root / "dove_fast" / "ops" / op).is_dir():
        # Other benchmarks, such as the pipeline's, are of all ops.
        wrong = [test for test in wrong if op in test]
    if wrong:
        return f"{len(wrong)} tests failed, such as {wrong[0]}"
    missing = missing_imports(path, [check.root / name for name in ("tests", "scripts", "benchmarks")])
    return f"{', '.join(missing)} is not installed" if missing else None


STAGES = (
    Stage("build", build, 150, 0),
    Stage("tests", tests, 240, 100),
    Stage("sanitizer", sanitizer, 100, 40),
    Stage("resource_table", resource_table, 90, 40),
    Stage("trace", trace, 60, 20),
    Stage("benchmarks", benchmarks, TOTAL, 60),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUTDIR", help="directory for the results; made if need be")
    parser.add_argument("--commit", metavar="NAME", help="what is checked, for a tree that is no git checkout")
    options = parser.parse_args(arguments)
    # A stage's processes end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    check = Check(options.out.resolve())
    found = machine(check)
    if found["error"] is not None:
        print(f"gpu_check needs a GPU: {found['error']}", file=sys.stderr)
        return 2
    check.summary |= {"commit": commit(options.commit), "machine": found, "limit_seconds": TOTAL}
    check.out.mkdir(parents=True, exist_ok=True)
    for old in ("summary.json", "resource_table.md", *(f"{stage.name}.log" for stage in STAGES)):
        (check.out / old).unlink(missing_ok=True)
    for old in TRACES:
        shutil.rmtree(check.out / old, ignore_errors=True)
    print(f"{found['device']}, torch {found['torch']}, commit {check.summary['commit']}", flush=True)
    code = run_stages(check, STAGES)
    print(f"{'passed' if code == 0 else 'NOT PASSED'}: {check.out / 'summary.json'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
