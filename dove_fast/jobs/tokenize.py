"""The main job: images in, a token store out, unit by unit."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from dove_fast.data import ShortSideCenterCrop, Source, SourceOptions, open_source
from dove_fast.failures import stopping
from dove_fast.jobs.loading import LoadedModel
from dove_fast.jobs.progress import OnProgress
from dove_fast.jobs.queries import Ids, check_against, encode_texts, hash_queries
from dove_fast.jobs.work import Limits, OnImage, Work
from dove_fast.models.inputs import check_length_options
from dove_fast.store.layout import DTYPES, TOKEN_DTYPES, StoreSettings
from dove_fast.store.writer import StoreWriter

__all__ = ["TokenizeJob", "TokenizeOptions", "TokenizeReport", "plan", "tokenize"]

MAX_DEFAULT_WORKERS = 8
# Fewer inputs than this a worker are not worth its start, some seconds.
INPUTS_A_WORKER = 64
RESUME = "run the same command again to go on"
MOST_CODES = 2**16


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of `tokenize`; `length`, `max_length` and `eos_threshold` are those of `DOVE.tokenize`.

    What the store holds: `shard_size`: inputs a shard, fixed for a store; a run that was stopped goes on behind the
    last whole shard (WebDataset shards stay as they are). `prefix_keys`, `image_column`, `key_column`: see
    `SourceOptions`. `reduced`: decode JPEGs only as large as needed (`ShortSideCenterCrop`). `token_dtype`: a key of
    `TOKEN_DTYPES`, None for the model's; int8 comes with one scale a token, and what it lost is in the manifest.
    `codes`: keep the VQGAN's codes too, uint16.

    How it is made: `batch_size`: images encoded at a time; twice as many are generated together. `workers`: processes
    that decode, 0 to decode in this one; None for one a core, at most `MAX_DEFAULT_WORKERS`, and one for every
    `INPUTS_A_WORKER` inputs. `max_errors`: stop when more inputs are set aside. `retry_errors`: do the units that set
    inputs aside again, because what was wrong is mended; needs the store to itself. `join`: work beside the jobs that
    write the same store. `rank`, `world_size`: do units rank, rank + world_size, ..; the others are other jobs', which
    may be on other machines, need no network and may begin together.
    """

    length: int | None = None
    max_length: int | None = None
    eos_threshold: float | None = None
    batch_size: int = 32
    shard_size: int = 1024
    prefix_keys: bool = False
    image_column: str | None = None
    key_column: str | None = None
    reduced: bool = False
    token_dtype: str | None = None
    codes: bool = False
    workers: int | None = None
    max_errors: int | None = None
    retry_errors: bool = False
    join: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of range, or an unknown dtype."""
        for name, least in (("batch_size", 1), ("shard_size", 1), ("workers", 0), ("max_errors", 0), ("world_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.retry_errors and (self.join or self.world_size > 1):
            raise ValueError("retry_errors needs the store to itself, so it goes without join, world_size and Ray")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1} (world_size - 1), got {self.rank}")
        if self.token_dtype is not None and self.token_dtype not in TOKEN_DTYPES:
            raise ValueError(f"token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {self.token_dtype!r}")

    def source_options(self) -> SourceOptions:
        """Return those that `open_source` takes."""
        return SourceOptions(
            shard_size=self.shard_size,
            prefix_keys=self.prefix_keys,
            image_column=self.image_column,
            key_column=self.key_column,
        )


@dataclass(frozen=True)
class TokenizeReport:
    """What a store holds now (`records`, `tokens`, `errors`, units), and what this run did to it.

    `computed` images took `seconds`; `stages` says which share of them each stage was busy. `already_complete` means
    that there was nothing to do; without `complete`, `missing` units are for others to do, or to be done again.
    `quantization_error`: `||int8 - tokens|| / ||tokens||`, None where tokens are kept as they are. `kept`: units that
    were done again and have fewer images than before; what they were is in the store's folder `REPLACED_NAME`.
    """

    inputs: int
    records: int
    tokens: int
    errors: int
    units: int
    missing: int
    computed: int
    seconds: float
    complete: bool
    already_complete: bool
    quantization_error: float | None = None
    kept: tuple[int, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)


def tokenize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    loaded: LoadedModel,
    options: TokenizeOptions | None = None,
    *,
    queries: Mapping[str, Ids | str] | None = None,
    again: Collection[int] | None = None,
    on_progress: OnProgress | None = None,
    on_image: OnImage | None = None,
) -> TokenizeReport:
    """Tokenise the images that `source` stands for (see `open_source`) into a token store at `output`.

    A store that was begun with the same inputs and settings is finished: units that are done are not computed again.
    Inputs that cannot be decoded are set aside with their reason. `queries` gives token ids by key, or texts, which the
    model's tokenizer turns into ids before anything else; where keys are only known by reading, a query for a key that
    does not come is not noticed. `again`: units that are done once more, also of a complete store, such as damaged
    ones; what they were is kept if they had more images (`TokenizeReport.kept`). `on_progress` sees how far it is,
    after every batch; `on_image` every image's key, token count and pixels.

    Raises, before anything is written, `FileNotFoundError`, `ValueError` and `TypeError` for what cannot be used and
    `StoreError` for an output that is something else or that another job is writing; then `JobError` when the disk or
    the memory fails or too many inputs are set aside, and `StoreError` for a key that comes twice.
    Whenever it stops, also at KeyboardInterrupt or a kill, the same call goes on where it was.
    """
    job = TokenizeJob(
        source,
        output,
        loaded,
        options or TokenizeOptions(),
        queries=queries,
        again=again,
        on_progress=on_progress,
        on_image=on_image,
    )
    with contextlib.closing(job):
        job.run()
    return job.report()


class TokenizeJob:
    """What `tokenize` does, in steps: making it checks and only reads, `run` works, `close` leaves the store to others.

    `missing`: the units that are not done. Raises, step by step, what `tokenize` raises.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
        loaded: LoadedModel,
        options: TokenizeOptions,
        *,
        queries: Mapping[str, Ids | str] | None = None,
        again: Collection[int] | None = None,
        on_progress: OnProgress | None = None,
        on_image: OnImage | None = None,
    ) -> None:
        self._options = options
        self._source, query_ids, self._writer = plan(source, output, loaded, options, queries)
        self._again = again
        if again is None and options.retry_errors:
            self._again = self._writer.units_with_errors or None
        self._already_complete = self._writer.complete and self._again is None
        self._begun = False
        self._seconds = 0.0
        self._workers = _workers(options, self._source.inputs)
        self._work = Work(
            loaded.model,
            self._source,
            self._writer,
            ShortSideCenterCrop(loaded.model.config.image_size, options.reduced),
            query_ids,
            Limits(self._workers, options.max_errors, options.rank, options.world_size),
            batch_size=options.batch_size,
            on_progress=on_progress,
            on_image=on_image,
        )

    @property
    def missing(self) -> list[int]:
        """The units that are not done, as far as is known here."""
        return self._writer.missing

    def begin(self) -> None:
        """Make the store, or join those who write it."""
        if not self._begun and not self._already_complete:
            with stopping(RESUME):
                self._writer.begin(join=self._options.join or self._options.world_size > 1, again=self._again)
            self._begun = True

    def run(self, units: Collection[int] | None = None) -> None:
        """Do the units that are missing, and `conclude`; or only those of them that are in `units`."""
        self._do(lambda: self._work.run(units))

    def conclude(self) -> None:
        """Take over what others did; if all units are done, finish the store."""
        self._do(self._work.conclude)

    def _do(self, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            self.begin()
            if not self._writer.complete:
                with stopping(RESUME):
                    work()
        finally:
            self._seconds += time.perf_counter() - start

    def is_done(self, unit: int) -> bool:
        """Tell whether a unit is done, by whomever."""
        return self._writer.is_done(unit)

    def close(self) -> None:
        """Leave the store to others."""
        self._writer.close()

    def report(self) -> TokenizeReport:
        """Return what there is now, and what this job did."""
        writer, inputs = self._writer, self._source.inputs
        return TokenizeReport(
            inputs=writer.records + writer.error_count if inputs is None else inputs,
            records=writer.records,
            tokens=writer.tokens,
            errors=writer.error_count,
            units=self._source.units,
            missing=len(writer.missing),
            computed=self._work.images,
            seconds=self._seconds,
            complete=writer.complete,
            already_complete=self._already_complete,
            quantization_error=writer.quantization_error,
            kept=tuple(writer.kept),
            stages=self._work.clock.shares(self._seconds, self._workers),
        )


def plan(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    loaded: LoadedModel,
    options: TokenizeOptions,
    queries: Mapping[str, Ids | str] | None = None,
) -> tuple[Source, dict[str, Ids], StoreWriter]:
    """Check everything that can be checked beforehand; returns what is read, queries as ids, and the store's writer.

    Nothing is written. Raises what `tokenize` raises before it writes.
    """
    query_ids = encode_texts(queries or {}, loaded.model.tokenizer)
    config = loaded.model.config
    check_length_options(config, options.length, options.max_length, options.eos_threshold, None)
    if options.codes and config.vqgan.num_vq_embeddings > MOST_CODES:
        raise ValueError(f"codes are kept as uint16, too narrow for a codebook of {config.vqgan.num_vq_embeddings}")
    opened = open_source(source, options.source_options())
    check_against(query_ids, opened.keys(), config)
    if options.shard_size * config.num_tokens >= 2**31:
        raise ValueError(f"shard_size must be below {2**31 // config.num_tokens} for this model")
    settings = _settings(opened, loaded, options, query_ids)
    return opened, query_ids, StoreWriter(Path(output), settings, _environment(source, loaded, options))


def _settings(
    source: Source, loaded: LoadedModel, options: TokenizeOptions, queries: Mapping[str, Ids]
) -> StoreSettings:
    config = loaded.model.config
    threshold = None
    if options.length is None:
        threshold = config.eos_threshold if options.eos_threshold is None else float(options.eos_threshold)
    return StoreSettings(
        config=config.to_dict(),
        fingerprint=loaded.fingerprint,
        transform=ShortSideCenterCrop(config.image_size, options.reduced).to_dict(),
        source=source.to_dict(),
        dtype=_token_dtype(loaded.model.dtype, options.token_dtype),
        width=config.generator.hidden_size,
        codes=options.codes,
        length=options.length,
        max_length=options.max_length,
        eos_threshold=threshold,
        queries_sha256=hash_queries(queries),
        shard_size=source.shard_size,
        units=source.units,
        inputs=source.inputs,
        inputs_sha256=source.identity(),
    )


def _token_dtype(model: torch.dtype, wanted: str | None) -> str:
    found = next((name for name, dtype in DTYPES.items() if dtype == model), None)
    if found is None:
        raise ValueError(
            f"tokens are stored as {', '.join(DTYPES)}, the model is {model}; load it with one of these dtypes"
        )
    return wanted or found


def _environment(source: str | os.PathLike[str], loaded: LoadedModel, options: TokenizeOptions) -> dict[str, str | int]:
    """What ran, for the manifest: with any of it changed, results differ by rounding."""
    from dove_fast import __version__

    versions = {name: metadata.version(name) for name in ("torch", "numpy", "pillow", "pyarrow", "safetensors")}
    return {
        "dove_fast": __version__,
        "python": platform.python_version(),
        **versions,
        "device": loaded.model.device.type,
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": options.batch_size,
        "source": located(os.fspath(source)),
        "source_as_given": os.fspath(source),
    }


def located(source: str) -> str:
    """Return a source such that it is found from any folder."""
    return source if "://" in source or source.startswith("pipe:") else os.path.abspath(source)


def _workers(options: TokenizeOptions, inputs: int | None) -> int:
    if options.workers is not None:
        return options.workers
    # The cores that this process may use, where the system can tell.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    most = min(MAX_DEFAULT_WORKERS, cores)
    return most if inputs is None else min(most, inputs // INPUTS_A_WORKER)
