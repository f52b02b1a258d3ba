"""Trace the stages of `tokenize` and count what a block launches.

    python scripts/trace_stages.py OUTDIR [--device cuda] [--dtype bfloat16] [--batch 64] [--steps 32] [--cuda-graphs]

For the encoder, the prefix and one block of steps of the base model with random weights, OUTDIR gets a trace in
Chrome's format (chrome://tracing, or ui.perfetto.dev), and launches.md: on a GPU the kernels that each stage launches,
on a CPU torch's operators, how often and for how long; with --cuda-graphs the kernels that a graph launches by itself.
Every stage has run three times before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dove_fast import DOVE, DOVEConfig
from dove_fast.generation.batch import Batch, LengthRule

WARM_UP = 3
# Rows of the table; the rest is one line.
ROWS = 15


def record(stage: Callable[[], Any], device: torch.device, trace: Path) -> list[tuple[str, int, float]]:
    """Write a stage's trace, and return what it launched: name, count, microseconds in all, the longest first."""
    for _ in range(WARM_UP):
        stage()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        stage()
        if cuda:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(trace))
    found = []
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if on_device == cuda and microseconds > 0:
            found.append((event.key, event.count, microseconds))
    return sorted(found, key=lambda row: -row[2])


def table(name: str, launched: list[tuple[str, int, float]]) -> str:
    """Return a stage's launches as Markdown."""
    total = sum(microseconds for _, _, microseconds in launched)
    rest = launched[ROWS:]
    shown = launched[:ROWS]
    if rest:
        shown = [*shown, (f"{len(rest)} others", sum(row[1] for row in rest), sum(row[2] for row in rest))]
    lines = [f"## {name}: {sum(row[1] for row in launched)} launches, {total / 1e3:.2f} ms", ""]
    lines += ["| what | launches | ms | share |", "|---|---|---|---|"]
    for key, count, microseconds in shown:
        short = key.replace("|", "\\|")[:80]
        lines.append(
            f"| `{short}` | {count} | {microseconds / 1e3:.3f} | {100 * microseconds / max(total, 1e-9):.1f} % |"
        )
    return "\n".join([*lines, ""])


@torch.no_grad()
def main(arguments: argparse.Namespace) -> None:
    """Trace and write."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    config = DOVEConfig.base() if arguments.preset == "base" else DOVEConfig.tiny()
    model = DOVE(config).to(device, dtype).eval()
    model.generation.cuda_graphs = arguments.cuda_graphs
    images = torch.rand(arguments.batch, 3, config.image_size, config.image_size, device=device, dtype=dtype)
    none = [torch.empty(0, dtype=torch.int64)] * arguments.batch
    # EOS is decided, and never comes.
    rule = LengthRule(config.num_tokens, 1 - 1e-9)

    def encode() -> list[torch.Tensor]:
        return model.prefixes(model.encode_in_chunks(images), none)

    prefixes = encode()
    stages: dict[str, Callable[[Batch], Any]] = {
        "prefix": lambda batch: batch.admit(range(arguments.batch), prefixes),
        "block": lambda batch: batch.run(arguments.steps),
    }
    arguments.directory.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parts = [
        f"# Launches of each stage\n\n{name}, {arguments.dtype}, batch {arguments.batch}, blocks of {arguments.steps} "
        f"steps, CUDA graphs {'on' if arguments.cuda_graphs else 'off'}, torch {torch.__version__}.\n",
        table("encoder", record(encode, device, arguments.directory / "encoder.json")),
    ]
    for stage, run in stages.items():

        def once(stage: str = stage, run: Callable[[Batch], Any] = run) -> None:
            with model.generation.batch(
                model.generator, model.eos_head, arguments.batch, config.num_features, rule
            ) as batch:
                if stage == "block":
                    batch.place(range(arguments.batch), [config.num_features] * arguments.batch)
                run(batch)

        parts.append(table(stage, record(once, device, arguments.directory / f"{stage}.json")))
    (arguments.directory / "launches.md").write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="OUTDIR", help="where the traces and the table go")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--preset", default="base", choices=["base", "tiny"])
    parser.add_argument("--cuda-graphs", action="store_true")
    main(parser.parse_args())
