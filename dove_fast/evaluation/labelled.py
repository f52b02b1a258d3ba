"""Images with a class each, to train and test a classifier on: a folder of folders, or a data set by its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dove_fast.data import Transform, list_inputs, load_image

if TYPE_CHECKING:
    from dove_fast.data import ImageInput

__all__ = ["LabelledSet", "draw", "open_labelled", "take_of_each"]

# By name and folder, "cifar10:ROOT": torchvision's class, and what it calls its two parts.
TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
}
TRAIN, TEST = "train", "test"
# The largest grey value of scikit-learn's digits.
DIGITS_WHITE = 16


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images and their classes, not decoded yet.

    name: what to call it. classes: their names. labels: (n,) int64, positions in `classes`. test: (n,) bool, True for
    the images that are to be tested on; None where the data set does not say. keys: n names, for messages. contents: n
    paths, or decoded images, uint8 (n, H, W) grey or (n, H, W, 3) RGB.
    """

    name: str
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    test: npt.NDArray[np.bool_] | None
    keys: Sequence[str]
    contents: Sequence[str] | npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, transform: Transform) -> npt.NDArray[np.uint8] | str:
        """Return the image at `index` as `transform` makes it, uint8 (3, S, S), or why it cannot be read.

        Raises `OSError` where the medium fails, as `load_image` does.
        """
        content = self.contents[index]
        if isinstance(content, str):
            loaded = load_image(content, transform)
            return loaded if isinstance(loaded, str) else loaded.pixels
        from PIL import Image

        return transform(Image.fromarray(content).convert("RGB"))


def open_labelled(source: str | os.PathLike[str], *, allow_download: bool = False) -> LabelledSet:
    """Find out what `source` stands for.

    - A folder with a folder of images for each class, whatever lies below it; or a folder that holds nothing but two
      such folders, "train" and "test".
    - "digits": scikit-learn's 1797 grey digits of 8x8 pixels, which come with it.
    - "cifar10:ROOT", "cifar100:ROOT" and "stl10:ROOT": what torchvision's classes of these names find in the folder
      ROOT, with the publisher's split. `allow_download=True` lets them download what is not there.

    A path that exists is a folder, whatever its name. Nothing is decoded but what comes as arrays.
    Raises `FileNotFoundError` for no such folder or data set, `ValueError` for a folder that is not laid out like this
    and fewer than two classes, `ImportError` where scikit-learn or torchvision cannot be imported.
    """
    text = os.fspath(source)
    if os.path.exists(text):
        return _folder(text)
    if text == "digits":
        return _digits()
    name, _, root = text.partition(":")
    if name in TORCHVISION:
        if not root:
            raise ValueError(f"{name} needs the folder that it lies in: {name}:ROOT")
        return _torchvision(name, root, allow_download)
    raise FileNotFoundError(
        f"no labelled data set {text!r}: give a folder with a folder of images for each class, digits, or "
        f"{', '.join(f'{known}:ROOT' for known in TORCHVISION)}"
    )


def _folder(folder: str) -> LabelledSet:
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; a labelled data set has a folder of images for each class")
    below = {path.name for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")}
    inputs = list_inputs(folder)
    name = Path(folder).resolve().name
    if TRAIN not in below and TEST not in below:
        labels = [_class_of(item, 0, folder) for item in inputs]
        return _of_files(name, inputs, labels, None)
    if below != {TRAIN, TEST}:
        found = ", ".join(sorted(below))
        raise ValueError(f"{folder} must hold train/ and test/ and nothing else, or a folder for each class: {found}")
    parts = [_class_of(item, 0, folder) for item in inputs]
    labels = [_class_of(item, 1, folder) for item in inputs]
    test = np.array([part == TEST for part in parts])
    unknown = sorted(set(labels) - {label for label, tested in zip(labels, test, strict=True) if not tested})
    if unknown:
        raise ValueError(f"{folder}: class {unknown[0]!r} has images in test/ and none in train/")
    return _of_files(name, inputs, labels, test)


def _class_of(item: ImageInput, depth: int, folder: str) -> str:
    """Return the name of the folder at `depth` below `folder` that the image lies in."""
    parents = item.key.split("/")[:-1]
    if len(parents) <= depth:
        raise ValueError(f"{folder}: {item.key} lies in no class's folder; move it into one, or away")
    return parents[depth]


def _of_files(
    name: str, inputs: Sequence[ImageInput], labels: Sequence[str], test: npt.NDArray[np.bool_] | None
) -> LabelledSet:
    classes, numbers = np.unique(labels, return_inverse=True)
    return _checked(
        LabelledSet(
            name=name,
            classes=tuple(map(str, classes)),
            labels=numbers.astype(np.int64),
            test=test,
            keys=[item.key for item in inputs],
            contents=[item.path for item in inputs],
        )
    )


def _digits() -> LabelledSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"digits needs scikit-learn ({error}); pip install 'dove-fast[eval]'") from error
    digits = load_digits()
    grey = np.rint(digits.images * (255 / DIGITS_WHITE)).astype(np.uint8)
    return _of_arrays("digits", map(str, digits.target_names), digits.target, None, grey)


