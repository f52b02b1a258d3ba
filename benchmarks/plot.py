"""Draw the generator's time against mean length and against batch size, ours and the rival's, from a benchmark's JSON.

    pytest benchmarks/bench_generator.py --benchmark-only --benchmark-json=figures.json
    python benchmarks/plot.py figures.json docs/figures/generator.svg

Needs matplotlib (`pip install '.[bench]'`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# The curves of both panels: one batch size, one mean length.
BATCH, MEAN = 8, 96
OURS, RIVAL = "#0b6e99", "#b0483a"


def read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the schedule's figures against upstream, and what they were measured on."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        benchmark["extra_info"]
        for benchmark in data["benchmarks"]
        if benchmark["name"].startswith("bench_schedule_against_upstream")
        and benchmark["extra_info"]["distribution"] == "gamma"
    ]
    if not rows:
        raise SystemExit(f"{path} holds no figures of bench_schedule_against_upstream; run bench_generator.py first")
    machine = data["machine_info"]
    device = machine["device"]
    if device == "cpu":
        device = f"{machine['threads']} threads, {machine['cpu_capability']}"
    return rows, f"{device}, torch {machine['versions']['torch']}"


def panel(axes: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    """Draw milliseconds an image against rows[key], with the ratio at each point."""
    rows = sorted(rows, key=lambda row: row[key])
    x = [row[key] for row in rows]
    ours = [1e3 / row["images_per_second"] for row in rows]
    theirs = [1e3 / row["rival_images_per_second"] for row in rows]
    axes.plot(x, theirs, "o--", color=RIVAL, label="transformers, one pass over all positions")
    axes.plot(x, ours, "o-", color=OURS, label="dove_fast, blocks by the schedule")
    for at, time, row in zip(x, ours, rows, strict=True):
        axes.annotate(f"{row['ratio']:.2f}x", (at, time), textcoords="offset points", xytext=(0, -14), ha="center")
    axes.set_xlabel(label)
    axes.set_ylabel("milliseconds an image")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)


def draw(source: Path, target: Path) -> None:
    """Read figures and write the picture (SVG)."""
    rows, machine = read(source)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    panel(left, [row for row in rows if row["batch_size"] == BATCH], "mean_length", f"mean length, batch of {BATCH}")
    panel(right, [row for row in rows if row["asked_mean"] == MEAN], "batch_size", f"batch size, mean length {MEAN}")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(lambda x, position: f"{x:g}")
    left.legend(loc="lower right")
    figure.suptitle(f"The generator, base model ({machine})", fontsize=11)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file.
    figure.savefig(target, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("target", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    draw(arguments.source, arguments.target)
