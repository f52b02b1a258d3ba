"""The work of a tokenization job: units claimed, read ahead, decoded in processes, tokenized, written."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dove_fast.data import Decoders, EncodedImage, Loaded, Source, Transform, Unusable, read_ahead
from dove_fast.errors import StoreError
from dove_fast.failures import JobError
from dove_fast.generation import LengthHistogram, StreamItem, TokenStream
from dove_fast.jobs.progress import Progress
from dove_fast.jobs.queries import Ids
from dove_fast.jobs.stages import StageClock
from dove_fast.models.dove import DOVE
from dove_fast.ragged import RaggedTokens
from dove_fast.store.keys import KeySet
from dove_fast.store.layout import DTYPES
from dove_fast.store.records import InputError, RecordRow
from dove_fast.store.shard import ShardWriter
from dove_fast.store.writer import StoreWriter
from dove_fast.words import counted

__all__ = ["Limits", "OnImage", "Work"]

# Images that go to a worker and come back together, and the most encoded bytes of them (one image may have more).
CHUNK_IMAGES = 8
CHUNK_BYTES = 4 << 20
# Batches of images that are decoded ahead; more on a CPU, where that goes in bursts which take milliseconds to begin.
BATCHES_AHEAD, BATCHES_A_BURST = 2, 4

# Called with an image's key, its token count and its pixels, uint8 (3, S, S).
OnImage = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Limits:
    """What bounds and places the work, and does not decide its results.

    `workers`: decoding processes, 0 for none. `max_errors`: inputs set aside at most. Units whose number is `rank`
    modulo `world_size` are this job's to do.
    """

    workers: int
    max_errors: int | None
    rank: int
    world_size: int


@dataclass(frozen=True)
class _Chunk:
    """Some inputs of one unit, in order; the last one of a unit may be empty."""

    unit: int
    items: list[EncodedImage | Unusable]
    last: bool

    def contents(self) -> list[str | bytes]:
        return [item.content for item in self.items if isinstance(item, EncodedImage)]


@dataclass(frozen=True)
class _Read:
    """What a record says of an image beside its tokens; its pixels where somebody wants to see them."""

    key: str
    source: str
    extra: dict[str, object] | None
    width: int
    height: int
    pixels: Tensor | None


Decoded = tuple[_Chunk, list[Loaded | str]]


class Work:
    """One run over the units that are missing: `images`, `tokens` and `errors` count what it did, `clock` how long."""

    def __init__(
        self,
        model: DOVE,
        source: Source,
        writer: StoreWriter,
        transform: Transform,
        queries: Mapping[str, Ids],
        limits: Limits,
        *,
        batch_size: int,
        on_progress: Callable[[Progress], None] | None = None,
        on_image: OnImage | None = None,
    ) -> None:
        self._model = model
        self._source = source
        self._writer = writer
        self._transform = transform
        self._queries = queries
        self._limits = limits
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._on_image = on_image
        self._settings = writer.settings
        # Of the units that were looked at for keys that come twice.
        self._keys, self._known = KeySet(), set[int]()
        # Of the unit in hand: what was set aside, and how many images have tokens.
        self._set_aside: list[InputError] = []
        self._written = 0
        # Of the units that are done, whoever did them.
        self._finished = self._finished_errors = self._finished_units = 0
        # Seconds in which this thread waited for images.
        self._idle = 0.0
        # Seconds of decoding that are counted, of all workers.
        self._decoding = 0.0
        self.images = self.tokens = self.errors = 0
        self.clock = StageClock()
        self._start = time.perf_counter()

    def run(self, units: Collection[int] | None = None) -> None:
        """Do every unit that is missing, this job's to do, and nobody's at the moment, and then `conclude`.

        `units`: do of these alone, and look at no others; `conclude` is the caller's. May be called again for more.
        Raises `JobError` beyond `max_errors`, `StoreError` for a key that comes a second time.
        """
        try:
            self._decoding = 0.0
            with _quiet_pillow(), contextlib.closing(self._decoders()) as decoders:
                self._learn_keys()
                self._count()
                self._report()
                # Again, as long as there was something: another job may have died and left its unit.
                while self._once(decoders, units):
                    self._writer.refresh(units)
        except BaseException:
            with contextlib.suppress(OSError):
                self._writer.write_errors(self._set_aside)
            raise
        if units is None:
            self.conclude()

    def _decoders(self) -> Decoders:
        return Decoders(self._transform, self._limits.workers, yielding=self._in_bursts)

    @property
    def _in_bursts(self) -> bool:
        # The model's threads are on the cores that decoding needs.
        return self._model.device.type == "cpu"

    def conclude(self) -> None:
        """Take over what others did; if all units are done, finish the store.

        Raises `StoreError` for a key that comes a second time.
        """
        self._writer.refresh()
        if not self._writer.missing:
            # Those of the units that others did meanwhile.
            self._learn_keys()
            self._writer.finish()
        self._count()
        self._report()

    def _count(self) -> None:
        writer = self._writer
        self._finished_errors = writer.error_count
        self._finished = writer.records + writer.error_count
        self._finished_units = writer.units_done

    def _learn_keys(self) -> None:
        if self._source.unique_keys or self._settings.units == 1:
            return
        for unit, keys in self._writer.done_column("key", but=self._known):
            self._check_keys(unit, keys)

    def _check_keys(self, unit: int, keys: Sequence[str]) -> None:
        self._known.add(unit)
        repeated = self._keys.add(keys)
        if repeated is not None:
            raise StoreError(
                f"key {repeated!r} of unit {unit} came before, and a store's keys must be unique: begin another output "
                "with --prefix-keys for WebDataset shards that number their samples alike, or with another --key-column"
            )

    def _once(self, decoders: Decoders, units: Collection[int] | None) -> bool:
        """Go once through the units that are missing; false if none of them could be taken."""
        # In images, what is decoded and waits; in chunks, and as many again encoded.
        batches = BATCHES_A_BURST if self._in_bursts else BATCHES_AHEAD
        depth = decoders.workers + -(-batches * self._batch_size // CHUNK_IMAGES)
        chunks: Generator[_Chunk, None, None] = self._chunks(units)
        if decoders.workers:
            chunks = read_ahead(chunks, depth=depth)
        worked = False
        with (
            contextlib.closing(chunks),
            contextlib.closing(decoders.map(chunks, _Chunk.contents, depth=depth)) as decoded,
        ):
            while (first := self._next(decoded, decoders)) is not None:
                worked = True
                unit = first[0].unit
                with self._writer.shard(unit) as shard:
                    self._write_unit(shard, first, decoded, decoders)
                self._writer.release(unit)
                self._set_aside, self._written = [], 0
                self._count()
                self._report()
        return worked

    def _chunks(self, units: Collection[int] | None) -> Generator[_Chunk, None, None]:
        """Claim units, and yield their inputs."""
        for unit in self._writer.missing if units is None else sorted(units):
            if unit % self._limits.world_size != self._limits.rank or not self._writer.claim(unit):
                continue
            items: list[EncodedImage | Unusable] = []
            size = 0
            with contextlib.closing(_generator(self._source.read(unit))) as inputs:
                for item in inputs:
                    items.append(item)
                    size += len(item.content) if isinstance(item, EncodedImage) else 0
                    if len(items) == CHUNK_IMAGES or size >= CHUNK_BYTES:
                        yield _Chunk(unit, items, last=False)
                        items, size = [], 0
            yield _Chunk(unit, items, last=True)

    def _next(self, decoded: Iterator[Decoded], decoders: Decoders) -> Decoded | None:
        start = time.perf_counter()
        found = next(decoded, None)
        took = time.perf_counter() - start
        # Since the last look: workers decode while this thread computes.
        decoding, self._decoding = decoders.seconds - self._decoding, decoders.seconds
        self._idle += took
        self.clock.add("decode", decoding)
        # Without workers it was this thread that decoded.
        self.clock.add("wait", took if decoders.workers else took - decoding)
        return found

    def _write_unit(self, shard: ShardWriter, first: Decoded, decoded: Iterator[Decoded], decoders: Decoders) -> None:
        settings = self._settings
        # What was read and has no tokens yet, in the order in which they come.
        read: deque[_Read] = deque()
        stream = TokenStream(
            self._model,
            self._images(shard, first, decoded, decoders, read),
            batch_size=self._batch_size,
            length=settings.length,
            max_length=settings.max_length,
            eos_threshold=None if settings.length is not None else settings.eos_threshold,
            # What the schedule learns changes values by rounding. A unit starts from nothing, so that it has the same
            # bytes in a job that was resumed.
            histogram=LengthHistogram(self._model.config.num_tokens),
            codes=settings.codes,
        )
        keys: list[str] = []
        encoded, idle = 0.0, self._idle
        with contextlib.closing(iter(stream)) as items:
            while True:
                start = time.perf_counter()
                batch = list(itertools.islice(items, self._batch_size))
                busy = time.perf_counter() - start
                encoding = stream.encode_seconds - encoded
                self.clock.add("encode", encoding)
                # The rest of what the stream took, but for its waiting.
                self.clock.add("generate", busy - encoding - (self._idle - idle))
                encoded, idle = stream.encode_seconds, self._idle
                if not batch:
                    break
                with self.clock.time("write"):
                    self._write_batch(shard, batch, [read.popleft() for _ in batch], keys)
        if not self._source.unique_keys:
            self._check_keys(first[0].unit, keys)

    def _images(
        self,
        shard: ShardWriter,
        first: Decoded,
        decoded: Iterator[Decoded],
        decoders: Decoders,
        read: deque[_Read],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a unit's images and queries; those that cannot be used are set aside."""
        found: Decoded | None = first
        while found is not None:
            chunk, loaded = found
            images = iter(loaded)
            for item in chunk.items:
                if isinstance(item, Unusable):
                    self._put_aside(shard, item.key, item.source, item.reason)
                    continue
                image = next(images)
                if isinstance(image, str):
                    self._put_aside(shard, item.key, item.source, image)
                    continue
                pixels = torch.from_numpy(image.pixels)
                seen = pixels if self._on_image is not None else None
                read.append(_Read(item.key, item.source, item.extra, image.width, image.height, seen))
                yield pixels, torch.tensor(self._queries.get(item.key, ()), dtype=torch.int64)
            if chunk.last:
                return
            found = self._next(decoded, decoders)

    def _put_aside(self, shard: ShardWriter, key: str, source: str, reason: str) -> None:
        error = InputError(key, source, reason)
        shard.set_aside(error)
        self._set_aside.append(error)
        self.errors += 1
        most = self._limits.max_errors
        if most is not None and self._finished_errors + len(self._set_aside) > most:
            raise JobError(
                f"more than {counted(most, 'input')} set aside (--max-errors), the last one {key!r}: {reason}; "
                "see errors.jsonl, and run the same command again with a higher bound to go on"
            )

    def _write_batch(
        self, shard: ShardWriter, items: Sequence[StreamItem], read: Sequence[_Read], keys: list[str]
    ) -> None:
        tokens = RaggedTokens.from_rows([item.tokens for item in items]).to("cpu")
        if self._settings.dtype in DTYPES:
            tokens = tokens.to(DTYPES[self._settings.dtype])
        self._check_finite(tokens, read)
        probabilities = torch.stack([item.eos_probability for item in items]).tolist()
        codes = [item.codes for item in items if item.codes is not None]
        rows = [
            RecordRow(image.key, image.source, length, image.width, image.height, probability, image.extra)
            for image, length, probability in zip(read, tokens.host_lengths, probabilities, strict=True)
        ]
        shard.append(tokens, rows, torch.stack(codes).cpu() if codes else None)
        keys += [row.key for row in rows]
        if self._on_image is not None:
            for image, length in zip(read, tokens.host_lengths, strict=True):
                if image.pixels is not None:
                    self._on_image(image.key, length, image.pixels)
        self._written += len(items)
        self.images += len(items)
        self.tokens += tokens.values.shape[0]
        self._report()

    def _check_finite(self, tokens: RaggedTokens, read: Sequence[_Read]) -> None:
        if tokens.values.isfinite().all():
            return
        key = next(image.key for image, row in zip(read, tokens, strict=True) if not row.isfinite().all())
        raise JobError(
            f"tokens of {key!r} are not finite in {self._settings.dtype}; if the model is sound, another --token-dtype "
            "(bfloat16, float32) holds them"
        )

    def _report(self) -> None:
        if self._on_progress is None:
            return
        self._on_progress(
            Progress(
                self._finished + self._written + len(self._set_aside),
                self._settings.inputs,
                self.images,
                self.tokens,
                errors=self.errors,
                elapsed=time.perf_counter() - self._start,
                stage_seconds=self.clock.seconds,
                workers=self._limits.workers,
                units_done=self._finished_units,
                units=self._settings.units,
            )
        )


def _generator(items: Iterator[EncodedImage | Unusable]) -> Generator[EncodedImage | Unusable, None, None]:
    """Make a generator of any iterator, so that it can be closed."""
    yield from items


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings (large images, odd EXIF data): what cannot be used is set aside with its reason.

    Warning filters belong to the process, so they are set here once, around the threads, and not in them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
