"""Measure the tiny model on held-out crops: `python report.py CHECKPOINT SHARDS OUT` writes figures and pictures.

OUT/report.json: how lengths follow complexity, their spread, PSNR by number of tokens, and what a text changes.
OUT/lengths.svg: length against complexity. OUT/strip.png: pictures at growing numbers of tokens, then themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot
from PIL import Image
from torch import Tensor

from dove_fast import DOVE, RaggedTokens
from dove_fast.data import WebDataset
from dove_fast.data.crop import RandomCrop
from dove_fast.evaluation import laplacian_variance, rank_correlation
from dove_fast.training.batches import Batches
from dove_fast.training.log import picture_grid

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "dove_fast"

IMAGES, BATCH, SEED = 2048, 64, 0
LENGTHS = (1, 2, 4, 8, 16, 32, 48, 64)
STRIP = 8
# No caption has more words.
LONGEST_QUERY = 16


def psnr(images: Tensor, made: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each image's peak signal-to-noise ratio in dB, (B,): of uint8 images, inside of mask (B, 1, S, S)."""
    errors = (images.float() / 255 - made.clamp(0, 1)).square().mean(dim=1, keepdim=True)
    inside = torch.ones_like(errors) if mask is None else mask
    mse = (errors * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def at_lengths(model: DOVE, images: Tensor, queries: list[Tensor] | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield LENGTHS, and the pictures that so many tokens of each image make."""
    tokens = model.tokenize(images, queries, length=max(LENGTHS))
    for length in LENGTHS:
        yield length, model.decode(RaggedTokens.from_rows([row[:length] for row in tokens]))


def held_out(shards: str, size: int) -> Tensor:
    """Return crops of the held-out ones, (IMAGES, 3, size, size) uint8: the same every time."""
    batches = Batches(
        WebDataset(shards), size=size, batch_size=BATCH, crop=RandomCrop(2 / 3), seed=SEED, text_dropout=1
    )
    return torch.cat([batch.images for batch in batches.ahead(range(IMAGES // BATCH), workers=1)])


def measure_texts(model: DOVE, shards: str) -> dict[str, object]:
    """Return the PSNR in dB inside the regions that texts name, by number of tokens, with the text and without it."""
    assert model.tokenizer is not None
    batches = Batches(
        WebDataset(shards),
        size=model.config.image_size,
        batch_size=BATCH,
        crop=RandomCrop(1.0),
        seed=SEED,
        tokenizer=model.tokenizer,
        longest_query=LONGEST_QUERY,
    )
    inside: dict[str, dict[int, list[Tensor]]] = {"with_text": {}, "without": {}}
    lengths: dict[str, list[Tensor]] = {"with_text": [], "without": []}
    for batch in batches.ahead(range(IMAGES // BATCH), workers=1):
        assert batch.mask is not None
        for name, queries in (("with_text", list(batch.queries)), ("without", None)):
            lengths[name].append(model.tokenize(batch.images, queries).lengths)
            for length, made in at_lengths(model, batch.images, queries):
                inside[name].setdefault(length, []).append(psnr(batch.images, made, batch.mask))
    return {
        name: {
            "mean_length": float(torch.cat(lengths[name]).double().mean()),
            "region_psnr_by_length": {length: float(torch.cat(rows).mean()) for length, rows in found.items()},
        }
        for name, found in inside.items()
    }


def measure(model: DOVE, images: Tensor) -> tuple[dict[str, object], Tensor, Tensor]:
    """Return the figures, and each image's length and complexity."""
    most = model.config.num_tokens
    lengths, at_length, by_eos = [], {length: [] for length in LENGTHS}, []
    for rows in images.split(BATCH):
        made, tokens = model.reconstruct(rows)
        lengths.append(tokens.lengths)
        by_eos.append(psnr(rows, made))
        for length, made in at_lengths(model, rows):
            at_length[length].append(psnr(rows, made))
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
    rows = [made for _, made in at_lengths(model, chosen)]
    return picture_grid([*rows, chosen.float() / 255])


def scatter(path: Path, lengths: Tensor, complexity: Tensor) -> None:
    """Draw length against complexity."""
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
    if model.tokenizer is not None:
        figures["texts"] = measure_texts(model, arguments.shards)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    scatter(arguments.out / "lengths.svg", lengths, complexity)
    pixels = strip(model, images, complexity)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(arguments.out / "strip.png")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
