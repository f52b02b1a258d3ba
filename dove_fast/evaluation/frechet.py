"""The Frechet distance between two sets of features, from running means and covariances: no feature is kept.

Shape suffixes: n images, D features of each.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Moments", "frechet_distances"]


class Moments:
    """The mean (D,) and the covariance (D, D) of features that come in batches, in fp64 on the CPU.

    `count`: how many came. Memory: D^2 numbers, 34 MB for the 2048 of Inception.
    """

    def __init__(self, dimension: int) -> None:
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        # Sums of products of deviations from the mean, which cancel less than those of the features themselves.
        self._products = torch.zeros(dimension, dimension, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features (n, D), floating, on any device. Raises `ValueError` for another shape."""
        if features.dim() != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must have shape (n, {len(self.mean)}), got {tuple(features.shape)}")
        rows = features.detach().to("cpu", torch.float64)
        if not len(rows):
            return
        mean = rows.mean(dim=0)
        deviations = rows - mean
        total = self.count + len(rows)
        shift = mean - self.mean
        self._products += deviations.T @ deviations + torch.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D), as numpy's `cov`. Raises `ValueError` for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return self._products / (self.count - 1)


def frechet_distances(reference: Moments, others: Iterable[Moments]) -> list[float]:
    """Return the squared Frechet distance of each of `others` from `reference`, at least 0.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the trace of the root is that of (C1^(1/2) C2 C1^(1/2))^(1/2), whose
    eigenvalues are real, so covariances of low rank are no special case.
    Raises `ValueError` for other dimensions, or fewer than two rows.
    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule (2017).
    """
    first = reference.covariance
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    distances = []
    for other in others:
        if other.mean.shape != reference.mean.shape:
            raise ValueError(f"features must have {len(reference.mean)} dimensions, got {len(other.mean)}")
        second = other.covariance
        inner = root @ second @ root
        # Symmetric but for rounding, which eigvalsh reads one triangle of.
        common = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
        shift = (reference.mean - other.mean).square().sum()
        distances.append(max(0.0, float(shift + first.trace() + second.trace() - 2 * common)))
    return distances
