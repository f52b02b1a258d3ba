"""Numbers as pictures: features as colours by their principal components, weights as heat, and boxes drawn in.

Shape suffixes: B images of S pixels a side, N features on a grid of h x w, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Principal", "fit_principal", "heat_picture", "outline", "to_pixels"]

COMPONENTS = 3
# Of each component's values this share at either end is cut off, so that a few outliers do not grey out the rest.
TAIL = 0.01
# From cold to hot, in eight steps of matplotlib's "inferno": brighter is more, for the colour-blind and in print too.
HEAT = (
    *((0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99)),
    *((212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164)),
)
# How much of the grey picture shows through the heat.
SHOWS_THROUGH = 0.4
BOX_COLOURS = ((255, 255, 255), (220, 40, 40))


@dataclass(frozen=True, eq=False)
class Principal:
    """The first principal components of features: mean (d,), directions (3, d), the share of the variance of each (3,).

    low, high (3,): the components' values that become 0 and 1.
    """

    mean: Tensor
    directions: Tensor
    shares: Tensor
    low: Tensor
    high: Tensor

    def colours(self, states: Tensor) -> Tensor:
        """Return features (B, N, d) of a square grid as colours (B, 3, h, w) in [0, 1]: red is the first component."""
        values = (states.double() - self.mean) @ self.directions.T
        scaled = ((values - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)
        side = round(states.shape[1] ** 0.5)
        return scaled.transpose(1, 2).unflatten(2, (side, side)).float()


def fit_principal(states: Tensor) -> Principal:
    """Find the first three principal components of features (.., d), all positions of all images together, in fp64.

    A direction's sign is arbitrary; here its entry of the largest size is positive. Features that do not vary have
    components of no variance.
    Raises `ValueError` for fewer than two features, or fewer than three dimensions. Source: METHOD section 6,
    "emerging segmentation".
    """
    if states.shape[-1] < COMPONENTS:
        raise ValueError(f"features must have at least {COMPONENTS} dimensions, got {states.shape[-1]}")
    rows = states.flatten(0, -2).double()
    if len(rows) < 2:
        raise ValueError(f"at least two features are needed, got {len(rows)}")
    mean = rows.mean(dim=0)
    centred = rows - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / (len(rows) - 1))
    # Ascending, with the vectors as columns.
    directions = vectors.T.flip(0)[:COMPONENTS]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()
    values = centred @ directions.T
    ends = torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)
    low, high = values.quantile(ends, dim=0)
    total = variances.clamp(min=0).sum().clamp(min=1e-300)
    return Principal(mean, directions, variances.clamp(min=0).flip(0)[:COMPONENTS] / total, low, high)


def to_pixels(picture: Tensor, size: int | None = None) -> Tensor:
    """Return a picture (3, h, w) in [0, 1] as uint8 (3, size, size), each of its pixels a square; None keeps its size.

    A size that is no multiple of h rounds where the squares end.
    """
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return pixels if size is None else _enlarge(pixels, size)


def _enlarge(picture: Tensor, size: int) -> Tensor:
    rows = torch.arange(size) * picture.shape[-2] // size
    columns = torch.arange(size) * picture.shape[-1] // size
    return picture[..., rows[:, None], columns]


def heat_picture(pixels: Tensor, weights: Tensor) -> Tensor:
    """Lay weights (h, w), not negative, as heat over a picture: uint8 (3, S, S) both ways; the largest is the hottest.

    Only how weights compare within one picture can be seen.
    """
    share = weights.float().cpu() / weights.max().clamp(min=1e-12).cpu()
    table = torch.tensor(HEAT, dtype=torch.float32)
    place = share.clamp(0, 1) * (len(table) - 1)
    below = place.floor().long().clamp(max=len(table) - 2)
    part = (place - below)[..., None]
    colours = (table[below] * (1 - part) + table[below + 1] * part).permute(2, 0, 1)
    heat = _enlarge(colours, pixels.shape[-1])
    grey = pixels.float().mean(dim=0, keepdim=True).expand(3, -1, -1)
    return (heat * (1 - SHOWS_THROUGH) + grey * SHOWS_THROUGH).round().to(torch.uint8)


def outline(pixels: Tensor, boxes: Sequence[tuple[int, int, int, int]], scale: int = 1, width: int = 1) -> Tensor:
    """Draw boxes (left, top, right, bottom), in pixels, on a picture enlarged `scale` times: uint8 (3, S, S) both ways.

    A red line, `width` pixels of the result wide, lies inside of each box's edge and a white one inside of that, so
    that one of them stands out anywhere.
    """
    drawn = pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    for box in boxes:
        white, red = BOX_COLOURS
        for inset, colour in enumerate([red] * width + [white] * width):
            left, top, right, bottom = (edge * scale for edge in box)
            left, top, right, bottom = left + inset, top + inset, right - inset - 1, bottom - inset - 1
            if left > right or top > bottom:
                continue
            value = torch.tensor(colour, dtype=torch.uint8)[:, None]
            for y in (top, bottom):
                drawn[:, y, left : right + 1] = value
            for x in (left, right):
                drawn[:, top : bottom + 1, x] = value
    return drawn
