"""Draw the curves of training runs: `python curves.py OUT.svg RUN ..`, a row for the log.jsonl of each directory."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot

from dove_fast.training.log import read_log

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "dove_fast"

QUARTILES = ("length_q1", "length_median", "length_q3")


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the training error, the held-out PSNR, and the held-out lengths of each run."""
    figure, rows = pyplot.subplots(len(runs), 3, figsize=(10, 2.4 * len(runs)), layout="constrained", squeeze=False)
    for (error, quality, lengths), path in zip(rows, runs, strict=True):
        log = read_log(path)
        steps, held_out = ([line for line in log if line["kind"] == kind] for kind in ("train", "validation"))
        error.plot([line["step"] for line in steps], [line["mse"] for line in steps], linewidth=0.8)
        error.set_yscale("log")
        error.set_ylabel(f"{path.name}: mse")
        at = [line["step"] for line in held_out]
        quality.plot(at, [line["psnr"] for line in held_out], marker=".")
        quality.set_ylabel("held-out PSNR, dB")
        if held_out and QUARTILES[0] in held_out[0]:
            low, middle, high = ([line[name] for line in held_out] for name in QUARTILES)
            lengths.fill_between(at, low, high, alpha=0.3)
            lengths.plot(at, middle, marker=".")
            lengths.set_ylabel("tokens: quartiles")
        else:
            lengths.set_axis_off()
        for axes in (error, quality, lengths):
            axes.set_xlabel("step")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    draw(arguments.out, arguments.runs)


if __name__ == "__main__":
    main()
