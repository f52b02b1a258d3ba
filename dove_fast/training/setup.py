"""From a run's configuration to its parts: the model, the loss and the run's directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dove_fast.atomic import is_temporary, make_directory, remove_temporaries, replacing
from dove_fast.config import DOVEConfig
from dove_fast.errors import CheckpointError
from dove_fast.failures import JobError
from dove_fast.losses import LPIPS, PatchDiscriminator, QDOVELoss
from dove_fast.models.dove import DOVE
from dove_fast.text import TextTokenizer
from dove_fast.training.config import ModelSource, TrainConfig
from dove_fast.training.log import PICTURES

__all__ = ["build_loss", "build_model", "run_directory"]

logger = logging.getLogger(__name__)

RUN_NAME, LOCK_NAME, MODEL = "run.json", "run.lock", "model"
FORMAT_VERSION = 1

# What may differ between a run and the one that goes on with it: what is written, how fast, and how long.
FREE = {"report": None, "validation": None, "run": {"output", "nonfinite_limit"}, "data": {"workers"}}


def build_model(source: ModelSource, seed: int) -> DOVE:
    """Return the model that a run starts from, in fp32; random weights follow from `seed`.

    Raises what `DOVE.from_pretrained` and `DOVEConfig.from_json` raise.
    """
    if source.checkpoint:
        model = DOVE.from_pretrained(source.checkpoint).float()
    else:
        presets = {"base": DOVEConfig.base, "tiny": DOVEConfig.tiny}
        config = presets[source.preset]() if source.preset else DOVEConfig.from_json(Path(source.config))
        with _seeded(seed):
            model = DOVE(config)
    if source.tokenizer:
        model.tokenizer = TextTokenizer(source.tokenizer)
    if model.tokenizer is not None and model.tokenizer.vocab_size > model.config.generator.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {model.tokenizer.vocab_size - 1}, the model's query embedding "
            f"{model.config.generator.vocab_size} rows: give the model a larger generator.vocab_size"
        )
    return model


def build_loss(config: TrainConfig, *, allow_download: bool) -> tuple[QDOVELoss, nn.Module | None]:
    """Return the loss and its discriminator, None where none is used; their random weights follow from the seed."""
    discriminator, perceptual = None, None
    with _seeded(config.run.seed):
        if config.loss.adversarial_weight:
            discriminator = PatchDiscriminator(config.discriminator.channels, config.discriminator.layers)
            logger.info("the discriminator starts from random weights at step %d", config.loss.adversarial_start)
        if config.loss.perceptual_weight:
            perceptual = LPIPS(
                config.perceptual.net, weights=config.perceptual.weights or None, allow_download=allow_download
            )
    return QDOVELoss(config.loss, perceptual=perceptual, discriminator=discriminator), discriminator


@contextlib.contextmanager
def run_directory(config: TrainConfig, *, allow_download: bool = False) -> Iterator[Path]:
    """Make or open the run's directory and hold it against other processes until the block ends.

    allow_download: as in `build_loss`; it decides which LPIPS the run has.

    Raises `ValueError` for one that holds something else or a run with other settings, `JobError` where another process
    has it, `CheckpointError` for settings that are damaged.
    """
    output = Path(config.run.output)
    settings = output / RUN_NAME
    downloads = allow_download and config.loss.perceptual_weight > 0 and not config.perceptual.weights
    if not settings.exists():
        # A run that was killed while it wrote its settings leaves a temporary file.
        if output.exists() and any(e.name != LOCK_NAME and not is_temporary(e.name) for e in output.iterdir()):
            raise ValueError(f"{output} is not empty and holds no run; choose another [run] output")
        make_directory(output)
    with (output / LOCK_NAME).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"another process trains in {output}; wait for it or choose another output") from None
        if settings.exists():
            _check_settings(settings, config, downloads)
        for folder in (output, output / PICTURES, output / MODEL):
            remove_temporaries(folder)
        with replacing(settings) as file:
            content = {"format_version": FORMAT_VERSION, "config": config.to_dict(), "downloaded": downloads}
            file.write((json.dumps(content, indent=2) + "\n").encode())
        yield output


def _check_settings(path: Path, config: TrainConfig, downloads: bool) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, earlier = content["format_version"], dict(content["config"])
        downloaded = bool(content["downloaded"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); choose another [run] output") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, this package reads {FORMAT_VERSION}")
    try:
        # With the defaults of fields that are newer than the run.
        earlier = TrainConfig.from_dict(earlier).to_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no run of this version ({error}); choose another [run] output") from None
    if downloaded != downloads:
        raise ValueError(
            f"{path.parent} holds a run {'with' if downloaded else 'without'} --allow-download, whose LPIPS is another "
            f"one; go on in the same way, or choose another [run] output"
        )
    now = config.to_dict()
    for section in sorted(earlier.keys() | now.keys()):
        free: set[str] | None = FREE.get(section, set())
        if free is None:
            continue
        if section == "run" and config.optimizer.schedule == "constant":
            # A cosine would have another curve.
            free = {*free, "steps"}
        before: dict[str, Any] = earlier.get(section, {})
        after: dict[str, Any] = now.get(section, {})
        for key in sorted((before.keys() | after.keys()) - free):
            if before.get(key) != after.get(key):
                raise ValueError(
                    f"{path.parent} holds a run with [{section}] {key} = {before.get(key)!r}, now it is "
                    f"{after.get(key)!r}; choose another [run] output, or go on with the earlier value"
                )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers within the block, and leave those outside as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
