"""The plain C++ path of the kernels, compiled without Python: on this machine, and for aarch64 where it can be run.

The sources are those of the module; without DOVE_X86_ISAS they are what aarch64 and macOS compile.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["csrc/cpu/isa.cpp", "csrc/cpu/pack.cpp", "tests/native/check_pack.cpp"]
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-DDOVE_ISA_NAMESPACE=baseline", "-Icsrc/include"]


def build_and_run(compiler: str, run_with: list[str], target: Path, *extra: str) -> str:
    subprocess.run([compiler, *FLAGS, *extra, *SOURCES, "-o", str(target)], cwd=ROOT, check=True)
    return subprocess.run([*run_with, str(target)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("extra", [[], ["-fsanitize=address,undefined"]], ids=["plain", "sanitized"])
def test_here(tmp_path, extra):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    assert build_and_run(compiler, [], tmp_path / "check", *extra) == "baseline agrees\n"


def test_aarch64(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    assert build_and_run(compiler, [emulator], tmp_path / "check", "-static") == "baseline agrees\n"
