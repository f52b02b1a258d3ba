"""What a run writes for people: lines of JSON, figures for TensorBoard, and pictures."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dove_fast.atomic import replacing

__all__ = ["RunLog", "histogram_picture", "picture_grid", "read_log"]

LOG_NAME = "log.jsonl"
TENSORBOARD, PICTURES = "tensorboard", "pictures"

# Pixels between pictures, and the sizes of the histogram.
GAP, BAR, HISTOGRAM_HEIGHT = 2, 6, 120
BACKGROUND, FOREGROUND = 255, 64


class RunLog:
    """Appends to `log.jsonl`, and to TensorBoard's files where asked for.

    Opened for a run that goes on at `step`, it drops the lines of later steps, which will be written again, and a line
    that a killed run left half. Every line is flushed. Raises `ImportError` that names the extra where `tensorboard`
    needs it.
    """

    def __init__(self, output: Path, step: int, *, tensorboard: bool) -> None:
        self.output = output
        path = output / LOG_NAME
        kept = [line for line in read_log(output) if line["step"] <= step]
        with replacing(path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        self._board: Any = _summary_writer(output / TENSORBOARD, step) if tensorboard else None
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line: `kind`, "train" or "validation", after `step` steps, and its figures."""
        # JSON has no NaN.
        written = {name: None if _not_finite(value) else value for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **written}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not _not_finite(value):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, step: int, pixels: Tensor) -> None:
        """Write a picture (3, H, W) uint8 as `pictures/{name}-{step}.png`."""
        from PIL import Image

        folder = self.output / PICTURES
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"{name}-{step:09d}.png", durable=False) as file:
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        if self._board is not None:
            self._board.add_image(name, pixels, step)

    def sync(self) -> None:
        """Make the lines so far durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files; what a full disk refuses was refused before."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log up to one that was cut off or damaged; none where there is no log."""
    path = output / LOG_NAME
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            # After a power failure its end may be anything; what stood there is written again.
            break
    return lines


def picture_grid(rows: list[Tensor]) -> Tensor:
    """Lay pictures out: each tensor (n, 3, S, S) in [0, 1] is a row; the result is (3, H, W) uint8."""
    lines = []
    for row in rows:
        pixels = (row.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        lines.append(torch.cat([torch.nn.functional.pad(p, (0, GAP, 0, GAP), value=BACKGROUND) for p in pixels], dim=2))
    return torch.cat(lines, dim=1)


def histogram_picture(lengths: Tensor, most: int) -> Tensor:
    """Draw how many images got each number of tokens, 1 to `most`, as bars: (3, H, W) uint8."""
    counts = torch.bincount(lengths.cpu(), minlength=most + 1)[1:].numpy()
    heights = np.ceil(counts / max(int(counts.max()), 1) * HISTOGRAM_HEIGHT).astype(int)
    canvas = np.full((HISTOGRAM_HEIGHT, most * BAR), BACKGROUND, dtype=np.uint8)
    for bar, height in enumerate(heights):
        canvas[HISTOGRAM_HEIGHT - height :, bar * BAR : (bar + 1) * BAR - 1] = FOREGROUND
    return torch.from_numpy(canvas).expand(3, -1, -1).contiguous()


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _summary_writer(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("[report] tensorboard = true needs TensorBoard: pip install 'dove-fast[train]'") from None
    return SummaryWriter(str(directory), purge_step=step + 1)
