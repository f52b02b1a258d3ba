"""DOVE's tokens as torch's nested tensors: a transformer layer over rows of different lengths, without padding.

    pip install dove-fast
    python nested_tensors.py

`RaggedTokens.to_nested` shares the memory; torch's Linear, LayerNorm and attention then work on the jagged rows.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dove_fast import DOVE, RaggedTokens
from dove_fast.data import ShortSideCenterCrop, load_image

PHOTOS = Path(__file__).parents[1] / "photos"


class Layer(nn.Module):
    """A plain pre-norm transformer layer: (B, j, d) -> (B, j, d), for padded and for jagged j alike."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # Three layers and not one that is split: torch's jagged attention needs rows that lie side by side.
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Let every token attend to all of its own image."""
        normal = self.norm1(x)
        q, k, v = (
            part(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


def main() -> float:
    """Run the layer over all photographs at once and one by one; return the largest relative difference."""
    torch.manual_seed(0)
    model = DOVE.from_pretrained("tiny")
    crop = ShortSideCenterCrop(model.config.image_size)
    photos = torch.stack(
        [torch.from_numpy(load_image(str(path), crop).pixels) for path in sorted(PHOTOS.glob("*.jpg"))]
    )
    tokens = model.tokenize(photos)
    layer = Layer(tokens.values.shape[1], heads=4)
    with torch.no_grad():
        states = RaggedTokens.from_nested(layer(tokens.to_nested()))
        alone = [layer(row[None])[0] for row in tokens]
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(states, alone, strict=True))
    # A mean a row, for pooling: of the jagged dimension.
    pooled = states.to_nested().mean(dim=1)
    print(f"{tokens}")
    print(f"largest relative difference, jagged or row by row: {difference:.1e}")
    print(f"pooled: {tuple(pooled.shape)}")
    return difference


if __name__ == "__main__":
    main()
