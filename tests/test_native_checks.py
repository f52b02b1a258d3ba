"""The kernels' checks in C++, tests/native: built by CMake without Python, run by ctest.

They lie in build/checks, where another run finds what has not changed.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import RELATIVE

ROOT = Path(__file__).parent.parent
every_check = pytest.mark.parametrize(
    "check", sorted(path.stem for path in (ROOT / "tests/native").glob("check_*.cpp"))
)

# Where the build's programs are that the test extra brings; an environment need not be on PATH.
PACKAGES = {"cmake": ("cmake", "CMAKE_BIN_DIR"), "ctest": ("cmake", "CMAKE_BIN_DIR"), "ninja": ("ninja", "BIN_DIR")}


def program(name: str) -> str:
    package, directory = PACKAGES[name]
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(package), directory))
    except ImportError:
        path = None
    path = path or shutil.which(name)
    assert path, f"{name} is missing: install the extra 'test'"
    return path


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{result.stdout[-4000:]}{result.stderr[-4000:]}", pytrace=False)
    return result.stdout


def build(name: str, **options: str) -> Path:
    target = ROOT / "build" / "checks" / name
    options |= {"CMAKE_MAKE_PROGRAM": program("ninja"), "DOVE_FAST_CHECKS": "ON"}
    configure = [program("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(target)]
    configure += [f"-D{key}={value}" for key, value in options.items()]
    if subprocess.run(configure, capture_output=True).returncode != 0:
        # The cache of an earlier run may name a compiler or a folder that is gone.
        run(*configure, "--fresh")
    run(program("cmake"), "--build", str(target))
    return target


def run_test(target: Path, name: str) -> str:
    command = [program("ctest"), "--test-dir", str(target), "--no-tests=error", "--output-on-failure"]
    return run(*command, "--tests-regex", f"^{re.escape(name)}$")


def run_check(target: Path, check: str, isa: str) -> None:
    if "***Skipped" in run_test(target, f"{check}.{isa}"):
        pytest.skip(f"{isa} is not on this processor")


def need_compiler() -> None:
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")


BUILDS = {
    "sanitized": {"DOVE_FAST_SANITIZE": "address,undefined"},
    "optimized": {"CMAKE_BUILD_TYPE": "Release"},
}


# Slow, as each compiles all kernels for minutes; `plain_checks` below is a build of the default suite.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in BUILDS])
def checks(request):
    need_compiler()
    return build(request.param, **BUILDS[request.param])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@every_check
def test_every_instruction_set(checks, check, isa):
    if isa != "baseline" and (platform.machine() not in ("x86_64", "AMD64") or sys.platform == "darwin"):
        pytest.skip(f"no kernel is compiled for {isa} here")
    run_check(checks, check, isa)


@pytest.mark.parametrize("check", sorted(path.stem for path in (ROOT / "tests/native").glob("cuda_*.cpp")))
def test_cuda_kernels_on_the_cpu(checks, check):
    """Their arithmetic, barriers and bounds; `pytest -m gpu` has the rest."""
    if sys.platform == "darwin":
        pytest.skip("macOS has no coroutines for the threads")
    run_test(checks, check)


def test_tolerances_are_those_of_the_table(checks):
    header = (checks / "tests/native/tolerances.h").read_text()
    found = {getattr(torch, name): float(value) for name, value in re.findall(r"(\w+) = ([\d.e-]+);", header)}
    assert found == {dtype: RELATIVE[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture(scope="module")
def plain_checks():
    need_compiler()
    return build("plain", CMAKE_BUILD_TYPE="Release", DOVE_FAST_X86_ISAS="OFF")


@every_check
def test_plain_cpp(plain_checks, check):
    """Without the x86 versions, as aarch64 and macOS compile the kernels."""
    run_check(plain_checks, check, "baseline")


@pytest.fixture(scope="module")
def aarch64_checks():
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    return build(
        "aarch64",
        CMAKE_BUILD_TYPE="Release",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=compiler,
        # Static, libgomp too: the emulator then needs no libraries of that architecture.
        CMAKE_EXE_LINKER_FLAGS="-static",
        OpenMP_gomp_LIBRARY=run(compiler, "-print-file-name=libgomp.a").strip(),
        CMAKE_CROSSCOMPILING_EMULATOR=emulator,
    )


@every_check
def test_aarch64(aarch64_checks, check):
    run_check(aarch64_checks, check, "baseline")
