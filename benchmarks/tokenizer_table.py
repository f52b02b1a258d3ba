"""Write what bench_tokenizers.py measured as a table in Markdown.

    pytest benchmarks/bench_tokenizers.py --benchmark-only --batch 8 --benchmark-json=figures.json
    python benchmarks/tokenizer_table.py figures.json table.md

Without a second path it is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dove_fast.atomic import replacing

HEAD = ("tokenizer", "images/s", "x VQGAN", "of peak", "tokens", "positions", "GFLOP", "weights", "bytes of tokens")
NOTES = """\
- Images to tokens; nobody decodes, unless it has to in order to know a length. All weights are random, and DOVE's
  lengths are imposed. The engine's schedule is given the distribution that they are drawn from, and measured costs.
  The VQGAN's rows give features and no tokens yet.
- x VQGAN: how many times as fast as diffusers' `VQModel.encode` as it comes, timed in turn with it. The first row is
  that encoder against itself and shows the noise.
- Of peak: GFLOP a second, as a share of what the best matrix product reached in the same run.
- Tokens, positions, GFLOP and bytes are means an image. Positions: what transformers compute, every pass counted; they
  differ in width and depth. GFLOP: products, convolutions and attention of the call, two a multiply-add. Weights: those
  that the call reads. Bytes: vectors as they come, codes at their bits; a vector says more than a code.
- TiTok and ALIT are shapes: their published sizes and structure in plain torch, not their authors' programs. Nothing
  here is about the quality of their tokens or ours. On a CPU the engine's linear layers run on weights that oneDNN
  laid out once; theirs are plain `nn.Linear`. ALIT decodes its tokens after each rollout but the last, for its
  masks; with "lengths chosen" after every one, to pixels, and it stops an image at DOVE's length in whole rollouts.
"""


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return `rows_of` what a file holds. Raises `SystemExit` where it has no such rows."""
    rows, machine = rows_of(json.loads(path.read_text(encoding="utf-8")))
    if not rows:
        raise SystemExit(f"{path} holds no figures of bench_tokenizers.py; run that first")
    return rows, machine


def rows_of(content: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a run's rows, those of the published sizes where it has them, and the machine they were measured on."""
    found = [benchmark["extra_info"] for benchmark in content["benchmarks"] if "facts" in benchmark["extra_info"]]
    size = "base" if any(row["size"] == "base" for row in found) else "small"
    return [row for row in found if row["size"] == size], content["machine_info"]


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Return the table with what it was measured on above it and what the columns mean below."""
    cells = [HEAD, *map(line, rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|---|" + "---:|" * (len(HEAD) - 1))
    return "\n".join([measured_on(rows, machine), "", *lines, "", NOTES])


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row's cells."""
    facts = row["facts"]
    return (
        row["row"],
        f"{row['images_per_second']:.3g}",
        f"{row['ratio']:.2f}",
        f"{100 * row['share_of_ceiling']:.0f} %",
        f"{facts['tokens']:.0f}",
        "-" if facts["positions"] is None else f"{facts['positions']:.0f}",
        f"{facts['flop'] / 1e9:.3g}",
        f"{facts['parameters'] / 1e6:.1f} M",
        f"{facts['token_bytes']:.0f} ({facts['kind']})",
    )


def measured_on(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Return a sentence on the machine, the batch and the dtype."""
    first = rows[0]
    device = machine["device"]
    if device == "cpu":
        device = f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}"
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "diffusers"))
    text = f"{device}; batches of {first['batch']}, {first['dtype'].removeprefix('torch.')}; {versions}."
    if first["size"] == "small":
        text += " **Small sizes, to see that everything runs: these figures say nothing about the published models.**"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("target", type=Path, nargs="?", help="the Markdown file to write; the terminal otherwise")
    arguments = parser.parse_args()
    text = table(*read(arguments.source))
    if arguments.target is None:
        print(text)
    else:
        with replacing(arguments.target) as file:
            file.write(text.encode())
