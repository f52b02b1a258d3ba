"""The named transform from an image of any size to the model's square; its name and version are in every manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dove_fast.data.decode import BACKGROUND

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ShortSideCenterCrop"]


@dataclass(frozen=True)
class ShortSideCenterCrop:
    """Resize the short side to `size` with antialiased bicubic interpolation and keep the centred square.

    A new way of computing it gets a new version: stores of different versions do not mix.
    """

    size: int

    name = "short-side-bicubic-center-crop/1"

    def to_dict(self) -> dict[str, Any]:
        """Return the name and all that decides the pixels, for a manifest."""
        return {
            "name": self.name,
            "size": self.size,
            "resample": "bicubic, antialiased",
            "crop": "centred square of the short side, at a whole pixel, rounded down",
            "orientation": "exif",
            "background": list(BACKGROUND),
        }

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB image as uint8 (3, size, size); an image of that size comes back unchanged."""
        from PIL.Image import Resampling

        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # One call: resizing the whole image first would blow a 10 x 100000 strip up to gigabytes.
        square = image.resize((self.size, self.size), Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
