"""The sides of bench_offline.py, each built in a process of its own that keeps freed memory, as the commands do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dove_fast
from dove_fast import DOVE
from dove_fast.data import ShortSideCenterCrop, decode_image, list_inputs
from dove_fast.generation import LengthHistogram, TokenStream
from dove_fast.jobs import LoadedModel, TokenizeOptions, load_model, tokenize
from dove_fast.jobs.progress import Progress

Functions = tuple[Callable[[], Any], Callable[[], Any]]

# How many images are a unit: the command's default.
SHARD = 1024


def shipped(device: str) -> LoadedModel:
    """Return the shipped model, in bf16 on a GPU, in a process that keeps freed memory on a CPU."""
    if device == "cpu":
        assert dove_fast.keep_freed_memory(), "this malloc cannot keep freed memory, as the command does"
    return load_model(device=device, dtype=None if device == "cpu" else "bfloat16")


def job(
    source: Path, store: Path, device: str, size: int, *, reduced: bool = False, workers: int | None = None
) -> Functions:
    """The job from nothing, in batches of `size`; reports its seconds and those of its stages, the last time."""
    loaded = shipped(device)
    options = TokenizeOptions(batch_size=size, shard_size=SHARD, reduced=reduced, workers=workers)
    last: list[tuple[float, dict[str, float]]] = []

    def run() -> None:
        shutil.rmtree(store, ignore_errors=True)
        told: list[Progress] = []
        found = tokenize(source, store, loaded, options, on_progress=told.append)
        last[:] = [(found.seconds, dict(told[-1].stage_seconds))]

    return run, lambda: last[0]


def bare(pictures: Path, device: str, size: int) -> Functions:
    """The stream over images in memory, unit by unit as the job goes; reports the tokens of the last time."""
    model = shipped(device).model
    transform = ShortSideCenterCrop(model.config.image_size)
    images = [torch.from_numpy(transform(decode_image(item.path).image)) for item in list_inputs(pictures)]
    tokens: list[torch.Tensor] = []

    def run() -> None:
        tokens.clear()
        for first in range(0, len(images), SHARD):
            stream = TokenStream(
                model,
                images[first : first + SHARD],
                batch_size=size,
                histogram=LengthHistogram(model.config.num_tokens),
            )
            tokens.extend(item.tokens for item in stream)

    return run, lambda: [numbers(row) for row in tokens]


def script(pictures: Path, output: Path, device: str, size: int, *, keep: bool) -> Functions:
    """The script that one would write, in a process that keeps freed memory or not; reports the last run's folder.

    A run has a new folder in `output`: clearing thousands of files is not what is timed.
    """
    loaded = shipped(device) if keep else load_model(device=device, dtype=None if device == "cpu" else "bfloat16")
    model: DOVE = loaded.model
    transform = ShortSideCenterCrop(model.config.image_size)
    files = sorted(pictures.iterdir())

    folders: list[Path] = []

    def run() -> None:
        folder = output / str(len(folders))
        folder.mkdir(parents=True)
        folders.append(folder)
        for first in range(0, len(files), size):
            some = files[first : first + size]
            batch = torch.from_numpy(np.stack([transform(Image.open(file).convert("RGB")) for file in some]))
            for file, tokens in zip(some, model.tokenize(batch.to(model.device)), strict=True):
                np.save(folder / f"{file.stem}.npy", numbers(tokens))

    return run, lambda: folders[-1]


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """Return what travels between processes."""
    return tensor.float().cpu().numpy()
