"""Hands the native module to CMake; the sources are listed in CMakeLists.txt, everything else in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds with CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension where setuptools wants it (the source tree for an editable install)."""
        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp / "cmake").resolve()
        cmake, ninja = _program("cmake", "CMAKE_BIN_DIR"), _program("ninja", "BIN_DIR")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DOVE_FAST_VERSION": self.distribution.get_version(),
            "DOVE_FAST_MODULE_FILE": target.name,
            "DOVE_FAST_CUDA": os.environ.get("DOVE_FAST_CUDA") or "auto",
        }
        # --fresh: the cache of an earlier isolated build names a ninja and a pybind11 that are gone.
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        subprocess.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], check=True)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.run([cmake, "--build", str(build), *jobs], check=True)


def _program(name: str, directory: str) -> str:
    """Find a build tool: from its Python package, which pip may install without a script on PATH, else on PATH."""
    try:
        return shutil.which(name, path=getattr(__import__(name), directory)) or name
    except (ImportError, AttributeError):
        return shutil.which(name) or name


setup(ext_modules=[Extension("dove_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
