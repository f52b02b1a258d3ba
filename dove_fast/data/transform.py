"""The named transform from an image of any size to the model's square; its name and version are in every manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dove_fast.data.decode import BACKGROUND
from dove_fast.data.resize import resize_square

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ShortSideCenterCrop"]


# How much larger than the square a reduced JPEG is at least, so that what it lacks would have been filtered out.
REDUCED = 2


@dataclass(frozen=True)
class ShortSideCenterCrop:
    """Resize the short side to `size` with antialiased bicubic interpolation and keep the centred square.

    `reduced`: JPEGs may be decoded smaller, to `REDUCED` times `size` at least, by `decode_image`'s `least_side`:
    faster, and nearly the same pixels. A new way of computing it gets a new name or version: stores of different ones
    do not mix.
    """

    size: int
    reduced: bool = False

    @property
    def name(self) -> str:
        """The name and version, as manifests have it."""
        return f"short-side-bicubic-center-crop{'-reduced' if self.reduced else ''}/1"

    @property
    def least_side(self) -> int | None:
        """What `decode_image` may reduce a JPEG to."""
        return REDUCED * self.size if self.reduced else None

    def to_dict(self) -> dict[str, Any]:
        """Return the name and all that decides the pixels, for a manifest."""
        plain = {
            "name": self.name,
            "size": self.size,
            "resample": "bicubic, antialiased",
            "crop": "centred square of the short side, at a whole pixel, rounded down",
            "orientation": "exif",
            "background": list(BACKGROUND),
        }
        return {**plain, "least_side": self.least_side} if self.reduced else plain

    def __call__(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return an RGB image as uint8 (3, size, size); an image of that size comes back unchanged."""
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # At once: resizing the whole image first would blow a 10 x 100000 strip up to gigabytes.
        return resize_square(image, left, top, side, self.size)
