"""keep_freed_memory: large blocks stay with the process, and nothing is changed before it is called."""

from __future__ import annotations

import subprocess
import sys

import pytest
from small_models import micro_model

import dove_fast
from dove_fast import cli, native
from dove_fast.commands.options import load

# Prints how many pages were faulted in by 20 tensors of 64 MiB, each freed before the next, with and without.
COUNT_FAULTS = """
import resource, torch, dove_fast

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def allocate(times):
    before = faults()
    for _ in range(times):
        torch.ones(1 << 24)
    return faults() - before

allocate(2)
default = allocate(20)
changed = dove_fast.keep_freed_memory()
# An aligned block does not always fit where an equal one was: it takes a few until there is a place.
allocate(20)
print(changed, default, allocate(20))
"""

WITHOUT_MODULE = """
import sys
sys.modules["dove_fast._C"] = None
import dove_fast
try:
    dove_fast.keep_freed_memory()
except dove_fast.BackendError as error:
    print(error)
"""


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_large_blocks_are_kept():
    pytest.importorskip("resource")
    changed, default, kept = run_python(COUNT_FAULTS).split()
    if changed == "False":
        pytest.skip("the C library is not glibc")
    # A page is 4 KiB, or 2 MiB where the kernel gives huge ones: 20 x 32 faults at least, and then next to none.
    assert int(default) >= 20 * 32
    assert int(kept) * 10 <= int(default)


def test_without_the_native_module():
    message = run_python(WITHOUT_MODULE)
    assert message.startswith("the native module dove_fast._C cannot be imported")
    assert "run `pip install .`" in message


@pytest.mark.parametrize("missing", [False, True], ids=["native", "no native module"])
def test_commands_call_it_where_they_can(monkeypatch, tmp_path, missing):
    """Once the model is on the CPU; a command works without the native module too."""
    calls = []
    monkeypatch.setattr(dove_fast, "keep_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(native, "why_no_native", lambda: "not here" if missing else None)
    micro_model().save_pretrained(tmp_path)
    arguments = cli._parser().parse_args(["tokenize", "in", "out", "--checkpoint", str(tmp_path), "--device", "cpu"])
    load(arguments)
    assert len(calls) == (0 if missing else 1)
