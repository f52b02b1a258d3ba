"""scripts/trace_stages.py on the CPU: a trace and a table of what each stage launches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import trace_stages


def test_traces_and_table(tmp_path):
    command = [sys.executable, trace_stages.__file__, tmp_path / "out", "--preset", "tiny", "--batch", "2"]
    done = subprocess.run([*map(str, command), "--steps", "8"], capture_output=True, text=True, check=True)
    table = (tmp_path / "out" / "launches.md").read_text(encoding="utf-8")
    assert table.strip() in done.stdout
    assert "batch 2, blocks of 8 steps, CUDA graphs off" in table
    for stage, operator in (("encoder", "convolution"), ("prefix", "prefix_attention"), ("block", "eos_scan")):
        trace = json.loads(Path(tmp_path / "out" / f"{stage}.json").read_bytes())
        assert any(operator in event.get("name", "") for event in trace["traceEvents"]), stage
        assert f"## {stage}: " in table


def test_table_counts_what_it_does_not_show():
    rows = [(f"kernel {index}", 2, 100.0 - index) for index in range(trace_stages.ROWS + 3)]
    table = trace_stages.table("block", rows)
    assert "block: 36 launches" in table
    assert "| `3 others` | 6 |" in table
