"""Every kernel under compute-sanitizer: bounds, races, uninitialised memory, by the calls of tests/op_calls.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import op_calls
import pytest

SECONDS = 150

# Reads 256 numbers of a tensor that has 4.
OUT_OF_BOUNDS = """
import torch
from failing_kernels import rotate_kernel
x, out = torch.zeros(4, device="cuda"), torch.zeros(256, device="cuda")
rotate_kernel[(1,)](x, out, 0, SIZE=16)
torch.cuda.synchronize()
"""


def sanitizer() -> str | None:
    """Return the program's path: on PATH, or in the CUDA toolkit that CUDA_HOME or CUDA_PATH names."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [place for home in homes for place in (home / "bin", home / "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, places))
    )


def check(tmp_path: Path, tool: str, *command: str) -> tuple[int, str]:
    """Run Python under a tool -> (exit code, output); skip where the tool cannot work with the device."""
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor under CUDA_HOME")
    options = ["--tool", tool, "--error-exitcode", "86", "--target-processes", "application-only"]
    if tool == "memcheck":
        # torch asks the driver for things that it may not have.
        options += ["--report-api-errors", "no"]
    # A block of torch's cache is larger than the tensor in it: bounds are those of the block, and old contents stay.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    )
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [program, *options, sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(SECONDS)
        finally:
            # The program under test is the sanitizer's child, and would outlive it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = output.read_text(errors="replace")
    for line in text.splitlines():
        if "not supported" in line and "Device" in line:
            pytest.skip(f"compute-sanitizer does not work here: {line.strip('= ')}")
    return code, text


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_kernels_are_clean(tmp_path, tool):
    code, output = check(tmp_path, tool, op_calls.__file__)
    assert code == 0, output[-8000:]
    assert "calls agree with the reference" in output
    assert "SUMMARY: 0 " in output


@pytest.mark.gpu
def test_an_error_is_found(tmp_path):
    code, output = check(tmp_path, "memcheck", "-c", OUT_OF_BOUNDS)
    assert code != 0
    assert "Invalid __global__ read" in output, output[-8000:]
