"""Decoding a token store back to PNG files."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from dove_fast.atomic import remove_temporaries, replacing
from dove_fast.errors import StoreError
from dove_fast.failures import stopping
from dove_fast.jobs.loading import LoadedModel
from dove_fast.jobs.notice import NOTICE_NAME, check_output
from dove_fast.jobs.progress import OnProgress, Progress
from dove_fast.models.inputs import check_length_options
from dove_fast.ragged import RaggedTokens
from dove_fast.store.layout import settings_id
from dove_fast.store.reader import TokenStore

__all__ = ["ReconstructReport", "picture_names", "reconstruct"]

# What stands for ".." in the name of a picture, so that every picture lies below the output.
PARENT = "_"


@dataclass(frozen=True)
class ReconstructReport:
    """How many pictures this run wrote, from how many tokens, in how many seconds."""

    images: int
    tokens: int
    seconds: float


def reconstruct(
    store: TokenStore,
    output: str | os.PathLike[str],
    loaded: LoadedModel,
    *,
    length: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> ReconstructReport:
    """Decode every image of a store and write it as `output`/<key>.png, the key without its ending.

    `length` decodes exactly the first so many tokens of each image, `max_length` at most so many: what fewer tokens
    would have kept of it. Values are clamped to [0, 1] and rounded to 8 bits; each picture
    appears by temporary file and rename. See `picture_names` for keys that would collide or leave `output`.

    A run that was stopped goes on where it was: pictures that are there stay. `output` must be empty or hold an earlier
    run's pictures of the same store and options.

    Raises `StoreError` if the store was made with another checkpoint; `ValueError` if `output` holds anything else or
    if an image has fewer than `length` tokens; `TypeError` and `ValueError` for lengths as `DOVE.tokenize` does; then
    `JobError` when the disk or the memory fails.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_length_options(loaded.model.config, length, max_length, None, None)
    expected = store.manifest["settings"]["fingerprint"]
    if loaded.fingerprint != expected:
        raise StoreError(
            f"{store.directory} was made with another checkpoint: its fingerprint is {expected}, "
            f"this checkpoint's is {loaded.fingerprint}; give the one that made it"
        )
    target = Path(output)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} exists and is not a directory; choose another output")
    if length is not None and len(store) and store.lengths.min() < length:
        raise ValueError(f"{store.directory} has images of {store.lengths.min()} tokens, too few for length={length}")
    names = picture_names(store.keys)
    notice = {"pictures_of": settings_id(store.manifest["settings"]), "length": length, "max_length": max_length}
    check_output(
        target, notice, holds_none="no pictures of a store", holds_other="pictures of another store or of other lengths"
    )
    start = time.perf_counter()
    images_done = tokens_done = 0
    with stopping("run the same command again to go on"):
        target.mkdir(parents=True, exist_ok=True)
        remove_temporaries(target)
        with replacing(target / NOTICE_NAME) as file:
            file.write(json.dumps(notice).encode() + b"\n")
        for first in range(0, len(store), batch_size):
            rows = range(first, min(first + batch_size, len(store)))
            if all(_is_there(target / names[row]) for row in rows):
                continue
            tokens = _first(store.ragged(rows), length or max_length).to(loaded.model.device)
            images = loaded.model.decode(tokens).float().clamp(0, 1)
            pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
            for row, picture in zip(rows, pixels, strict=True):
                _write_png(target / names[row], picture)
            images_done += len(rows)
            tokens_done += tokens.values.shape[0]
            if on_progress is not None:
                on_progress(Progress(rows.stop, len(store), images_done, tokens_done))
    return ReconstructReport(images_done, tokens_done, time.perf_counter() - start)


def _first(tokens: RaggedTokens, limit: int | None) -> RaggedTokens:
    """Keep at most the first `limit` tokens of each row."""
    if limit is None:
        return tokens
    padded, lengths = tokens.to_padded()
    return RaggedTokens.from_padded(padded, lengths.clamp(max=limit))


def _is_there(path: Path) -> bool:
    # Pictures are not synced: after a power failure one may be there without its bytes.
    return path.is_file() and path.stat().st_size > 0


def _write_png(path: Path, pixels: torch.Tensor) -> None:
    from PIL import Image

    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as file:
        Image.fromarray(pixels.numpy()).save(file, format="PNG")


def picture_names(keys: Sequence[str]) -> list[str]:
    """Return one relative POSIX path a key, all different, none leading out of the folder it is joined to.

    The ending becomes .png: `a/b.jpg` gives `a/b.png`. Where that would collide, with another picture or with a
    folder, .png is put behind the ending: `b.jpg` and `b.webp` give `b.jpg.png` and `b.webp.png`. A leading / is
    dropped and `..` becomes `_`. Raises `StoreError` for keys that have no picture name of their own even so.
    """
    safe = [_inside(key) for key in keys]
    names = [PurePosixPath(path).with_suffix(".png").as_posix() for path in safe]
    # Every round gives full names to the pictures that collide; full names stay, so there are few rounds.
    while True:
        counts = Counter(names)
        folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
        clashing = [row for row, name in enumerate(names) if counts[name] > 1 or name in folders]
        changed = [row for row in clashing if names[row] != f"{safe[row]}.png"]
        if not changed:
            break
        for row in changed:
            names[row] = f"{safe[row]}.png"
    if clashing:
        raise StoreError(f"keys lead to the same picture: {', '.join(repr(keys[row]) for row in clashing[:5])}")
    return names


def _inside(key: str) -> str:
    parts = [PARENT if part == ".." else part for part in PurePosixPath(key).parts if part != "/" and part != "//"]
    if not parts or "\0" in key:
        raise StoreError(f"key {key!r} cannot be the name of a picture")
    return "/".join(parts)
