"""Which images of a data set are shown: some from simple to complex, and some with a text and the region it names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dove_fast.data import EncodedImage, Loaded, ShortSideCenterCrop, Unusable, load_image, open_source
from dove_fast.data.samples import Sample, Samples
from dove_fast.data.sources import Source
from dove_fast.evaluation.complexity import laplacian_variance
from dove_fast.evaluation.regions import centred_region
from dove_fast.store.records import InputError

__all__ = ["LOOKED_AT", "ShownImages", "ShownRegion", "choose_images", "choose_regions"]

# Images whose complexity is measured to choose from.
LOOKED_AT = 256
# Regions that are looked at for each that is shown, and the largest share of a picture that one may be: a box around
# everything shows nothing.
TRIES, LARGEST_SHARE = 32, 0.5

# How many images have been looked at, and of how many at most.
OnImage = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class ShownImages:
    """Images from simple to complex.

    keys: n names. pixels: (n, 3, S, S) uint8. complexity: (n,) fp32, by `laplacian_variance`. looked_at: how many were
    chosen from. errors: inputs among them that could not be used, which `looked_at` does not count.
    """

    keys: tuple[str, ...]
    pixels: Tensor
    complexity: Tensor
    looked_at: int
    errors: tuple[InputError, ...] = ()


@dataclass(frozen=True, eq=False)
class ShownRegion:
    """A picture with a text and the region that it names.

    pixels: (3, S, S) uint8. boxes: left, top, right, bottom in its pixels. mask: (1, S, S) bool, their union.
    """

    key: str
    text: str
    pixels: Tensor
    boxes: tuple[tuple[int, int, int, int], ...]
    mask: Tensor


def choose_images(
    data: str | os.PathLike[str], size: int, count: int, *, on_image: OnImage | None = None
) -> ShownImages:
    """Look at up to `LOOKED_AT` images of what `open_source` opens, as many from each unit, and choose `count` of them.

    They are as evenly spread as their ranks by complexity allow, the simplest and the most complex among them; all
    where there are no more. Every image is cropped to its centred square of `size` pixels.
    Raises what `open_source` raises, `ValueError` where no image can be used or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    transform = ShortSideCenterCrop(size)
    source = open_source(data)
    keys: list[str] = []
    pixels: list[Tensor] = []
    errors: list[InputError] = []
    for item in _some_inputs(source, LOOKED_AT):
        found: Loaded | str = item.reason if isinstance(item, Unusable) else load_image(item.content, transform)
        if isinstance(found, str):
            errors.append(InputError(item.key, item.source, found))
            continue
        keys.append(item.key)
        pixels.append(torch.from_numpy(found.pixels))
        if on_image is not None:
            on_image(len(keys), min(LOOKED_AT, source.inputs or LOOKED_AT))
    if not pixels:
        reason = f", the first one for: {errors[0].reason}" if errors else ""
        raise ValueError(f"{os.fspath(data)}: no image could be read{reason}")
    images = torch.stack(pixels)
    complexity = laplacian_variance(images)
    places = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
    order = complexity.argsort(stable=True)[places]
    shown = tuple(keys[index] for index in order.tolist())
    return ShownImages(shown, images[order], laplacian_variance(images[order]), len(images), tuple(errors))


def _some_inputs(source: Source, most: int) -> Iterator[EncodedImage | Unusable]:
    """Yield up to `most` inputs: as many of each unit, from its start, of units that are evenly spread."""
    count = min(source.units, most)
    for place in range(count):
        share = most * (place + 1) // count - most * place // count
        yield from islice(source.read(source.units * place // count), share)


def choose_regions(samples: Samples, size: int, count: int, *, readable: Callable[[str], bool]) -> list[ShownRegion]:
    """Choose up to `count` samples with a text and boxes, each of another picture, evenly spread over the data.

    A sample is passed over where the centred square of `size` pixels cuts one of its boxes away, where its region is
    more than `LARGEST_SHARE` of the picture, where the picture cannot be read, or where `readable` refuses its text.
    Raises `OSError` where the medium fails.
    """
    chosen: list[ShownRegion] = []
    seen: set[str] = set()
    tries = min(len(samples), count * TRIES)
    for place in range(tries):
        sample = samples[len(samples) * place // tries]
        # As many of each part of the data: a place is made up for later, never before.
        if len(chosen) > count * place // tries or sample.picture.key in seen:
            continue
        found = _region(sample, size) if sample.text and sample.boxes and readable(sample.text) else None
        if found is not None:
            seen.add(found.key)
            chosen.append(found)
    return chosen


def _region(sample: Sample, size: int) -> ShownRegion | None:
    region = centred_region(sample, size)
    if isinstance(region, str) or float(region.mask.float().mean()) > LARGEST_SHARE:
        return None
    return ShownRegion(sample.picture.key, sample.text, region.pixels, region.boxes, region.mask)
