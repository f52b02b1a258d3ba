"""Linear probing: how much of an image's class a linear classifier reads from its tokens."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from dove_fast.data import ShortSideCenterCrop, prefetch
from dove_fast.evaluation.labelled import LabelledSet, draw, open_labelled, take_of_each
from dove_fast.evaluation.logistic import Rows, StandardRows, fit_logistic
from dove_fast.evaluation.probe_features import ProbeFeatures
from dove_fast.evaluation.results import Measure, ProbeRow
from dove_fast.failures import stopping
from dove_fast.jobs.progress import OnProgress, Progress
from dove_fast.models.inputs import check_length_options

if TYPE_CHECKING:
    from dove_fast.models.dove import DOVE

__all__ = ["LARGEST_CLASS", "PENALTIES", "probe", "probe_measure"]

logger = logging.getLogger(__name__)

# The row of a guess that looks at nothing.
LARGEST_CLASS = "largest class"
# Of the images that come without a split, tested on; of those that are trained on, held out to choose the penalty.
TEST_SHARE = HELD_OUT_SHARE = 0.2
# From strong to weak: each fit starts from the one before.
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
# Threads that decode, and batches that they may be ahead.
DECODERS, AHEAD = 2, 2

# What to do where the disk of the features is full, say.
AGAIN = "run the same command again; TMPDIR names another place for the features"

Mask = npt.NDArray[np.bool_]


def probe_measure(seed: int) -> Measure:
    """Return how `probe` measures, for the context of an evaluation."""
    return Measure(
        "linear probe",
        "test accuracy of multinomial logistic regression with L2 (L-BFGS, fp32), features standardised by the "
        f"training images, penalty of {', '.join(f'{penalty:g}' for penalty in PENALTIES)} by accuracy on "
        f"{HELD_OUT_SHARE:.0%} of them, seed {seed}; without a published split {TEST_SHARE:.0%} of the images are "
        "tested on",
    )


def probe(
    model: DOVE,
    dataset: str | os.PathLike[str] | LabelledSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    images: int | None = None,
    eos_threshold: float | None = None,
    allow_download: bool = False,
    on_progress: OnProgress | None = None,
    on_row: Callable[[ProbeRow], None] | None = None,
    on_fit: Callable[[int, int], None] | None = None,
    on_set_aside: Callable[[str, str], None] | None = None,
) -> list[ProbeRow]:
    """Train a linear classifier on each kind of features of a labelled data set, and return their test accuracies.

    The features, all of the same images:
    - "pooled tokens, adaptive": the mean of an image's own tokens, as many as EOS chooses, (d,);
    - "pooled tokens, n": the mean of the first n tokens, n = T / 8, T / 2 and T;
    - "padded tokens": its own tokens with zeros behind them, (T d,), as in the paper;
    - "VQGAN features, pooled" (C,) and "VQGAN features, flattened" (N C,): what the generator reads;
    - "pixels": uint8 after the model's transform, (3 S S,).

    One classifier for all, multinomial logistic regression with L2 in torch: it runs on the model's device, and reads
    rows in blocks, so that 10^5 images of T d = 131072 features need neither the memory nor another method; the tests
    hold it to scikit-learn's. The penalty is chosen for each kind of features on a part of the training images that is
    held out (`probe_measure` says it in words). Features wait in a temporary directory (TMPDIR), not in memory: 0.8 MB
    an image of the base model at most, 0.05 MB of the tiny one. Rows that fit are kept on the device.

    dataset: what `open_labelled` takes, or returned. images: so many of them, drawn by seed in proportion to the
    classes; None is all. seed: decides that, the split where the publisher made none, and what is held out.
    on_progress: called with a `Progress` of the images that were read. on_row: called with each row as it is done.
    on_fit: called with how many classifiers are trained, and of how many.
    on_set_aside: called with the key of each image that cannot be read and why; without it a warning is logged.

    Raises what `open_labelled` raises; `ValueError` for a wrong option, a class with one image, no class with two to
    train on, and too little space in the temporary directory; `JobError` for features that are not finite, and where
    a medium fails or the memory is full. Source: METHOD section 6.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if images is not None and images < 2:
        raise ValueError(f"images must be at least 2, got {images}")
    check_length_options(model.config, None, None, eos_threshold, None)
    found = dataset if isinstance(dataset, LabelledSet) else open_labelled(dataset, allow_download=allow_download)
    drawn = draw(found, images, seed)
    # What can be refused is refused before anything is computed, and again of the images that could be read.
    _split(found, drawn, seed)
    with tempfile.TemporaryDirectory(prefix="dove-fast-probe-") as directory:
        features = ProbeFeatures(Path(directory), model, len(drawn), eos_threshold)
        with stopping(AGAIN):
            kept = _read(features, found, drawn, batch_size, on_progress, on_set_aside)
        labels = found.labels[kept]
        train, test = _split(found, kept, seed)
        rows: list[ProbeRow] = []

        def report(name: str, accuracy: float, dimension: int) -> None:
            rows.append(ProbeRow(found.name, name, accuracy, int(train.sum()), int(test.sum()), dimension))
            if on_row is not None:
                on_row(rows[-1])

        largest = np.bincount(labels[train]).argmax()
        report(LARGEST_CLASS, float((labels[test] == largest).mean()), 0)
        with stopping(AGAIN):
            for done, (name, matrix) in enumerate(features.finished(), start=1):
                report(name, _accuracy(matrix, labels, train, test, model.device, seed, name), matrix.shape[1])
                if on_fit is not None:
                    on_fit(done, features.kinds)
    return rows


