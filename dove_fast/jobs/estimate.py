"""What a tokenization job would take: inputs counted, a few of them done, the rest in proportion."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dove_fast.data import EncodedImage, ShortSideCenterCrop, Source, Unusable, load_image
from dove_fast.generation import TokenStream
from dove_fast.jobs.loading import LoadedModel
from dove_fast.jobs.progress import describe_seconds
from dove_fast.jobs.queries import Ids
from dove_fast.jobs.tokenize import TokenizeOptions, plan
from dove_fast.store.layout import TOKEN_DTYPES
from dove_fast.words import counted

__all__ = ["Estimate", "estimate"]

# Batches that are done: the first one warms up, the others are timed together, from the first image to the last token.
BATCHES = 3
# A record beside its tokens: its key twice, its source, and its numbers, before compression.
RECORD_BYTES = 150


@dataclass(frozen=True)
class Estimate:
    """What is known of a job before it runs: `tried` of the inputs were decoded and tokenized, `failed` could not be.

    `inputs`: None where only reading tells. `units`, and how many of them are done. `images_per_second`: of one
    process, decoding included and not overlapped, so a job is faster; None where no image could be tried.
    `mean_tokens`, and `bytes_per_image` in the store, of those that were tried.
    """

    inputs: int | None
    units: int
    units_done: int
    tried: int
    failed: int
    images_per_second: float | None
    mean_tokens: float | None
    bytes_per_image: float | None

    def text(self) -> str:
        """Return the estimate in words, some lines."""
        known = counted(self.inputs, "input") if self.inputs is not None else "inputs that only reading counts"
        lines = [f"{known} in {counted(self.units, 'unit')}, {self.units_done:,} of them done"]
        if self.images_per_second is None or self.bytes_per_image is None:
            lines.append(f"none of {counted(self.failed, 'input')} tried could be used")
            return "\n".join(lines)
        lines.append(
            f"of {counted(self.tried + self.failed, 'input')} tried {self.failed:,} cannot be used; "
            f"{self.images_per_second:.1f} images/s or more, {self.mean_tokens:.1f} tokens and "
            f"{self.bytes_per_image / 1024:.1f} KiB an image"
        )
        if self.inputs is not None:
            left = self.inputs * (1 - self.units_done / self.units)
            lines.append(
                f"that is {describe_seconds(left / self.images_per_second)} or less for what is left, and "
                f"{self.inputs * self.bytes_per_image / 2**30:.2f} GiB for all"
            )
        lines.append("nothing was written")
        return "\n".join(lines)


def estimate(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    loaded: LoadedModel,
    options: TokenizeOptions | None = None,
    *,
    queries: Mapping[str, Ids | str] | None = None,
) -> Estimate:
    """Check a job as `tokenize` does, and try its first inputs; nothing is written. Raises what `tokenize` raises."""
    options = options or TokenizeOptions()
    opened, query_ids, writer = plan(source, output, loaded, options, queries)
    failed = 0

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal failed
        transform = ShortSideCenterCrop(loaded.model.config.image_size, options.reduced)
        for item in itertools.islice(_all(opened), BATCHES * options.batch_size):
            image = load_image(item.content, transform) if isinstance(item, EncodedImage) else item.reason
            if isinstance(image, str):
                failed += 1
            else:
                yield torch.from_numpy(image.pixels), torch.tensor(query_ids.get(item.key, ()), dtype=torch.int64)

    def lengths_of(some: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
        stream = TokenStream(
            loaded.model,
            some,
            batch_size=options.batch_size,
            length=options.length,
            max_length=options.max_length,
            eos_threshold=options.eos_threshold,
            codes=options.codes,
        )
        return [item.tokens.shape[0] for item in stream]

    # Streams of their own: one hands tokens over in input order, many at once, so no moment within it says how fast.
    waiting = images()
    start = time.perf_counter()
    lengths = lengths_of(itertools.islice(waiting, options.batch_size))
    timed, took = len(lengths), time.perf_counter() - start
    start = time.perf_counter()
    others = lengths_of(waiting)
    if others:
        timed, took = len(others), time.perf_counter() - start
    lengths += others
    tried = len(lengths)
    mean = sum(lengths) / tried if tried else None
    return Estimate(
        inputs=opened.inputs,
        units=opened.units,
        units_done=opened.units - len(writer.missing),
        tried=tried,
        failed=failed,
        images_per_second=timed / took if tried else None,
        mean_tokens=mean,
        bytes_per_image=None if mean is None else _bytes(mean, loaded, writer.settings.dtype, options.codes),
    )


def _all(source: Source) -> Iterator[EncodedImage | Unusable]:
    return (item for unit in range(source.units) for item in source.read(unit))


def _bytes(mean: float, loaded: LoadedModel, dtype: str, codes: bool) -> float:
    config = loaded.model.config
    scale = 4 if dtype == "int8" else 0
    token = config.generator.hidden_size * TOKEN_DTYPES[dtype].itemsize + scale
    return mean * token + RECORD_BYTES + (2 * config.num_features if codes else 0)
