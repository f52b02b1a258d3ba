"""The native module: what it says of itself, how its absence shows, and that other builds of it work."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import resource_table
import torch

import dove_fast
from dove_fast import BackendError, native

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path | None = None) -> str:
    """Run code in a new interpreter; `-c` puts the working directory in front of the import path."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_build_info():
    info = dove_fast.build_info()
    assert info["native"], info["native_reason"]
    assert info["version"] == dove_fast.__version__
    assert info["native_reason"] is None
    assert re.fullmatch(r"\w+ [\d.]+", info["compiler"])
    assert info["build_type"] == "Release"
    assert info["cpu_isas"][0] == "baseline"
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["cuda"] == (info["cuda_reason"] is None) == bool(info["cuda_archs"]) == bool(info["nvcc"])


def test_best_instruction_set_is_the_processors():
    """torch finds out for itself what the processor runs."""
    info = dove_fast.build_info()
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    assert info["cpu_isa"] == (expected if expected in info["cpu_isas"] else "baseline")


def test_one_openmp_runtime():
    """Both torch and the module run on the libgomp that torch brought."""
    if not sys.platform.startswith("linux") or not dove_fast.build_info()["openmp"]:
        pytest.skip("needs /proc and a build with OpenMP")
    maps = python("from dove_fast import native; native.load(); print(open('/proc/self/maps').read())")
    assert "_C." in maps
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


def test_architectures_in_the_binary():
    if not dove_fast.build_info()["cuda"]:
        pytest.skip(dove_fast.build_info()["cuda_reason"])
    cuobjdump = resource_table.cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, beside Triton or on PATH")
    binary = native.load().__file__
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    listing = subprocess.run([cuobjdump, "--list-ptx", binary], capture_output=True, text=True, check=True)
    for arch in dove_fast.build_info()["cuda_archs"]:
        name, kind = arch.split("-")
        assert (f"arch = sm_{name}\n" if kind == "real" else f".sm_{name}.ptx") in usage.stdout + listing.stdout


# One row each: the kernels are never reached, and the address 0 is not read.
CUDA_CALLS = {
    "pack_cuda": (0, 0, 0, 1, 1, 1, 16, 16, 16, 0, 0),
    "unpack_cuda": (0, 0, 0, 1, 1, 1, 16, 16, 16, 0, 0),
    "vq_lookup_cuda": (0, 1, 0, 0, 0, 0, 1, 1, 1, 0, True, 1, 0, 0, 0),
}


def test_every_cuda_call_is_tried():
    if not dove_fast.build_info()["cuda"]:
        pytest.skip(dove_fast.build_info()["cuda_reason"])
    assert {name for name in dir(native.load()) if name.endswith("_cuda")} == set(CUDA_CALLS)


@pytest.mark.parametrize("name", list(CUDA_CALLS))
def test_cuda_call_without_a_gpu(name):
    if not dove_fast.build_info()["cuda"]:
        pytest.skip(dove_fast.build_info()["cuda_reason"])
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError) as raised:
        getattr(native.load(), name)(*CUDA_CALLS[name])
    op = name.removesuffix("_cuda")
    reasons = "the NVIDIA driver is missing or too old for CUDA [0-9.]+|no CUDA device was found"
    assert re.fullmatch(rf"{op} cannot run on the GPU: ({reasons}) \(CUDA error \d+\)", str(raised.value))


WITHOUT_MODULE = """
import sys
sys.modules["dove_fast._C"] = None
import torch, dove_fast
from dove_fast import ops
info = dove_fast.build_info()
assert not info["native"] and not info["cuda"] and "cannot be imported" in info["native_reason"], info
assert dove_fast.available_backends()["pack"] == ["reference"]
values, cu_seqlens = ops.pack(torch.ones(2, 3, 4), [1, 3])
assert values.shape == (4, 4)
try:
    ops.pack(torch.ones(2, 3, 4), [1, 3], backend="cpu")
except dove_fast.BackendError as error:
    print(error)
"""


def test_package_without_the_module():
    message = python(WITHOUT_MODULE)
    assert "pack: backend 'cpu' cannot run: the native module dove_fast._C cannot be imported" in message
    assert "pip install -e ." in message
    assert re.search(r"available for cpu tensors: (triton, )?reference$", message.strip())


def test_module_of_another_version(monkeypatch):
    native._import.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(dove_fast, "__version__", "99.0")
            with pytest.raises(BackendError, match=r"was built for version .*, but dove_fast is 99.0: run `pip"):
                native.load()
    finally:
        native._import.cache_clear()
    assert native.load().version == dove_fast.__version__


def build(target: Path, source: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Build a wheel's content from a copy of the sources, with the tools of this environment."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "csrc", "dove_fast"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for binary in source.glob("dove_fast/_C*"):
        binary.unlink()
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(target)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)


@pytest.fixture
def sources(tmp_path):
    """An empty folder for a copy of the sources; the build's tools must be here: `pip install '.[build]'`."""
    for name in ("setuptools", "pybind11", "cmake", "ninja"):
        assert importlib.util.find_spec(name), f"{name} is missing: install the extra 'build' for the slow tests"
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def path_without_nvcc() -> str:
    return os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())


def environment(**changes: str) -> dict[str, str]:
    hidden = ("DOVE_FAST_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
    return {**{key: value for key, value in os.environ.items() if key not in hidden}, **changes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"DOVE_FAST_CUDA": "0"}, "it was built with DOVE_FAST_CUDA=0"),
        ({"PATH": path_without_nvcc()}, "nvcc was not found when it was built"),
    ],
    ids=["refused", "not found"],
)
def test_build_without_cuda(sources, tmp_path, changes, reason):
    target = tmp_path / "target"
    result = build(target, sources, environment(**changes))
    assert result.returncode == 0, result.stdout + result.stderr
    code = (
        "import torch, dove_fast\n"
        "from dove_fast import ops\n"
        "info = dove_fast.build_info()\n"
        "assert info['native'] and not info['cuda'] and info['cuda_archs'] == [] and info['nvcc'] is None, info\n"
        "assert ops.pack(torch.ones(2, 3, 4), [1, 3], backend='cpu')[0].sum() == 16\n"
        "assert dove_fast.DOVE.from_pretrained('tiny').config.image_size == 64\n"
        "print(dove_fast.__file__)\n"
        "print(info['cuda_reason'])\n"
        "print(dove_fast.native.why_no_cuda())\n"
    )
    where, why, sentence = python(code, cwd=target).splitlines()
    assert Path(where).is_relative_to(target)
    assert why == reason
    assert f"has no CUDA kernels ({reason}): install with nvcc on PATH" in sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DOVE_FAST_CUDA": "1", "PATH": path_without_nvcc()}, "DOVE_FAST_CUDA=1, but nvcc was not found"),
        ({"DOVE_FAST_CUDA": "yes"}, "DOVE_FAST_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
    ids=["required", "mistyped"],
)
def test_build_fails_clearly(sources, tmp_path, changes, message):
    result = build(tmp_path / "target", sources, environment(**changes))
    assert result.returncode != 0
    assert message in " ".join((result.stdout + result.stderr).split())
