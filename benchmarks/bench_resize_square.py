"""The resize kernel against Pillow's own, whose pixels it gives.

pytest benchmarks/bench_resize_square.py --benchmark-only --benchmark-json=figures.json
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dove_fast import native
from dove_fast.data.resize import resize_square


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (500, 375), (1024, 768)])
def bench_resize_square(compare, width, height, size) -> None:
    """An image's central square; both give (3, size, size) in C order, as what follows takes it."""
    if native.without_torch() is None:
        pytest.skip("no native module: both sides would be Pillow")
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    left, top = (width - height) // 2, 0

    def ours() -> np.ndarray:
        return resize_square(image, left, top, height, size)

    def pillow() -> np.ndarray:
        box = (left, top, left + height, top + height)
        square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.array(np.asarray(square).transpose(2, 0, 1), order="C")

    assert np.array_equal(ours(), pillow())
    compare(ours, pillow, rival_name="Pillow", moved=values.nbytes + 3 * size * size)
