"""TokenStream: a stream of images, tokenized with the generator's batch kept full; results in input order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dove_fast.generation.engine import Batch, LengthRule, WorkCounters
from dove_fast.generation.schedule import stream_block
from dove_fast.models.inputs import (
    Query,
    check_images,
    check_length_options,
    check_queries,
    nonfinite_rows,
    raise_if_nonfinite,
)

if TYPE_CHECKING:
    from dove_fast.models.dove import DOVE

__all__ = ["StreamItem", "TokenStream"]

# New rows wait until this share of the places is free: a prefill of one row does not fill a device.
ADMIT_SHARE = 0.25
# The caches are made for prefixes of a multiple of so many positions, so that few lengths need new ones.
PREFIX_MULTIPLE = 32


@dataclass(frozen=True)
class StreamItem:
    """One image's result: `index` counts the stream from 0.

    `tokens`: (m, d) in the model's dtype; `eos_probability`: () fp32, that of the last token; both on its device.
    """

    index: int
    tokens: Tensor
    eos_probability: Tensor


@dataclass(frozen=True)
class _Waiting:
    index: int
    prefix: Tensor


class TokenStream:
    """Tokenize a stream of images; iterate once over the `StreamItem`s, which come in input order.

    model: a `DOVE`. images: an iterable of images (3, S, S), as `DOVE.tokenize` takes them but one at a time, or of
    pairs (image, query); it is read `batch_size` images ahead. They lie on one device, the model's or the CPU, from
    where they go to the model's together, as they are: uint8 is a quarter of the bytes.
    batch_size: images that are encoded together. places: rows that are generated together, each at its own step; None
    takes 2 * batch_size. A row that ends leaves its place to the next image, so that a block computes `places` rows
    however their lengths differ.
    length, max_length, eos_threshold, block_size: as in `DOVE.tokenize`.
    `counters` says what was computed so far. Memory: the caches of `places` rows, and results that wait for an earlier
    image, at most those of its T steps.
    Raises `TypeError` or `ValueError` as `DOVE.tokenize` does; rows in the texts count within a batch that was read.
    Source: METHOD section 2.
    """

    def __init__(
        self,
        model: DOVE,
        images: Iterable[Tensor | tuple[Tensor, Query]],
        *,
        batch_size: int = 32,
        places: int | None = None,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
        block_size: int | None = None,
    ) -> None:
        config = model.config
        check_length_options(config, length, max_length, eos_threshold, block_size)
        for name, value in (("batch_size", batch_size), ("places", places)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.counters = WorkCounters()
        self._model = model
        self._source = iter(images)
        self._batch_size = batch_size
        self._places = places or 2 * batch_size
        threshold = config.eos_threshold if eos_threshold is None else float(eos_threshold)
        most = int(length or max_length or config.num_tokens)
        self._rule = LengthRule(most, threshold if length is None else None)
        self._block_size = block_size
        self._waiting: deque[_Waiting] = deque()
        self._read = 0
        self._exhausted = False

    def __iter__(self) -> Generator[StreamItem, None, None]:
        """Yield every image's tokens, in input order."""
        done: dict[int, StreamItem] = {}
        following = 0
        with ExitStack() as lease:
            batch, positions = None, 0
            while True:
                self._encode_ahead()
                if not self._waiting and (batch is None or batch.alive == 0):
                    return
                if batch is not None and batch.alive == 0 and self._longer_than(positions):
                    # A longer query than any before: the places are made again, now that none is taken.
                    lease.close()
                    batch = None
                if batch is None:
                    longest = max(item.prefix.shape[0] for item in self._waiting)
                    positions = -(-longest // PREFIX_MULTIPLE) * PREFIX_MULTIPLE
                    batch = self._open(lease, positions)
                done.update((item.index, item) for item in self._advance(batch, positions))
                while following in done:
                    yield done.pop(following)
                    following += 1

    def _longer_than(self, positions: int) -> bool:
        return bool(self._waiting) and self._waiting[0].prefix.shape[0] > positions

    def _open(self, lease: ExitStack, positions: int) -> Batch:
        model = self._model
        batch = lease.enter_context(
            model.generation.batch(model.generator, model.eos_head, self._places, positions, self._rule)
        )
        # One set of counters over all batches.
        batch.counters = self.counters
        return batch

    @torch.no_grad()
    def _encode_ahead(self) -> None:
        """Read and encode the next images, where none waits."""
        if self._waiting or self._exhausted:
            return
        images, queries = [], []
        for item in self._source:
            image, query = item if isinstance(item, tuple) else (item, None)
            images.append(image)
            queries.append(query)
            if len(images) == self._batch_size:
                break
        self._exhausted = len(images) < self._batch_size
        if not images:
            return
        for image in images:
            # One at a time, so that an error names what came and not a batch of it.
            check_images(image[None] if isinstance(image, Tensor) else image, self._model.config)
        together = torch.stack(images)
        if together.device != self._model.device:
            together = together.to(self._model.device)
        query_ids = check_queries(queries, len(images), self._model.config)
        raise_if_nonfinite(nonfinite_rows(together))
        for prefix in self._model.prefixes(self._model.encode_in_chunks(together), query_ids):
            self._waiting.append(_Waiting(self._read, prefix))
            self._read += 1

    @torch.no_grad()
    def _advance(self, batch: Batch, positions: int) -> list[StreamItem]:
        """Admit who waits, run one block, and return the tokens of the rows that ended."""
        generation = self._model.generation
        if batch.alive == 0 or batch.free >= self._places * ADMIT_SHARE:
            self._admit(batch, positions)
        size = self._block_size
        if size is None and self._rule.threshold is None:
            size = self._rule.most
        elif size is None:
            survival = generation.histogram.survival(self._rule.most)
            size = stream_block(survival, generation.cost_on(self._model.device), self._places, positions)
        finished = batch.run(size)
        if not finished:
            return []
        lengths = [row.length for row in finished]
        if generation.learning and self._rule.threshold is not None and self._rule.most == generation.num_tokens:
            generation.histogram.update(lengths)
        tokens = batch.states_of(finished).split(lengths)
        probabilities = self._model.eos_probability(torch.stack([states[-1] for states in tokens]))
        return [
            StreamItem(row.key, states, probability)
            for row, states, probability in zip(finished, tokens, probabilities, strict=True)
        ]

    def _admit(self, batch: Batch, positions: int) -> None:
        new: list[_Waiting] = []
        while len(new) < batch.free and self._waiting and not self._longer_than(positions):
            new.append(self._waiting.popleft())
        if new:
            embeddings = torch.cat([item.prefix for item in new])
            batch.admit([item.index for item in new], embeddings, [item.prefix.shape[0] for item in new])
