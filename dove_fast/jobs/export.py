"""Writing a token store in the formats of other libraries."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dove_fast.atomic import make_directory, remove_temporaries, replacing
from dove_fast.failures import stopping
from dove_fast.jobs.notice import NOTICE_NAME, check_output
from dove_fast.jobs.progress import OnProgress, Progress
from dove_fast.store.exporters import ExportFile
from dove_fast.store.exporters.megatron import megatron_files
from dove_fast.store.exporters.table import arrow_files, parquet_files
from dove_fast.store.exporters.webdataset import webdataset_files
from dove_fast.store.layout import settings_id
from dove_fast.store.reader import TokenStore

__all__ = ["FORMATS", "ExportReport", "export"]

FORMATS: dict[str, Callable[[TokenStore, int], Iterator[ExportFile]]] = {
    "webdataset": webdataset_files,
    "parquet": parquet_files,
    "arrow": arrow_files,
    "megatron": megatron_files,
}
# Images between two calls of `on_progress`.
PROGRESS_IMAGES = 256


@dataclass(frozen=True)
class ExportReport:
    """How many images and tokens, megatron: codes, this run wrote into how many files, in how many seconds."""

    images: int
    tokens: int
    files: int
    seconds: float


def export(
    store: TokenStore,
    output: str | os.PathLike[str],
    format: str,
    *,
    shard_size: int = 1024,
    on_progress: OnProgress | None = None,
) -> ExportReport:
    """Write every image of a store into files below `output`, in `format`, a key of `FORMATS`.

    `webdataset`: 000000.tar and on; `parquet` and `arrow`: 000000.parquet, 000000.arrow and on, Arrow in the streaming
    format; each of `shard_size` images. `megatron`: tokens.bin and tokens.idx, of the codes. Tokens are float16 where
    the store's are, float32 otherwise. Each file appears by temporary file and rename; no file is in memory whole.

    A run that was stopped goes on where it was: whole files that are there stay. `output` must be empty or hold an
    earlier export of the same store, format and shard size.

    Raises `ValueError` for another format or a shard size below 1, for megatron if the store has no codes, and if
    `output` holds anything else; `StoreError` for a damaged store; then `JobError` when the disk or the memory fails.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if isinstance(shard_size, bool) or not isinstance(shard_size, int):
        raise TypeError(f"shard_size must be an int, got {shard_size!r}")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    files = FORMATS[format](store, shard_size)
    target = Path(output)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} exists and is not a directory; choose another output")
    notice = {
        # With the shards' checksums: the same settings may have given other tokens, or set other images aside.
        "export_of": settings_id({name: store.manifest[name] for name in ("settings", "shards")}),
        "format": format,
        "shard_size": None if format == "megatron" else shard_size,
    }
    check_output(
        target,
        notice,
        holds_none="no export of a store",
        holds_other="what was made of another store, or in another format or shard size",
    )
    start = time.perf_counter()
    written = 0
    counter = _Counter(len(store), on_progress)
    with stopping("run the same command again to go on"):
        make_directory(target)
        remove_temporaries(target)
        with replacing(target / NOTICE_NAME) as stream:
            stream.write(json.dumps(notice).encode() + b"\n")
        for file in files:
            if _is_there(target, file):
                counter.done += len(file.rows)
                continue
            with replacing(target / file.name) as stream:
                file.write(stream, counter.add)
            written += 1
            counter.show()
    return ExportReport(counter.images, counter.tokens, written, time.perf_counter() - start)


def _is_there(target: Path, file: ExportFile) -> bool:
    try:
        with open(target / file.name, "rb") as stream:
            return file.is_whole(stream)
    except FileNotFoundError:
        return False


class _Counter:
    """Counts the images that are done and, of those that this run wrote, their tokens."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._total = total
        self._on_progress = on_progress
        self.done = self.images = self.tokens = 0

    def add(self, tokens: int) -> None:
        """Count an image that was written."""
        self.done += 1
        self.images += 1
        self.tokens += tokens
        if self.images % PROGRESS_IMAGES == 0:
            self.show()

    def show(self) -> None:
        """Tell how far the job is."""
        if self._on_progress is not None:
            self._on_progress(Progress(self.done, self._total, self.images, self.tokens))
