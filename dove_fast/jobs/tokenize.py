"""The main job: images in, a token store out, unit by unit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import platform
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from dove_fast.data import ImageInput, Loaded, SetAside, ShortSideCenterCrop, list_inputs, load_image, prefetch
from dove_fast.failures import stopping
from dove_fast.generation import LengthHistogram, StreamItem, TokenStream
from dove_fast.jobs.loading import LoadedModel
from dove_fast.jobs.progress import OnProgress, Progress
from dove_fast.jobs.queries import Ids, check_against, encode_texts, hash_queries
from dove_fast.models.inputs import check_length_options
from dove_fast.ragged import RaggedTokens
from dove_fast.store.layout import DTYPES, StoreSettings, hash_keys
from dove_fast.store.records import InputError, RecordRow
from dove_fast.store.shard import ShardWriter
from dove_fast.store.writer import StoreWriter

__all__ = ["TokenizeOptions", "TokenizeReport", "tokenize"]

MAX_DEFAULT_WORKERS = 8
RESUME = "run the same command again to go on"


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of `tokenize`; `length`, `max_length` and `eos_threshold` are those of `DOVE.tokenize`.

    `batch_size`: images encoded at a time; twice as many are generated together. `shard_size`: inputs a shard, fixed
    for a store; a run that was stopped goes on behind the last whole shard.
    `workers`: threads that decode, None for one a core and at most `MAX_DEFAULT_WORKERS`.
    """

    length: int | None = None
    max_length: int | None = None
    eos_threshold: float | None = None
    batch_size: int = 32
    shard_size: int = 1024
    workers: int | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for a count below 1."""
        for name in ("batch_size", "shard_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class TokenizeReport:
    """What a store holds now (`records`, `tokens`, `errors`), and what this run did to it.

    `computed` images took `seconds`; `already_complete` means that there was nothing to do.
    """

    inputs: int
    records: int
    tokens: int
    errors: int
    computed: int
    seconds: float
    already_complete: bool


def tokenize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    loaded: LoadedModel,
    options: TokenizeOptions | None = None,
    *,
    queries: Mapping[str, Ids | str] | None = None,
    on_progress: OnProgress | None = None,
) -> TokenizeReport:
    """Tokenise the images that `source` stands for (see `list_inputs`) into a token store at `output`.

    A store that was begun with the same inputs and settings is finished: units that are done are not computed again.
    Inputs that cannot be decoded are set aside with their reason. `queries` gives token ids by key, or texts,
    which the model's tokenizer turns into ids before anything else.

    Raises, before anything is written, `FileNotFoundError`, `ValueError` and `TypeError` for what cannot be used and
    `StoreError` for an output that is something else; then `JobError` when the disk or the memory fails.
    Whenever it stops, also at KeyboardInterrupt or a kill, the same call goes on where it was.
    """
    options = options or TokenizeOptions()
    query_ids = encode_texts(queries or {}, loaded.model.tokenizer)
    config = loaded.model.config
    check_length_options(config, options.length, options.max_length, options.eos_threshold, None)
    inputs = list_inputs(source)
    check_against(query_ids, (item.key for item in inputs), config)
    transform = ShortSideCenterCrop(config.image_size)
    settings = _settings(inputs, loaded, options, query_ids, transform)
    if options.shard_size * config.num_tokens >= 2**31:
        raise ValueError(f"shard_size must be below {2**31 // config.num_tokens} for this model")
    writer = StoreWriter(Path(output), settings, _environment(loaded))

    start = time.perf_counter()
    already_complete = writer.complete
    work = _Work(loaded, options, query_ids, transform, inputs, writer, on_progress)
    if not already_complete:
        with stopping(RESUME):
            work.run()
    return TokenizeReport(
        inputs=len(inputs),
        records=writer.records,
        tokens=writer.tokens,
        errors=len(writer.errors),
        computed=work.images,
        seconds=time.perf_counter() - start,
        already_complete=already_complete,
    )


def _settings(
    inputs: list[ImageInput],
    loaded: LoadedModel,
    options: TokenizeOptions,
    queries: Mapping[str, Ids],
    transform: ShortSideCenterCrop,
) -> StoreSettings:
    config = loaded.model.config
    threshold = None
    if options.length is None:
        threshold = config.eos_threshold if options.eos_threshold is None else float(options.eos_threshold)
    return StoreSettings(
        config=config.to_dict(),
        fingerprint=loaded.fingerprint,
        transform=transform.to_dict(),
        dtype=_dtype_name(loaded.model.dtype),
        width=config.generator.hidden_size,
        length=options.length,
        max_length=options.max_length,
        eos_threshold=threshold,
        queries_sha256=hash_queries(queries),
        shard_size=options.shard_size,
        inputs=len(inputs),
        inputs_sha256=hash_keys(item.key for item in inputs),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    for name, stored in DTYPES.items():
        if stored == dtype:
            return name
    raise ValueError(
        f"tokens are stored as {', '.join(DTYPES)}, the model is {dtype}; load it with one of these dtypes"
    )


def _environment(loaded: LoadedModel) -> dict[str, str]:
    """What ran, for the manifest: results on another device or version differ by rounding."""
    from dove_fast import __version__

    versions = {name: metadata.version(name) for name in ("torch", "numpy", "pillow", "pyarrow", "safetensors")}
    return {
        "dove_fast": __version__,
        "python": platform.python_version(),
        **versions,
        "device": loaded.model.device.type,
    }


@dataclass(frozen=True)
class _Read:
    """What a record says of an image beside its tokens."""

    input: ImageInput
    width: int
    height: int


class _Work:
    """One run over the units that are missing."""

    def __init__(
        self,
        loaded: LoadedModel,
        options: TokenizeOptions,
        queries: Mapping[str, Ids],
        transform: ShortSideCenterCrop,
        inputs: list[ImageInput],
        writer: StoreWriter,
        on_progress: OnProgress | None,
    ) -> None:
        self._model = loaded.model
        self._options = options
        self._queries = queries
        self._transform = transform
        self._inputs = inputs
        self._writer = writer
        self._on_progress = on_progress
        self._done = len(inputs) - sum(len(self._unit(index)) for index in writer.missing)
        self._tokens = 0
        self.images = 0

    def run(self) -> None:
        workers = self._options.workers or _default_workers()
        depth = workers + 2 * self._options.batch_size
        missing = self._writer.missing
        self._writer.begin()
        self._report()
        # One stream over all units, so that decoding does not pause at their ends.
        items = (item for index in missing for item in self._unit(index))
        load = functools.partial(load_image, transform=self._transform)
        with _quiet_pillow(), contextlib.closing(prefetch(load, items, workers=workers, depth=depth)) as stream:
            try:
                for index in missing:
                    with self._writer.shard(index) as shard:
                        self._write_unit(shard, stream, len(self._unit(index)))
            except BaseException:
                with contextlib.suppress(OSError):
                    self._writer.write_errors()
                raise
        self._writer.finish()

    def _unit(self, index: int) -> list[ImageInput]:
        size = self._options.shard_size
        return self._inputs[index * size : (index + 1) * size]

    def _write_unit(self, shard: ShardWriter, stream: Iterator[Loaded | SetAside], count: int) -> None:
        options = self._options
        # What was read and has no tokens yet, in the order in which they come.
        read: deque[_Read] = deque()
        results = TokenStream(
            self._model,
            self._images(shard, stream, count, read),
            batch_size=options.batch_size,
            length=options.length,
            max_length=options.max_length,
            eos_threshold=options.eos_threshold,
            # What the schedule learns changes values by rounding. A unit starts from nothing, so that it has the same
            # bytes in a job that was resumed.
            histogram=LengthHistogram(self._model.config.num_tokens),
        )
        with contextlib.closing(iter(results)) as items:
            while batch := list(itertools.islice(items, options.batch_size)):
                self._write_batch(shard, batch, [read.popleft() for _ in batch])
        self._report()

    def _images(
        self, shard: ShardWriter, stream: Iterator[Loaded | SetAside], count: int, read: deque[_Read]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a unit's images and queries; those that cannot be used are set aside."""
        for _ in range(count):
            item = next(stream)
            if isinstance(item, SetAside):
                shard.set_aside(InputError(item.input.key, item.input.source, item.reason))
                self._done += 1
            else:
                read.append(_Read(item.input, item.width, item.height))
                yield item.pixels, torch.tensor(self._queries.get(item.input.key, ()), dtype=torch.int64)

    def _write_batch(self, shard: ShardWriter, items: Sequence[StreamItem], read: Sequence[_Read]) -> None:
        tokens = RaggedTokens.from_rows([item.tokens for item in items]).to("cpu")
        probabilities = torch.stack([item.eos_probability for item in items]).tolist()
        rows = [
            RecordRow(image.input.key, image.input.source, length, image.width, image.height, probability)
            for image, length, probability in zip(read, tokens.host_lengths, probabilities, strict=True)
        ]
        shard.append(tokens, rows)
        self._done += len(items)
        self.images += len(items)
        self._tokens += tokens.values.shape[0]
        self._report()

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(self._done, len(self._inputs), self.images, self._tokens))


def _default_workers() -> int:
    # The cores that this process may use, where the system can tell.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(MAX_DEFAULT_WORKERS, cores)


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings (large images, odd EXIF data): what cannot be used is set aside with its reason.

    Warning filters belong to the process, so they are set here once, around the threads, and not in them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
