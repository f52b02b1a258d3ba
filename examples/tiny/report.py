"""Measure the tiny model on held-out crops: `python report.py CHECKPOINT SHARDS OUT` writes figures and pictures.

OUT/report.json: how lengths follow complexity, their spread, PSNR by number of tokens. OUT/lengths.svg: length against
complexity. OUT/strip.png: reconstructions at growing numbers of tokens, the original last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dove_fast import DOVE
from dove_fast.data import WebDataset
from dove_fast.data.crop import RandomCrop
from dove_fast.evaluation import laplacian_variance, rank_correlation
from dove_fast.training.batches import Batches
from dove_fast.training.log import picture_grid

IMAGES, BATCH, SEED = 2048, 64, 0
LENGTHS = (1, 2, 4, 8, 16, 32, 48, 64)
STRIP = 8


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return each image's peak signal-to-noise ratio in dB, (B,)."""
    mse = (images - reconstructions.clamp(0, 1)).square().mean(dim=(1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def held_out(shards: str, size: int) -> Tensor:
    """Return the held-out crops, (IMAGES, 3, size, size) uint8: the same ones every time."""
    batches = Batches(
        WebDataset(shards), size=size, batch_size=BATCH, crop=RandomCrop(2 / 3), seed=SEED, text_dropout=1
    )
    return torch.cat([batch.images for batch in batches.ahead(range(IMAGES // BATCH), workers=1)])


def measure(model: DOVE, images: Tensor) -> tuple[dict[str, object], Tensor, Tensor]:
    """Return the figures, and each image's length and complexity."""
    most = model.config.num_tokens
    lengths, at_length, by_eos = [], {length: [] for length in LENGTHS}, []
    for rows in images.split(BATCH):
        pixels = rows.float() / 255
        made, tokens = model.reconstruct(rows)
        lengths.append(tokens.lengths)
        by_eos.append(psnr(pixels, made))
        for length in LENGTHS:
            at_length[length].append(psnr(pixels, model.reconstruct(rows, length=length)[0]))
    found, complexity = torch.cat(lengths), laplacian_variance(images)
    flat = torch.stack([torch.full((3, *images.shape[2:]), shade, dtype=torch.uint8) for shade in range(0, 256, 17)])
    flat_length = float(model.tokenize(flat).lengths.double().mean())
    complex_tenth = found[complexity.argsort(descending=True)[: len(found) // 10]].double().mean()
    quartiles = found.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    figures: dict[str, object] = {
        "images": len(images),
        "most_tokens": most,
        "mean_length": float(found.double().mean()),
        "length_quartiles": quartiles,
        "rank_correlation": rank_correlation(found.double(), complexity.double()),
        "flat_length": flat_length,
        "most_complex_tenth_length": float(complex_tenth),
        "psnr": float(torch.cat(by_eos).mean()),
        "psnr_by_length": {length: float(torch.cat(rows).mean()) for length, rows in at_length.items()},
    }
    return figures, found, complexity


def strip(model: DOVE, images: Tensor, complexity: Tensor) -> Tensor:
    """Draw STRIP images from simple to complex, a row each number of tokens, the originals last."""
    order = complexity.argsort()[torch.linspace(0, len(images) - 1, STRIP).long()]
    chosen = images[order]
    rows = [model.reconstruct(chosen, length=length)[0] for length in LENGTHS]
    return picture_grid([*rows, chosen.float() / 255])


def scatter(path: Path, lengths: Tensor, complexity: Tensor) -> None:
    """Draw length against complexity."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "dove_fast"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    # Rasterised: thousands of points as outlines are a large file.
    axes.scatter(complexity.clamp(min=1e-2), lengths, s=4, alpha=0.4, rasterized=True)
    axes.set_xscale("log")
    axes.set_xlabel("complexity: variance of the Laplacian")
    axes.set_ylabel("tokens")
    figure.savefig(path, metadata={"Date": None}, dpi=150)


def main() -> None:
    """Read the arguments, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("shards", help="the directory with the held-out shards")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = DOVE.from_pretrained(arguments.checkpoint)
    images = held_out(arguments.shards, model.config.image_size)
    figures, lengths, complexity = measure(model, images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    scatter(arguments.out / "lengths.svg", lengths, complexity)
    pixels = strip(model, images, complexity)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(arguments.out / "strip.png")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
