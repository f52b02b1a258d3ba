"""Batches of training data as a function of the seed and the step alone.

Which sample stands at which position, how it is cropped and whether its text is dropped follow from (seed, position)
and nothing else: a run that goes on at step s sees what it would have seen, on any number of processes and threads.
Shape suffixes: B images of S pixels a side.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dove_fast.data import DecodeError, decode_image, prefetch
from dove_fast.data.crop import RandomCrop, crop_boxes, cut, region_mask
from dove_fast.data.samples import Sample, Samples
from dove_fast.failures import JobError

if TYPE_CHECKING:
    from dove_fast.text import TextTokenizer

__all__ = ["Batches", "TrainingBatch"]

logger = logging.getLogger(__name__)

# Samples that are tried for one place of a batch, before the data are taken to be broken.
MOST_TRIES = 100
# Batches that are ready, or being made, for each thread that makes them.
AHEAD = 2
# What the random numbers of a seed are for.
ORDER, SAMPLE = 0, 1


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """What a step trains on.

    images: (B, 3, S, S) uint8. queries: B tensors of token ids, empty for no text. mask: (B, 1, S, S) bool, the
    regions; None where all of them are the whole image. left_out: samples that could not be used, by reason.
    """

    images: Tensor
    queries: Sequence[Tensor]
    mask: Tensor | None
    left_out: Counter[str]

    def parts(self, count: int) -> Iterator[TrainingBatch]:
        """Split into `count` batches of equal size; what was left out stays with this one."""
        size = len(self.images) // count
        for start in range(0, size * count, size):
            rows = slice(start, start + size)
            mask = None if self.mask is None else self.mask[rows]
            yield TrainingBatch(self.images[rows], self.queries[rows], mask, Counter())


class Batches:
    """The batches of one process: `batches[step]`, or `batches.ahead(steps)` in threads.

    samples: the data. size: pixels a side. batch_size: images of a step over all `world` processes, of which this one
    is `rank`. text_dropout: the share of texts left out. longest_query: token ids at most; a longer text is left out.
    Every epoch goes through all samples in another order. A sample that cannot be used, as its picture cannot be
    decoded or the crop leaves nothing of one of its boxes, is counted and another one drawn at random in its place.
    Raises `ValueError` for no samples or a batch that the processes cannot share; then `JobError` for data of which
    nothing can be used.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        size: int,
        batch_size: int,
        crop: RandomCrop,
        seed: int,
        tokenizer: TextTokenizer | None = None,
        text_dropout: float = 0.0,
        longest_query: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(samples) == 0:
            raise ValueError("there are no samples to train on")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a multiple of the {world} processes, got {batch_size}")
        self.samples, self.size, self.crop, self.seed = samples, size, crop, seed
        self.tokenizer, self.text_dropout, self.longest_query = tokenizer, text_dropout, longest_query
        self.batch_size, self.rank, self.share = batch_size, rank, batch_size // world
        self._orders: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, step: int) -> TrainingBatch:
        first = step * self.batch_size + self.rank * self.share
        left_out: Counter[str] = Counter()
        rows = [self._row(position, left_out) for position in range(first, first + self.share)]
        images, queries, masks = zip(*rows, strict=True)
        mask = torch.stack(masks)
        return TrainingBatch(torch.stack(images), queries, None if bool(mask.all()) else mask, left_out)

    def ahead(self, steps: Iterable[int], workers: int) -> Generator[TrainingBatch, None, None]:
        """Yield the batches of `steps`, in order, made ahead by `workers` threads."""
        return prefetch(self.__getitem__, steps, workers=workers, depth=AHEAD * workers)

    def _row(self, position: int, left_out: Counter[str]) -> tuple[Tensor, Tensor, Tensor]:
        random = np.random.default_rng((self.seed, SAMPLE, position))
        index = self._index(position)
        for _ in range(MOST_TRIES):
            found = self._load(self.samples[index], random)
            if not isinstance(found, str):
                return found
            left_out[found] += 1
            index = int(random.integers(len(self.samples)))
        raise JobError(f"{MOST_TRIES} samples in a row could not be used, the last one for: {found}; check the data")

    def _load(self, sample: Sample, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor] | str:
        """Return image, ids and mask of a sample, or why it cannot be used."""
        reads_text = sample.text != "" and random.random() >= self.text_dropout
        ids = torch.empty(0, dtype=torch.int64)
        if reads_text:
            if self.tokenizer is None:
                raise JobError("the data have texts, but the model has no tokenizer; give [model] tokenizer")
            ids = self.tokenizer.encode(sample.text)
            if len(ids) > self.longest_query:
                return "text too long"
        try:
            image = decode_image(sample.picture.encoded()).image
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            # Other failures of the disk are not the picture's: they stop the run, which can go on later.
            logger.debug("%s cannot be read: %s", sample.picture.key, error)
            return "cannot be read"
        except DecodeError as error:
            logger.debug("%s cannot be decoded: %s", sample.picture.key, error)
            return "cannot be decoded"
        crop = self.crop.draw(image.width, image.height, random, may_mirror=not reads_text)
        boxes = crop_boxes(sample.boxes, sample.frame, image.size, crop, self.size) if reads_text else []
        if boxes is None:
            return "a box outside the crop"
        return cut(image, crop, self.size), ids, region_mask(boxes, self.size)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.samples))
        with self._lock:
            if epoch not in self._orders:
                # A batch may lie in two epochs, and threads work on several batches.
                for old in [known for known in self._orders if known < epoch - 1]:
                    del self._orders[old]
                self._orders[epoch] = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.samples))
            return int(self._orders[epoch][offset])
