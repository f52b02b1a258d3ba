"""TokenStream: a stream of images, tokenized with the generator's batch kept full; results in input order."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dove_fast.generation.batch import Batch, LengthRule, Waiting, WorkCounters
from dove_fast.generation.engine import rounded_up
from dove_fast.generation.schedule import LengthHistogram, stream_block
from dove_fast.generation.upload import Upload
from dove_fast.models.inputs import Query, check_images, check_length_options, check_queries, nonfinite_rows

if TYPE_CHECKING:
    from dove_fast.models.dove import DOVE

__all__ = ["StreamItem", "TokenStream"]

# Device types that compute while the host reads on.
READS_AHEAD = {"cuda"}


@dataclass(frozen=True)
class StreamItem:
    """One image's result: `index` counts the stream from 0.

    `tokens`: (m, d) in the model's dtype; `eos_probability`: () fp32, that of the last token; `codes`: (N,) int64 of
    the VQGAN where the stream was asked for them; all on its device.
    """

    index: int
    tokens: Tensor
    eos_probability: Tensor
    codes: Tensor | None = None


@dataclass(frozen=True)
class _Read:
    """Images that are to be encoded together, on their way to the device."""

    upload: Upload
    query_ids: list[Tensor]
    # Which are not finite, where floating: read when it is their turn, as on a GPU work may be queued before.
    nonfinite: Tensor | None


class TokenStream:
    """Tokenize a stream of images; iterate once over the `StreamItem`s, which come in input order.

    model: a `DOVE`. images: an iterable of images (3, S, S), as `DOVE.tokenize` takes them but one at a time, or of
    pairs (image, query); it is read `batch_size` images ahead, on a GPU twice as many. All have one dtype and lie on
    one device, the model's or the CPU, from where they go to the model's together, as they are (uint8 is a quarter of
    the bytes), while it computes.
    batch_size: images that are encoded together. places: rows that are generated together, each at its own step; None
    takes 2 * batch_size, or what `CACHE_BYTES` holds. A row that ends leaves its place to the next image, so that a
    block computes `places` rows however their lengths differ.
    codes: give the VQGAN's codes too, nearest codewords of the same features.
    length, max_length, eos_threshold, block_size: as in `DOVE.tokenize`. histogram: the lengths to expect, which the
    stream adds its own to; None takes, and teaches, `model.generation`.
    `counters` says what was computed so far, `encode_seconds` how long this process was busy with encoding (on a GPU
    with launching it). Memory: the caches of `places` rows, and results that wait for an earlier image, at most those
    of its T steps. What autocast and CUDA stream the iteration began under it has to go on under.
    Raises `TypeError` or `ValueError` as `DOVE.tokenize` does, naming the image by its number in the stream, which ends
    there: results that were not given out yet are lost. A second iteration is a `RuntimeError`.
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
        histogram: LengthHistogram | None = None,
        codes: bool = False,
    ) -> None:
        config = model.config
        check_length_options(config, length, max_length, eos_threshold, block_size)
        for name, value in (("batch_size", batch_size), ("places", places)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.counters = WorkCounters()
        self.encode_seconds = 0.0
        # Of the images that have no tokens yet, by their number.
        self._codes: dict[int, Tensor] | None = {} if codes else None
        self._model = model
        self._source = iter(images)
        self._batch_size = batch_size
        self._places = places
        self._histogram = histogram
        threshold = config.eos_threshold if eos_threshold is None else float(eos_threshold)
        most = int(length or max_length or config.num_tokens)
        self._rule = LengthRule(most, threshold if length is None else None)
        self._block_size = block_size
        self._waiting: deque[Waiting] = deque()
        self._read = 0
        self._encoded = 0
        self._exhausted = False
        self._next: _Read | None = None
        self._copies: torch.cuda.Stream | None = None
        self._begun_under: tuple[object, ...] | None = None
        # The dtype and device of the first image, which all others have.
        self._kind: tuple[torch.dtype, torch.device] | None = None

    def __iter__(self) -> Generator[StreamItem, None, None]:
        """Yield every image's tokens, in input order."""
        if self._begun_under is not None:
            raise RuntimeError("a TokenStream is iterated once; make another one for more images")
        self._begun_under = _context(self._model.device)
        done: dict[int, StreamItem] = {}
        following = 0
        with ExitStack() as lease:
            batch = None
            while True:
                if _context(self._model.device) != self._begun_under:
                    raise RuntimeError("a TokenStream must go on under the autocast and CUDA stream it was begun under")
                self._encode_ahead()
                if not self._waiting and (batch is None or batch.alive == 0):
                    return
                if batch is not None and batch.alive == 0 and self._longer_than(batch.longest_prefix):
                    # A longer query than any before: the places are made again, now that none is taken.
                    lease.close()
                    batch = None
                if batch is None:
                    batch = self._open(lease)
                done.update((item.index, item) for item in self._advance(batch))
                while following in done:
                    yield done.pop(following)
                    following += 1

    def _longer_than(self, positions: int) -> bool:
        return bool(self._waiting) and self._waiting[0].prefix.shape[0] > positions

    def _open(self, lease: ExitStack) -> Batch:
        model = self._model
        positions = rounded_up(max(item.prefix.shape[0] for item in self._waiting))
        generation, generator = model.generation, model.generator
        most_rows = generation.most_rows(generator, positions, self._rule.most)
        places = self._places or min(2 * self._batch_size, most_rows)
        batch = lease.enter_context(generation.batch(generator, model.eos_head, places, positions, self._rule))
        # One set of counters over all batches.
        batch.counters = self.counters
        return batch

    @torch.no_grad()
    def _encode_ahead(self) -> None:
        """Encode the next images, where none waits, and read those after them where a device computes meanwhile."""
        if self._waiting:
            return
        batch = self._next or self._read_batch()
        if batch is None:
            return
        if batch.nonfinite is not None and (rows := batch.nonfinite.nonzero().squeeze(1).tolist()):
            raise ValueError(f"image {self._encoded + rows[0]} of the stream must be finite, got NaN or infinity")
        start = time.perf_counter()
        features = self._model.encode_in_chunks(batch.upload.images())
        if self._codes is not None:
            self._codes.update(enumerate(self._model.vqgan.quantize.codes(features), self._encoded))
        for prefix in self._model.prefixes(features, batch.query_ids):
            self._waiting.append(Waiting(self._encoded, prefix))
            self._encoded += 1
        self.encode_seconds += time.perf_counter() - start
        self._next = self._read_batch() if self._model.device.type in READS_AHEAD else None

    def _read_batch(self) -> _Read | None:
        """Read and check the next images, and send them on their way; None behind the last."""
        # An iterator that has ended is not asked again.
        if self._exhausted:
            return None
        images: list[Tensor] = []
        query_ids: list[Tensor] = []
        for item in itertools.islice(self._source, self._batch_size):
            image, query = item if isinstance(item, tuple) else (item, None)
            query_ids.append(self._checked(self._read + len(images), image, query))
            images.append(image)
        self._exhausted = len(images) < self._batch_size
        if not images:
            return None
        together = torch.stack(images)
        self._read += len(images)
        device = self._model.device
        if device.type == "cuda" and self._copies is None:
            self._copies = torch.cuda.Stream(device)
        return _Read(Upload(together, device, self._copies), query_ids, nonfinite_rows(together))

    def _checked(self, index: int, image: Tensor, query: Query) -> Tensor:
        """Check image `index` and its query, and return the query's ids; errors name the image."""
        try:
            check_images(image[None] if isinstance(image, Tensor) else image, self._model.config)
            kind = image.dtype, image.device
            if image.device.type != "cpu" and image.device != self._model.device:
                raise ValueError(f"images must be on the CPU or on {self._model.device}, got {image.device}")
            if kind != (self._kind or kind):
                expected, device = self._kind or kind
                raise TypeError(f"all images must be {expected} on {device} like the first, got {kind[0]} on {kind[1]}")
            self._kind = kind
            return check_queries([query], 1, self._model.config, self._model.tokenizer)[0]
        except (TypeError, ValueError) as error:
            raise type(error)(f"image {index} of the stream: {error}") from None

    @torch.no_grad()
    def _advance(self, batch: Batch) -> list[StreamItem]:
        """Admit who waits, run one block, and return the tokens of the rows that ended."""
        generation = self._model.generation
        batch.refill(self._waiting)
        size = self._block_size
        if size is None and self._rule.threshold is None:
            size = self._rule.most
        elif size is None:
            survival = (self._histogram or generation.histogram).survival(self._rule.most)
            size = stream_block(survival, generation.cost_on(self._model.device), batch.places, batch.longest_prefix)
        finished = batch.run(size)
        if not finished:
            return []
        self._learn([row.length for row in finished])
        tokens = [batch.tokens_of(row) for row in finished]
        probabilities = self._model.eos_probability(torch.stack([states[-1] for states in tokens]))
        return [
            StreamItem(row.key, states, probability, None if self._codes is None else self._codes.pop(row.key))
            for row, states, probability in zip(finished, tokens, probabilities, strict=True)
        ]

    def _learn(self, lengths: list[int]) -> None:
        if self._histogram is None:
            self._model.generation.learn(lengths, self._rule)
        elif self._rule.leaves_to_eos(self._model.config.num_tokens):
            self._histogram.update(lengths)


def _context(device: torch.device) -> tuple[object, ...]:
    """What a cache depends on beside the weights: autocast, and the CUDA stream that writes it."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return autocast, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
