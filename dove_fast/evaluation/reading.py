"""What an evaluation reads: images in batches, by the readers and the transform of `dove-fast tokenize`; and regions.

Shape suffixes: B images of S pixels a side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dove_fast.config import DOVEConfig
from dove_fast.data import Sample, Samples, Source, Transform, Unusable, load_image
from dove_fast.evaluation.regions import centred_region, text_ids
from dove_fast.failures import JobError
from dove_fast.store.records import InputError
from dove_fast.text import TextTokenizer
from dove_fast.words import counted

__all__ = ["RegionBatch", "SetAside", "image_batches", "region_batches"]


class SetAside:
    """The inputs that could not be read; one beyond `most` stops the evaluation with `JobError`.

    on_error: called with each of them, before that.
    """

    def __init__(self, most: int | None, on_error: Callable[[InputError], None] | None = None) -> None:
        self.errors: list[InputError] = []
        self._most, self._on_error = most, on_error

    def add(self, error: InputError) -> None:
        """Set one aside."""
        self.errors.append(error)
        if self._on_error is not None:
            self._on_error(error)
        if self._most is not None and len(self.errors) > self._most:
            raise JobError(
                f"more than {counted(self._most, 'input')} could not be read (--max-errors), the last one "
                f"{error.key!r}: {error.reason}"
            )


def image_batches(
    source: Source, transform: Transform, batch_size: int, *, most: int | None, set_aside: SetAside
) -> Generator[Tensor, None, None]:
    """Yield images in input order, uint8 (B, 3, S, S); the first `most` that can be read, None for all.

    Raises `OSError` where the medium fails, `JobError` for too many that cannot be read.
    """
    batch: list[Tensor] = []
    for count, pixels in enumerate(_images(source, transform, set_aside), start=1):
        batch.append(pixels)
        if len(batch) == batch_size or count == most:
            yield torch.stack(batch)
            batch = []
        if count == most:
            return
    if batch:
        yield torch.stack(batch)


def _images(source: Source, transform: Transform, set_aside: SetAside) -> Iterator[Tensor]:
    for unit in range(source.units):
        for item in source.read(unit):
            if isinstance(item, Unusable):
                set_aside.add(InputError(item.key, item.source, item.reason))
                continue
            loaded = load_image(item.content, transform)
            if isinstance(loaded, str):
                set_aside.add(InputError(item.key, item.source, loaded))
            else:
                yield torch.from_numpy(loaded.pixels)


@dataclass(frozen=True, eq=False)
class RegionBatch:
    """Images (B, 3, S, S) uint8, the token ids of their texts, and the regions (B, 1, S, S) bool that these ask for."""

    images: Tensor
    queries: list[Tensor]
    mask: Tensor


def region_batches(
    samples: Samples,
    tokenizer: TextTokenizer,
    config: DOVEConfig,
    batch_size: int,
    *,
    most: int | None,
    set_aside: Counter[str],
) -> Generator[RegionBatch, None, None]:
    """Yield the samples that have a text and a region which is not the whole picture, the first `most` of them.

    Pictures go through `ShortSideCenterCrop`. What cannot be used is counted in `set_aside`, by reason.
    Raises `OSError` where the medium fails.
    """
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    count = 0
    for index in range(len(samples)):
        if count == most:
            break
        found = _region(samples[index], tokenizer, config)
        if isinstance(found, str):
            set_aside[found] += 1
            continue
        rows.append(found)
        count += 1
        if len(rows) == batch_size:
            yield _batch(rows)
            rows = []
    if rows:
        yield _batch(rows)


def _batch(rows: list[tuple[Tensor, Tensor, Tensor]]) -> RegionBatch:
    images, queries, masks = zip(*rows, strict=True)
    return RegionBatch(torch.stack(images), list(queries), torch.stack(masks))


def _region(sample: Sample, tokenizer: TextTokenizer, config: DOVEConfig) -> tuple[Tensor, Tensor, Tensor] | str:
    """Return image, ids and mask of a sample, or why it cannot be used."""
    if not sample.text or not sample.boxes:
        return "no text, or no region"
    ids = text_ids(sample.text, config, tokenizer)
    if isinstance(ids, str):
        return ids
    region = centred_region(sample, config.image_size)
    if isinstance(region, str):
        return region
    if bool(region.mask.all()):
        return "the region is the whole picture"
    return region.pixels, ids, region.mask
