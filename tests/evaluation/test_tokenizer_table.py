"""The table of tokenizers (benchmarks/tokenizer_table.py), and how its rows are counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizer_facts import bytes_of_codes, flop_of, parameters_of
from tokenizer_table import HEAD, read, table
from torch import nn

from dove_fast import ops
from dove_fast.generation.linear import PackedLinears

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tokenizer_table.py"


@torch.no_grad()
def test_products_are_counted_whoever_computes_them():
    layer, x = nn.Linear(12, 7), torch.randn(5, 3, 12)
    plain = flop_of(lambda: layer(x))
    assert plain == 2 * 15 * 12 * 7
    packed = PackedLinears()
    packed(layer, x)
    assert flop_of(lambda: packed(layer, x)) == plain
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert flop_of(lambda: conv(torch.randn(2, 3, 6, 5))) == 2 * 2 * 8 * 30 * 27


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_counted_on_the_cpu(causal):
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind(0)
    expected = 2 * 4 * 9 * 9 * (2 * 16 + 2 * 16)
    assert flop_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)) == expected


@torch.no_grad()
def test_ragged_attention_is_counted_row_by_row():
    lengths, starts, heads, width = [3, 1, 4], [2, 0, 5], 2, 8
    q, k, v = torch.randn(3, sum(lengths), heads, width).unbind(0)
    cu_seqlens = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    cos, sin = torch.rand(2, 16, 4)
    arguments = {"max_seqlen": 4, "cos": cos, "sin": sin}
    pair = 4 * heads * width
    without = flop_of(lambda: ops.prefix_attention(q, k, v, cu_seqlens, **arguments))
    assert without == pair * sum(new * new for new in lengths)
    caches = {
        "k_cache": torch.zeros(3, heads, 16, width),
        "v_cache": torch.zeros(3, heads, 16, width),
        "slots": torch.arange(3, dtype=torch.int32),
        "starts": torch.tensor(starts, dtype=torch.int32),
    }
    cached = flop_of(lambda: ops.prefix_attention(q, k, v, cu_seqlens, **arguments, **caches))
    assert cached == pair * sum(new * (start + new) for new, start in zip(lengths, starts, strict=True))


def test_bytes_and_parameters():
    assert bytes_of_codes(32, 4096) == 48
    assert bytes_of_codes(8, 1000) == 10
    assert parameters_of([nn.Linear(3, 4), nn.Parameter(torch.empty(2, 5))]) == 26


def figures(**changes):
    """What bench_tokenizers.py leaves of one row."""
    facts = {
        "positions": 400.25,
        "flop": 2.345e11,
        "parameters": 31_240_000,
        "tokens": 95.6,
        "kind": "float32 x 512",
        "token_bytes": 195789.0,
    }
    info = {
        "row": "DOVE, engine",
        "size": "base",
        "dtype": "torch.float32",
        "images_per_second": 1.2345,
        "batch": 8,
        "ratio": 0.987,
        "share_of_ceiling": 0.804,
        "facts": {**facts, **changes.pop("facts", {})},
    }
    return {"name": "bench_tokenizer[base-DOVE, engine]", "extra_info": info | changes}


def write(path, *benchmarks):
    machine = {
        "device": "cpu",
        "processor": "a processor",
        "threads": 2,
        "cpu_capability": "AVX512",
        "versions": {"torch": "2.13", "diffusers": "0.36"},
    }
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": list(benchmarks)}), encoding="utf-8")
    return path


def test_table(tmp_path):
    encoder = figures(row="VQGAN, ours", facts={"positions": None})
    source = write(tmp_path / "figures.json", encoder, figures(), figures(size="small"))
    lines = table(*read(source)).splitlines()
    assert lines[0] == "a processor, 2 threads, AVX512; batches of 8, float32; torch 2.13, diffusers 0.36."
    assert lines[2] == "| " + " | ".join(HEAD) + " |"
    assert lines[3].count("|") == len(HEAD) + 1
    assert lines[4].startswith("| VQGAN, ours | 1.23 | 0.99 | 80 % | 96 | - | 234 | 31.2 M |")
    assert lines[5] == "| DOVE, engine | 1.23 | 0.99 | 80 % | 96 | 400 | 234 | 31.2 M | 195789 (float32 x 512) |"
    # The small sizes are not among the published ones.
    assert lines[6] == ""


def test_small_sizes_say_so(tmp_path):
    source = write(tmp_path / "figures.json", figures(size="small"))
    assert "these figures say nothing about the published models" in table(*read(source)).splitlines()[0]


def test_script_writes_a_file_and_refuses_other_figures(tmp_path):
    source, target = write(tmp_path / "figures.json", figures()), tmp_path / "table.md"
    subprocess.run([sys.executable, SCRIPT, source, target], check=True)
    assert target.read_text(encoding="utf-8").splitlines() == table(*read(source)).splitlines()
    other = write(tmp_path / "other.json", {"name": "bench_schedule", "extra_info": {}})
    with pytest.raises(SystemExit, match=r"holds no figures of bench_tokenizers\.py"):
        read(other)