def _split(dataset: LabelledSet, drawn: npt.NDArray[np.int64], seed: int) -> tuple[Mask, Mask]:
    """Return which of the drawn images are trained on and which are tested on, (n,) bool each."""
    labels = dataset.labels[drawn]
    test = take_of_each(labels, TEST_SHARE, seed) if dataset.test is None else dataset.test[drawn]
    counts = np.bincount(labels[~test], minlength=len(dataset.classes))
    fewest = int(counts.argmin())
    total = np.bincount(labels, minlength=len(dataset.classes))[fewest]
    if counts[fewest] == 0 or (dataset.test is None and total < 2):
        needs = "two images at least" if dataset.test is None else "an image to train on"
        raise ValueError(
            f"{dataset.name}: class {dataset.classes[fewest]!r} needs {needs}, got {total} of the {len(drawn)} images "
            "that were drawn and could be read"
        )
    if not test.any():
        raise ValueError(f"{dataset.name}: none of the {len(drawn)} images is to be tested on; draw more")
    if counts.max() < 2:
        raise ValueError(f"{dataset.name}: no class has two images to train on, one of which chooses the penalty")
    return ~test, test


def _read(
    features: ProbeFeatures,
    dataset: LabelledSet,
    drawn: npt.NDArray[np.int64],
    batch_size: int,
    on_progress: OnProgress | None,
    on_set_aside: Callable[[str, str], None] | None,
) -> npt.NDArray[np.int64]:
    """Read the drawn images into `features`; returns those that could be read, in order."""
    transform = ShortSideCenterCrop(features.config.image_size)
    start = time.perf_counter()
    kept: list[int] = []
    bad: list[str] = []
    tokens = 0

    def load(index: int) -> tuple[int, npt.NDArray[np.uint8] | str]:
        return index, dataset.load(index, transform)

    loading = prefetch(load, drawn.tolist(), workers=DECODERS, depth=AHEAD * batch_size)
    with contextlib.closing(loading) as loaded:
        while batch := list(itertools.islice(loaded, batch_size)):
            pixels = []
            for index, image in batch:
                if isinstance(image, str):
                    bad.append(f"{dataset.keys[index]}: {image}")
                    if on_set_aside is not None:
                        on_set_aside(dataset.keys[index], image)
                else:
                    kept.append(index)
                    pixels.append(image)
            if pixels:
                tokens += features.add(np.stack(pixels))
            if on_progress is not None:
                done = len(kept) + len(bad)
                elapsed = time.perf_counter() - start
                on_progress(Progress(done, len(drawn), len(kept), tokens, errors=len(bad), elapsed=elapsed))
    if bad and on_set_aside is None:
        logger.warning("%d of %d images cannot be read and were set aside, the first %s", len(bad), len(drawn), bad[0])
    return np.array(kept, dtype=np.int64)


def _accuracy(
    features: Rows,
    labels: npt.NDArray[np.int64],
    train: Mask,
    test: Mask,
    device: torch.device,
    seed: int,
    name: str,
) -> float:
    """Choose the penalty, train on all training images with it, and return the accuracy on those to test on."""
    rows = StandardRows(features, np.flatnonzero(train), device)
    truth = torch.from_numpy(labels[train]).to(device)
    held_out = torch.from_numpy(take_of_each(labels[train], HELD_OUT_SHARE, seed)).to(device)
    num_classes = int(labels.max()) + 1
    shares = (~held_out) / (~held_out).sum()
    most, best, fitted = -1.0, PENALTIES[0], None
    for penalty in PENALTIES:
        fitted = fit_logistic(rows, truth, num_classes, penalty, shares=shares, start=fitted)
        right = (fitted.predict(rows) == truth)[held_out].double().mean().item()
        # Of equal ones the strongest.
        if right > most:
            most, best = right, penalty
    fitted = fit_logistic(rows, truth, num_classes, best, start=fitted)
    if not fitted.converged:
        logger.warning(
            "the classifier of %s was stopped before its optimum; its accuracy may be lower than it is", name
        )
    predicted = fitted.predict(StandardRows(features, np.flatnonzero(test), device, like=rows)).cpu()
    return float((predicted.numpy() == labels[test]).mean())
