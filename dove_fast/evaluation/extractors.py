"""The networks that LPIPS and FID look through: published weights from a file, or no number at all.

Both are left out where there are no weights, and the `Measure` says so: a random network's distance is no LPIPS, and
its Frechet distance no FID.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dove_fast.errors import CheckpointError
from dove_fast.evaluation.results import Measure
from dove_fast.losses.perceptual import BACKBONES, LPIPS
from dove_fast.store.layout import hash_file

__all__ = ["PUBLISHED", "InceptionFeatures", "PerceptualDistance", "load_inception", "load_lpips"]

# What torch-fidelity calls the layer that FID is computed on, and its width.
LAYER, WIDTH = "2048", 2048
INCEPTION = "Inception-v3 {}, as torch-fidelity has it, pooled features of 2048 dimensions"
OF_FID, OF_ANOTHER_FILE = "of the original FID", "with the weights of {}, which is not the published file"
# How the SHA-256 of the published file begins, which it is named after.
PUBLISHED = "6726825d"
TO_INCEPTION = "8-bit pixels, bilinear to 299 x 299 as TensorFlow 1 does it, without antialiasing"


class PerceptualDistance:
    """LPIPS as it is published: one number an image. Takes images and reconstructions (B, 3, S, S) in [0, 1]."""

    def __init__(self, network: LPIPS, measure: Measure) -> None:
        self.measure = measure
        self._network = network
        # The loss takes a distance at every pixel; the published measure is the mean over each layer's own grid.
        inner: Any = network.lpips
        inner.spatial = False

    def __call__(self, images: Tensor, made: Tensor) -> Tensor:
        """Return the distances (B,) fp32."""
        with _exact_convolutions():
            distances: Tensor = self._network(images, made)
        return distances.flatten()


class InceptionFeatures:
    """What FID compares: takes images (B, 3, S, S) in [0, 1] or uint8, and gives features (B, 2048) fp32.

    `published`: whether the weights are the file that FID is published with.
    """

    dimension = WIDTH

    def __init__(self, network: Any, measure: Measure, *, published: bool = True) -> None:
        self.measure = measure
        self.published = published
        self._network = network

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, 2048); floating images are rounded to 8 bits before, as files of them would be."""
        pixels = images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().to(torch.uint8)
        with _exact_convolutions():
            features: Tensor = self._network(pixels)[0]
        return features


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Compute convolutions on a GPU in fp32 and not in TF32, which would be another number."""
    cudnn: Any = torch.backends.cudnn
    # `flags` sets what it is not given to values of its own.
    options = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    if cudnn.is_available():
        options["benchmark_limit"] = cudnn.benchmark_limit
    with cudnn.flags(**options, allow_tf32=False):
        yield


def load_lpips(
    weights: str | os.PathLike[str] | None,
    *,
    net: str = "vgg",
    allow_download: bool = False,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
) -> tuple[PerceptualDistance | None, Measure]:
    """Return LPIPS with a backbone's weights, and how it measures; None and why where there are no weights.

    weights, net, allow_download: as in `losses.LPIPS`, but for random weights, which are never used. image_size: pixels
    a side of the images that will come. Raises what `LPIPS` raises, and `ValueError` for images too small for `net`.
    """
    parameters = f"{net}, version 0.1, the mean over pixels and layers' sum; images at their own size"
    if weights is None and not allow_download:
        return None, Measure("LPIPS", parameters, left_out="no backbone weights: give --lpips-weights FILE")
    network = LPIPS(net, weights=weights, allow_download=allow_download).to(device)
    model, least = BACKBONES[net]
    if image_size is not None and image_size < least:
        raise ValueError(f"LPIPS with {net} needs images of {least} pixels a side, these have {image_size}")
    file = Path(weights) if weights is not None else _downloaded(_torchvision_url(model))
    measure = Measure(
        "LPIPS",
        parameters,
        extractor=f"torchvision {model}, {file.name}; linear layers of lpips {metadata.version('lpips')}",
        sha256=hash_file(file),
        resize="none",
    )
    return PerceptualDistance(network, measure), measure


def load_inception(
    weights: str | os.PathLike[str] | None, *, allow_download: bool = False, device: torch.device | str = "cpu"
) -> tuple[InceptionFeatures | None, Measure]:
    """Return FID's feature extractor, and how it measures; None and why where there are no weights.

    weights: the file that torch-fidelity and torchmetrics load, `weights-inception-2015-12-05-6726825d.pth`;
    `allow_download=True` without one lets torch-fidelity download it.
    Raises `ImportError` where torch-fidelity cannot be imported, `FileNotFoundError` for no such file and
    `CheckpointError` for one that is damaged or holds another network.
    """
    parameters = (
        "squared Frechet distance of the features' means and unbiased covariances, in fp64; the reference is the same "
        "images after the transform, in 8 bits, and reconstructions are rounded to 8 bits"
    )
    if weights is None and not allow_download:
        return None, Measure("rFID", parameters, left_out="no Inception weights: give --inception-weights FILE")
    path = None if weights is None else Path(weights)
    if path is not None:
        _check_tensors(path)
    module = _torch_fidelity()
    try:
        network = module.FeatureExtractorInceptionV3("inception", [LAYER], None if path is None else str(path))
    except RuntimeError as error:
        if path is None:
            raise
        # torch's list of the keys that do not fit, the first line of which says what it is.
        raise CheckpointError(
            f"{path} is not torch-fidelity's Inception-v3: {str(error).splitlines()[0]} {_first_problem(error)}"
        ) from error
    file = path or _downloaded(module.URL_INCEPTION_V3)
    sha256 = hash_file(file)
    published = sha256.startswith(PUBLISHED)
    extractor = INCEPTION.format(OF_FID if published else OF_ANOTHER_FILE.format(file.name))
    measure = Measure("rFID", parameters, extractor=extractor, sha256=sha256, resize=TO_INCEPTION)
    return InceptionFeatures(network.to(device).eval(), measure, published=published), measure


def _torch_fidelity() -> Any:
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch raises RuntimeError.
        raise ImportError(
            f"rFID needs torch-fidelity and a torchvision that goes with torch {torch.__version__}, which cannot be "
            f"imported ({error}); pip install 'dove-fast[eval]'"
        ) from error


def _check_tensors(path: Path) -> None:
    """Refuse a file that holds anything but tensors: torch-fidelity would run what is pickled in it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file of Inception weights at {path}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # torch has no one exception for a file that is truncated, not its own, or would run code.
        raise CheckpointError(f"{path} is damaged, or no file of tensors alone: {error}") from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, got {type(tensors).__name__}")


def _first_problem(error: RuntimeError) -> str:
    lines = str(error).splitlines()
    return lines[1].strip()[:200] if len(lines) > 1 else ""


def _torchvision_url(model: str) -> str:
    # The weights that lpips asks for.
    weights = importlib.import_module("torchvision.models").get_model_weights(model)
    return str(weights.IMAGENET1K_V1.url)


def _downloaded(url: str) -> Path:
    """Return where torch keeps what it downloaded from `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