def _torchvision(name: str, root: str, allow_download: bool) -> LabelledSet:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch raises RuntimeError.
        raise ImportError(
            f"{name} needs a torchvision that goes with torch, which cannot be imported ({error}); "
            "pip install 'dove-fast[eval]'"
        ) from error
    kind, *parts = TORCHVISION[name]
    try:
        train, test = (getattr(datasets, kind)(root, download=allow_download, **part) for part in parts)
    except RuntimeError as error:
        # What torchvision says of files that are missing or damaged.
        hint = "" if allow_download else "; allow_download=True downloads it"
        raise FileNotFoundError(f"no {name} in {root} ({error}){hint}") from error
    pixels = np.concatenate([train.data, test.data])
    if pixels.shape[1] == 3:
        # STL-10 has its channels first.
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = np.concatenate([getattr(part, "targets", None) or part.labels for part in (train, test)])
    return _of_arrays(name, train.classes, labels, np.arange(len(pixels)) >= len(train), pixels)


def _of_arrays(
    name: str,
    classes: Any,
    labels: npt.NDArray[Any],
    test: npt.NDArray[np.bool_] | None,
    pixels: npt.NDArray[np.uint8],
) -> LabelledSet:
    keys = [f"{name}/{index}" for index in range(len(labels))]
    return _checked(LabelledSet(name, tuple(classes), labels.astype(np.int64), test, keys, pixels))


def _checked(dataset: LabelledSet) -> LabelledSet:
    if len(dataset.classes) < 2:
        found = ", ".join(map(repr, dataset.classes))
        raise ValueError(f"{dataset.name} has one class, {found}: a classifier needs two at least, each in its folder")
    return dataset


def draw(dataset: LabelledSet, images: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Draw `images` of a data set, in proportion to its classes and, where it has them, its parts; None takes all.

    Returns their indices in order, (images,) or as many as there are.
    """
    if images is None or images >= len(dataset):
        return np.arange(len(dataset))
    strata = dataset.labels if dataset.test is None else 2 * dataset.labels + dataset.test
    # The first so many of an order of which every beginning has each stratum in its proportion.
    order, place = _shuffled(strata, seed)
    return np.sort(order[np.argsort(place, kind="stable")][:images])


def take_of_each(labels: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Draw `share` of each class in labels (n,), at least one and never all: of a class with one, none -> (n,) bool."""
    order, place = _shuffled(labels, seed)
    taken = np.zeros(len(labels), dtype=bool)
    counts = np.bincount(labels)[labels[order]]
    number = np.minimum(np.maximum(np.rint(share * counts), 1), counts - 1)
    taken[order] = place * counts < number
    return taken


def _shuffled(strata: npt.NDArray[np.int64], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return an order (n,) by chance and, in that order, each one's place (n,) in its stratum, from 0 to 1."""
    order = np.random.default_rng(seed).permutation(len(strata))
    place = np.empty(len(strata))
    for stratum in np.unique(strata):
        of_it = strata[order] == stratum
        count = int(of_it.sum())
        place[of_it] = (np.arange(count) + 0.5) / count
    return order, place
