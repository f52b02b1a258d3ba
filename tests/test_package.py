"""What `import dove_fast` costs and does: little and nothing."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import dove_fast

LIBRARIES = ("PIL", "pyarrow", "rich", "triton", "diffusers", "transformers")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_quick_and_light():
    code = (
        "import json, sys, threading, time, torch\n"
        "before, start = set(sys.modules), time.perf_counter()\n"
        "import dove_fast\n"
        "seconds = time.perf_counter() - start\n"
        "print(json.dumps([seconds, sorted(set(sys.modules) - before), threading.active_count()]))"
    )
    output = run_python(code)
    seconds, modules, threads = json.loads(output)
    assert seconds < 1.0
    assert not [name for name in modules if name.split(".")[0] in LIBRARIES]
    assert "dove_fast._C" not in modules, "the native module is loaded when it is first called"
    assert threads == 1


def test_a_decoding_process_needs_no_torch():
    code = (
        "import sys, dove_fast.data.worker, dove_fast.data.transform\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert run_python(code).split() == ["False", "True"]


def test_names_are_there_before_they_are_imported():
    code = (
        "import sys, dove_fast\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(dove_fast.__all__) <= set(dir(dove_fast))\n"
        "from dove_fast import *\n"
        "print(DOVE.__module__, ops.__name__, dove_fast.ops is ops, dove_fast.TokenStore.__name__)"
    )
    assert run_python(code).split() == ["dove_fast.models.dove", "dove_fast.ops", "True", "TokenStore"]
    with pytest.raises(AttributeError, match="module 'dove_fast' has no attribute 'DOVEE'"):
        dove_fast.DOVEE  # noqa: B018


def test_public_names():
    for name in dove_fast.__all__:
        value = getattr(dove_fast, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


def test_version_is_the_package_metadata():
    from importlib import metadata

    assert metadata.version("dove-fast") == dove_fast.__version__
