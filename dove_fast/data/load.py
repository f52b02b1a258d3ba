"""From one input to one tensor, with failure as a value: what the loading threads run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dove_fast.data.decode import DecodeError, decode_image
from dove_fast.data.listing import ImageInput

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Loaded", "SetAside", "load_image"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A transformed image, uint8 (3, S, S), with the upright original's size."""

    input: ImageInput
    pixels: Tensor
    width: int
    height: int


@dataclass(frozen=True)
class SetAside:
    """An input that cannot be used, and why."""

    input: ImageInput
    reason: str


def load_image(item: ImageInput, transform: Callable[[Image.Image], Tensor]) -> Loaded | SetAside:
    """Decode and transform one input; what is wrong with it comes back as `SetAside`."""
    try:
        decoded = decode_image(item.path)
        return Loaded(item, transform(decoded.image), decoded.width, decoded.height)
    except DecodeError as error:
        return SetAside(item, str(error))
