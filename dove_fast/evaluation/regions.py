"""Samples with a text and the region that it names, cut as `dove-fast tokenize` cuts a picture."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from dove_fast.config import DOVEConfig
from dove_fast.data import DecodeError, Sample, Samples, ShortSideCenterCrop, Source, WebDataset, decode_image
from dove_fast.data.crop import Crop, crop_boxes, region_mask

# What a text names, by the rules of `open_source`, which the package has no public list of.
from dove_fast.data.sources import PIPE, list_shards
from dove_fast.data.urls import URL
from dove_fast.models.inputs import check_queries
from dove_fast.text import TextTokenizer

__all__ = ["CutRegion", "centred_region", "check_tokenizer", "has_regions", "open_regions", "text_ids"]

FROM_STREAMS = "regions are read from shards that lie here, not from pipes and URLs"


def has_regions(source: Source) -> bool:
    """Tell whether a source is of the kind that may have texts and boxes: WebDataset shards."""
    return bool(source.to_dict()["kind"] == "webdataset")


def open_regions(data: str | os.PathLike[str]) -> Samples | str:
    """Return the samples of WebDataset shards, however `open_source` lets them be named, or why there are none.

    Reads the shards' headers. Raises `OSError` where the medium fails.
    """
    shards = list_shards(os.fspath(data)) or []
    if any(shard.startswith(PIPE) or URL.match(shard) for shard in shards):
        return FROM_STREAMS
    try:
        return WebDataset(shards)
    except (ValueError, FileNotFoundError) as error:
        # Shards that are damaged: their images up to the damage can be read, their regions cannot.
        return str(error)


def check_tokenizer(tokenizer: TextTokenizer) -> None:
    """Use a tokenizer once, before the work: raises `ImportError` and `CheckpointError` as its `encode` does."""
    # A word that it does not know says nothing against it.
    with contextlib.suppress(ValueError):
        tokenizer.encode("a")


def text_ids(text: str, config: DOVEConfig, tokenizer: TextTokenizer) -> Tensor | str:
    """Return the token ids of a text, int64, or why the generator cannot read it."""
    try:
        ids = tokenizer.encode(text)
    except ValueError:
        return "a text that the tokenizer cannot encode"
    if not len(ids):
        return "a text without tokens"
    if int(ids.max()) >= config.generator.vocab_size:
        return "a text with ids that the generator has no embedding for"
    try:
        return check_queries([ids], 1, config)[0]
    except ValueError:
        return "text too long"


@dataclass(frozen=True, eq=False)
class CutRegion:
    """A sample's centred square: pixels (3, S, S) uint8; boxes in them, and their union as mask (1, S, S) bool."""

    pixels: Tensor
    boxes: tuple[tuple[int, int, int, int], ...]
    mask: Tensor


def centred_region(sample: Sample, size: int) -> CutRegion | str:
    """Return a sample's picture and boxes as `ShortSideCenterCrop(size)` leaves them, or why they cannot be used.

    Raises `OSError` where the medium fails; a file that is gone, or may not be read, is the sample's fault.
    """
    try:
        image = decode_image(sample.picture.encoded()).image
    except (DecodeError, FileNotFoundError, IsADirectoryError, PermissionError):
        return "a picture that cannot be read"
    # Where the transform cuts.
    side = min(image.size)
    crop = Crop((image.width - side) // 2, (image.height - side) // 2, side)
    boxes = crop_boxes(sample.boxes, sample.frame, image.size, crop, size)
    if boxes is None:
        return "a box outside the crop"
    pixels = torch.from_numpy(ShortSideCenterCrop(size)(image))
    return CutRegion(pixels, tuple(boxes), region_mask(boxes, size))
