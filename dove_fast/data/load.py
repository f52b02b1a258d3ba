"""From one encoded image to one array, with failure as a value: what the decoding workers run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from dove_fast.data.decode import DecodeError, decode_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Loaded", "Transform", "load_image"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A transformed image, uint8 (3, S, S), with the upright original's size."""

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int


class Transform(Protocol):
    """From an RGB image to uint8 (3, S, S); `least_side` is what a JPEG may be reduced to before, None for nothing.

    An array and no tensor: a decoding process then need not import torch, which takes longer than a hundred images.
    """

    @property
    def least_side(self) -> int | None:
        """What `decode_image` takes."""
        ...

    def __call__(self, image: Image.Image, /) -> npt.NDArray[np.uint8]:
        """Transform one image."""
        ...


def load_image(content: str | bytes, transform: Transform) -> Loaded | str:
    """Decode and transform the file at a path, or an image's bytes; what is wrong with it comes back as a reason.

    Raises `OSError` where it is the file's medium that fails, as `decode_image` does.
    """
    try:
        decoded = decode_image(content, least_side=transform.least_side)
        return Loaded(transform(decoded.image), decoded.width, decoded.height)
    except DecodeError as error:
        return str(error)
