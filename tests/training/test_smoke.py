"""Both stages on the real photographs, small and short: what they minimise falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import micro_config

from dove_fast.training import TrainConfig, train
from dove_fast.training.distributed import Ranks
from dove_fast.training.log import read_log

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
COUNT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The photographs, smaller, so that decoding them takes no time, and the sizes of a micro model."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "photos").mkdir()
    for path in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(path) as image:
            image.thumbnail((96, 96))
            image.convert("RGB").save(folder / "photos" / f"{path.stem}.png")
    assert len(list((folder / "photos").iterdir())) == COUNT
    (folder / "sizes.json").write_text(micro_config().to_json())
    return folder


def run(
    folder: Path, stage: str, steps: int, model: dict[str, str], learning_rate: float, **loss: float
) -> tuple[Path, list[float], float]:
    """Train; return the model, the error of every step, and that of the averaged weights at the end."""
    photos = {"path": str(folder / "photos"), "smallest_crop": 0.8}
    config = TrainConfig.from_dict(
        {
            "run": {
                "output": str(folder / stage),
                "stage": stage,
                "steps": steps,
                "batch_size": COUNT,
                # Not every start learns so fast; this one does with any order of the data.
                "seed": 1,
                "ema_decay": 0.8,
                "codebook_restart_steps": 5 if stage == "vqgan" else 0,
            },
            "model": model,
            "data": photos,
            "validation": photos,
            "optimizer": {"learning_rate": learning_rate, "warmup_steps": 5},
            "loss": {"perceptual_weight": 0.0, "adversarial_weight": 0.0, **loss},
            "report": {"log_steps": 1, "validation_steps": steps, "validation_images": COUNT, "picture_steps": 0},
        }
    )
    report = train(config, Ranks(0, 1, torch.device("cpu")))
    lines = read_log(folder / stage)
    errors = [line["mse"] for line in lines if line["kind"] == "train"]
    (validated,) = [line["mse"] for line in lines if line["kind"] == "validation"]
    assert len(errors) == steps and report.skipped == 0 and report.model is not None
    return report.model, errors, validated


def error_of_one_colour(folder: Path) -> float:
    """The best that a model can do that does not look at the photographs."""
    pixels = [np.asarray(Image.open(path)).reshape(-1, 3) / 255 for path in (folder / "photos").iterdir()]
    colour = np.mean([photo.mean(axis=0) for photo in pixels], axis=0)
    return float(np.mean([((photo - colour) ** 2).mean() for photo in pixels]))


def fall(errors: list[float]) -> float:
    return float(np.mean(errors[-5:]) / np.mean(errors[:5]))


@pytest.fixture(scope="module")
def vqgan(folder):
    sizes = {"config": str(folder / "sizes.json")}
    return run(folder, "vqgan", 80, sizes, 3e-3, mse_weight=30.0, codebook_weight=1.0, commitment_weight=0.25)


def test_the_vqgan_learns(folder, vqgan):
    _, errors, validated = vqgan
    # A fifth or less with four seeds.
    assert fall(errors) < 0.4
    assert validated < 0.75 * error_of_one_colour(folder)


def test_the_tokens_learn_from_its_checkpoint(folder, vqgan):
    start, _, floor = vqgan
    _, errors, validated = run(folder, "dove", 40, {"checkpoint": str(start)}, 5e-3, mse_weight=10.0)
    # Half or less with four orders of the data.
    assert fall(errors) < 0.7
    assert validated < 0.75 * error_of_one_colour(folder)
    # Through the VQGAN's frozen decoder it gets no better than that.
    assert validated > 0.9 * floor
