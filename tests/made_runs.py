"""Small training runs: a folder of pictures with texts, and a configuration that uses every part of the trainer."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from made_pictures import make_pictures
from PIL import Image
from small_models import micro_model

from dove_fast.training import TrainConfig

WORDS = ("[UNK]", "the", "left", "right", "half", "all", "of", "it")


def make_tokenizer(path: Path) -> Path:
    """Write a tokenizers file with a word an id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def make_shard(folder: Path, pictures: Path) -> Path:
    """Write the pictures of a folder into one shard, each with a text and the box that it means."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, file in enumerate(sorted(path for path in pictures.rglob("*") if path.is_file())):
            with Image.open(file) as image:
                width, height = image.size
            half = [0, 0, width / 2, height] if number % 2 else [width / 2, 0, width, height]
            text = {"text": f"the {'left' if number % 2 else 'right'} half", "boxes": [half]}
            for suffix, content in ((file.suffix, file.read_bytes()), (".json", json.dumps(text).encode())):
                member = tarfile.TarInfo(f"{number:03d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def run_settings(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a run on made data below `folder`; `changes` are fields by section."""
    start, tokenizer, shards = folder / "start", folder / "tokenizer.json", folder / "shards"
    if not start.exists():
        # With a spread of lengths.
        micro_model().save_pretrained(start)
        make_tokenizer(tokenizer)
        make_shard(shards, make_pictures(folder / "pictures", 12))
    sections: dict[str, dict[str, Any]] = {
        "run": {
            "output": str(folder / "run"),
            "steps": 12,
            "batch_size": 4,
            "accumulation": 2,
            "frozen": "nothing",
            "ema_decay": 0.9,
            "forced_length_share": 0.3,
            "codebook_restart_steps": 4,
            "seed": 3,
        },
        "model": {"checkpoint": str(start), "tokenizer": str(tokenizer)},
        "data": {"kind": "webdataset", "path": str(shards), "smallest_crop": 0.8},
        "validation": {"path": str(folder / "pictures")},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3},
        "loss": {
            "perceptual_weight": 0.0,
            "adversarial_weight": 0.1,
            "adversarial_start": 5,
            "adaptive_adversarial": True,
            "codebook_weight": 1.0,
            "commitment_weight": 0.25,
            "eos_weight_start": 1e-3,
            "eos_weight_steps": 8,
        },
        "discriminator": {"channels": 16, "layers": 1},
        "report": {
            "log_steps": 1,
            "validation_steps": 5,
            "validation_images": 8,
            "picture_steps": 10,
            "pictures": 4,
            "checkpoint_steps": 3,
            "keep_checkpoints": 2,
        },
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    return sections


def make_run(folder: Path, **changes: dict[str, Any]) -> TrainConfig:
    """Return `run_settings` as a configuration."""
    return TrainConfig.from_dict(run_settings(folder, **changes))


def write_toml(path: Path, sections: dict[str, Any]) -> Path:
    """Write sections of numbers, strings and booleans as TOML; JSON spells those alike."""
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path
