"""A folder of small pictures with varied contents, and ways to add bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def make_pictures(folder: Path, count: int = 10) -> Path:
    """Write `count` pictures of different sizes, contrasts and formats, in two folders."""
    random = np.random.default_rng(0)
    for index in range(count):
        width, height = 20 + 3 * index, 40 - 2 * index
        colours = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(colours).resize((width, height)))
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        share = index / count
        path = folder / ("deep" if index % 2 else ".") / f"{index:02d}.{'png' if index % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth * (1 - share) + noise * share).astype(np.uint8)).save(path)
    return folder


def add_bad(folder: Path) -> list[str]:
    """Add a truncated picture and a text that calls itself one; return their keys."""
    good = (folder / "00.jpg").read_bytes()
    (folder / "05-cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "deep/zz-text.png").write_text("hello")
    return ["05-cut.jpg", "deep/zz-text.png"]
