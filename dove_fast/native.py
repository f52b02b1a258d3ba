"""The native module `dove_fast._C`: loaded when it is first called, and what it was built with."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from dove_fast.errors import BackendError

__all__ = ["build_info", "load", "why_no_cuda", "why_no_native", "without_torch"]

# The floating dtypes that kernels take, by the numbers of csrc/include/dove/dtype.h.
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}

_REBUILD = "run `pip install .`, or `pip install -e .`, in the source tree"


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    """Import `_C` once -> (module, ""), or (None, why not)."""
    # torch comes first: its OpenMP runtime has the soname that `_C` asks for, so that the process has one of them.
    import torch  # noqa: F401

    return _module()


def _module() -> tuple[ModuleType | None, str]:
    from dove_fast import __version__

    try:
        module = importlib.import_module("dove_fast._C")
    except ImportError as error:
        root = Path(__file__).parent.parent
        where = ""
        if (root / "pyproject.toml").exists():
            where = f"; {root} is a source tree, which hides an installed package from a Python that starts there"
        return None, f"the native module dove_fast._C cannot be imported ({error}{where}): {_REBUILD}"
    if module.version != __version__:
        built_for = f"was built for version {module.version}, but dove_fast is {__version__}"
        return None, f"the native module dove_fast._C {built_for}: {_REBUILD}"
    return module, ""


def load() -> ModuleType:
    """Return `dove_fast._C`. Raises `BackendError` that names the fix when it is missing or of another version."""
    module, reason = _import()
    if module is None:
        raise BackendError(reason)
    return module


def without_torch() -> ModuleType | None:
    """Return `dove_fast._C`, or None where it cannot be loaded; imports no torch, for processes that need none.

    It takes the OpenMP runtime of the torch that is installed, as with torch, and the system's where torch has none; a
    torch that comes later finds it loaded.
    """
    if "torch" in sys.modules:
        return _import()[0]
    for runtime in _runtimes_of_torch():
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    return _module()[0]


def _runtimes_of_torch() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    return sorted((Path(spec.origin).parent / "lib").glob("libgomp*.so*"))


def why_no_native() -> str | None:
    """Return why the CPU kernels cannot be called, or None when they can."""
    return _import()[1] or None


def why_no_cuda() -> str | None:
    """Return why the CUDA kernels are not in this build, or None when they are. Asks no device."""
    module, reason = _import()
    if module is None:
        return reason
    why: str = module.build_info()["cuda_reason"]
    if not why:
        return None
    return f"this build of dove_fast has no CUDA kernels ({why}): install with nvcc on PATH and DOVE_FAST_CUDA=1"


def build_info() -> dict[str, Any]:
    """Return what the native module was built with; never raises, and asks no GPU.

    Keys: `version` (str), `native` (bool, the module can be loaded), `native_reason` (str or None, why it cannot),
    `compiler` (str), `build_type` (str), `cpu_isas` (list of str, compiled), `cpu_isa` (str, the one this processor
    runs), `openmp` (bool), `cuda` (bool), `cuda_archs` (list of str such as "90a-real"), `nvcc` (str or None, its
    version), `cuda_reason` (str or None, why there is no CUDA). Without the module its own entries are None or empty.
    """
    from dove_fast import __version__

    module, reason = _import()
    info: dict[str, Any] = {
        "version": __version__,
        "native": module is not None,
        "native_reason": reason or None,
        "compiler": None,
        "build_type": None,
        "cpu_isas": [],
        "cpu_isa": None,
        "openmp": False,
        "cuda": False,
        "cuda_archs": [],
        "nvcc": None,
        "cuda_reason": reason or None,
    }
    if module is not None:
        built = module.build_info()
        info.update({key: value if value != "" else None for key, value in built.items()})
    return info
