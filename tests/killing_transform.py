"""Transforms for the decoding processes: one that ends the process or takes its time, and some that do not arrive."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# Widths that stand for what happens to the picture.
KILLS, KILLS_ONCE, WAITS, RAISES = 13, 14, 15, 16


@dataclass(frozen=True)
class KillingTransform:
    """Makes 8 x 8 squares, and ends the process at a picture of width `KILLS`; at `KILLS_ONCE` only the first time.

    `folder` keeps what has happened: a file for each picture of width `WAITS` that was begun, and waits until there is
    one called "go".
    """

    folder: str
    least_side: int | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        folder = Path(self.folder)
        if image.width == KILLS or (image.width == KILLS_ONCE and not (folder / "killed").exists()):
            (folder / "killed").touch()
            os._exit(9)
        if image.width == WAITS:
            (folder / f"waits-{os.getpid()}").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        if image.width == RAISES:
            raise ValueError("this transform does not like it")
        return np.array(image.resize((8, 8)))


class UnsendableTransform(KillingTransform):
    """One that pickle refuses here."""

    def __reduce__(self):
        raise TypeError("cannot be sent")


class EndsWhereItArrives(KillingTransform):
    """One that ends the process that it is sent to, before that is ready."""

    def __reduce__(self):
        return os._exit, (7,)
