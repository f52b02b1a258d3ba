"""A transform that takes its time; in a module of its own, which decoding processes can import."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dove_fast.data import ShortSideCenterCrop


@dataclass(frozen=True)
class WaitingTransform(ShortSideCenterCrop):
    """Takes 20 ms an image, computing (`busy`) or waiting, as for a slow disk."""

    size: int = 16
    busy: bool = False

    def __call__(self, image):
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            if not self.busy:
                time.sleep(0.02)
        return super().__call__(image)
