"""A folder of pictures, or a list of their paths, as training data."""

from __future__ import annotations

import os

from dove_fast.data.listing import list_inputs
from dove_fast.data.samples import Picture, Sample

__all__ = ["ImageFolder"]


class ImageFolder:
    """Every picture that `list_inputs` finds, in its order, without texts.

    Raises what `list_inputs` raises.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self._inputs = list_inputs(source)
        self.left_out: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> Sample:
        item = self._inputs[index]
        return Sample(Picture(item.key, item.path))
