"""What an evaluation's figures were measured with, and what a reader of them must know."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dove_fast.data import ShortSideCenterCrop
from dove_fast.evaluation.extractors import PUBLISHED, InceptionFeatures
from dove_fast.evaluation.results import FIXED, VQGAN_ALONE, Measure, QualityRow
from dove_fast.evaluation.vqgan_alone import NO_BASELINE, is_no_baseline
from dove_fast.models.dove import DOVE
from dove_fast.store.layout import DTYPES

__all__ = ["CODEBOOK", "COMPLEXITY", "COST", "REGIONS", "describe_model", "warnings_of"]

CODEBOOK = Measure(
    "codebook", "nearest codewords of all images; the perplexity is e to the entropy of their shares, in nats"
)
COST = Measure(
    "cost",
    "counted from the layers' shapes, 2 FLOP a multiply-add, from the image to the picture; the bytes of the tokens in "
    "a token store of the weights' dtype, of the VQGAN alone its codes in uint16; means over the lengths",
)
COMPLEXITY = Measure(
    "complexity",
    "variance of the Laplacian (four neighbours, inside the border) of the grey image in [0, 255] after the transform; "
    "Spearman's rank correlation with the adaptive length, equal values having their mean rank",
)
REGIONS = Measure(
    "grounding",
    "squared error and PSNR inside and outside the union of a text's boxes, means over the samples; the tokens with "
    "the text and without it, of the same images",
)


def warnings_of(
    images: int, inception: InceptionFeatures | None, rows: Sequence[QualityRow], *, own_vqgan: bool
) -> tuple[str, ...]:
    """Return what a reader of the rows must know. own_vqgan: whether the VQGAN alone is the model's own."""
    found = []
    if inception is not None and images <= inception.dimension:
        found.append(
            f"rFID of {images} images, not more than the {inception.dimension} features: their covariance has not full "
            "rank. FID is biased upwards at every number of images, and far more at so few; compare it only with "
            "others of as many images"
        )
    if inception is not None and not inception.published:
        found.append(
            f"rFID by weights that are not the published file, whose SHA-256 begins with {PUBLISHED}: unless they are "
            "the same in another file, compare it with nothing published"
        )
    alone = next(row for row in rows if row.kind == VQGAN_ALONE)
    best = max(row.psnr.mean for row in rows if row.kind == FIXED)
    if is_no_baseline(alone.psnr.mean, best, own=own_vqgan):
        found.append(NO_BASELINE)
    return tuple(found)


def describe_model(model: DOVE) -> dict[str, Any]:
    """Return the fields of `Context` that follow from the model and where it runs."""
    transform = ShortSideCenterCrop(model.config.image_size).to_dict()
    return {
        "image_size": model.config.image_size,
        "transform": transform["name"],
        "resample": transform["resample"],
        "device": model.device.type,
        "device_name": _device_name(model.device),
        "dtype": next((name for name, dtype in DTYPES.items() if dtype == model.dtype), str(model.dtype)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
