"""Measure the tiny model on held-out crops: `python report.py CHECKPOINT SHARDS OUT` writes figures and pictures.

OUT/report.json: how lengths follow complexity, their spread, PSNR by number of tokens, and what a text changes.
OUT/lengths.svg: length against complexity. OUT/strip.png: pictures at growing numbers of tokens, then themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dove_fast import DOVE
from dove_fast.data import WebDataset
from dove_fast.data.crop import RandomCrop
from dove_fast.evaluation import GroundingMeter, QualityMeter
from dove_fast.evaluation.lengths import prefixes
from dove_fast.evaluation.plots import draw_complexity
from dove_fast.evaluation.results import FIXED
from dove_fast.training.batches import Batches
from dove_fast.training.log import picture_grid

IMAGES, BATCH, SEED = 2048, 64, 0
LENGTHS = (1, 2, 4, 8, 16, 32, 48, 64)
STRIP = 8
# No caption has more words.
LONGEST_QUERY = 16


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
    meter = GroundingMeter(model, lengths=LENGTHS)
    for batch in batches.ahead(range(IMAGES // BATCH), workers=1):
        assert batch.mask is not None
        meter.add(batch.images, batch.queries, batch.mask)
    found = meter.result()
    mean_lengths = {True: found.length_with_text, False: found.length_without}
    return {
        name: {
            "mean_length": mean_lengths[with_text],
            "region_psnr_by_length": {
                int(row.tokens): row.psnr_inside
                for row in found.rows
                if row.kind == FIXED and row.with_text == with_text
            },
        }
        for name, with_text in (("with_text", True), ("without", False))
    }


def measure(model: DOVE, images: Tensor) -> tuple[dict[str, object], QualityMeter]:
    """Return the figures, and the meter that they come from."""
    meter = QualityMeter(model, lengths=LENGTHS)
    for rows in images.split(BATCH):
        meter.add(rows)
    found, complexity = meter.adaptive_lengths, meter.complexities
    flat = torch.stack([torch.full((3, *images.shape[2:]), shade, dtype=torch.uint8) for shade in range(0, 256, 17)])
    complex_tenth = found[complexity.argsort(descending=True)[: len(found) // 10]].double().mean()
    quartiles = found.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    rows = meter.rows()
    figures: dict[str, object] = {
        "images": len(images),
        "most_tokens": model.config.num_tokens,
        "mean_length": float(found.double().mean()),
        "length_quartiles": quartiles,
        "rank_correlation": meter.complexity().rank_correlation,
        "flat_length": float(model.tokenize(flat).lengths.double().mean()),
        "most_complex_tenth_length": float(complex_tenth),
        "psnr": rows[-1].psnr.mean,
        "psnr_by_length": {int(row.tokens): row.psnr.mean for row in rows if row.kind == FIXED},
    }
    return figures, meter


def at_lengths(model: DOVE, images: Tensor) -> Iterator[Tensor]:
    """Yield the pictures that each of LENGTHS makes."""
    tokens, _ = model.tokenize(images, length=max(LENGTHS)).to_padded()
    for length in LENGTHS:
        yield model.decode(prefixes(tokens, length))


def strip(model: DOVE, images: Tensor, complexity: Tensor) -> Tensor:
    """Draw STRIP images from simple to complex, a row each number of tokens, the originals last."""
    order = complexity.argsort()[torch.linspace(0, len(images) - 1, STRIP).long()]
    chosen = images[order]
    return picture_grid([*at_lengths(model, chosen), chosen.float() / 255])


def main() -> None:
    """Read the arguments, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("shards", help="the directory with the held-out shards")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = DOVE.from_pretrained(arguments.checkpoint)
    images = held_out(arguments.shards, model.config.image_size)
    figures, meter = measure(model, images)
    if model.tokenizer is not None:
        figures["texts"] = measure_texts(model, arguments.shards)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw_complexity(arguments.out / "lengths.svg", meter.complexity(), len(images))
    pixels = strip(model, images, meter.complexities)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(arguments.out / "strip.png")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
