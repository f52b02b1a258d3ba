"""Multinomial logistic regression on rows that need not fit into memory.

Shape suffixes: n rows of D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LinearClassifier", "Rows", "StandardRows", "fit_logistic"]

# Bytes of the rows that are worked on at a time, and of all rows that are kept on the device instead of read again.
BLOCK_BYTES = 64 << 20
KEPT_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
# A feature that varies less than this share of what features vary on average is not blown up to the others' size.
LEAST_SCALE = 0.1
# Past steps that L-BFGS remembers: each takes the memory of two classifiers.
HISTORY = 10
MAX_ITERATIONS, MOST_EVALUATIONS = 1000, 2000
# What is left of the first gradient, at its largest entry, where the search ends.
GRADIENT_LEFT = {torch.float32: 1e-4, torch.float64: 1e-6}


class Rows(Protocol):
    """Features (n, D) that are read a few rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, D)."""
        ...

    def read(self, rows: npt.NDArray[np.int64], /) -> Tensor:
        """Return these rows, (len(rows), D), floating, on the CPU."""
        ...


class StandardRows:
    """Some rows of features, centred, scaled, and in blocks on a device.

    rows: (n,) which, in increasing order. Each feature has mean 0 and, but for those that hardly vary (`LEAST_SCALE`),
    variance 1 / D over these rows: a row's squared norm is 1 on average whatever D is, and a penalty means the same for
    all features. `like` takes another one's means and scales: those of what was trained on, for what is tested on.
    """

    def __init__(
        self,
        features: Rows,
        rows: npt.NDArray[np.int64],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        like: StandardRows | None = None,
    ) -> None:
        self._features, self._rows, self.device, self.dtype = features, rows, device, dtype
        self.shape = len(rows), features.shape[1]
        row_bytes = self.shape[1] * torch.empty(0, dtype=dtype).element_size()
        self._step = max(1, BLOCK_BYTES // row_bytes)
        self._moments: tuple[Tensor, Tensor] = _moments(self._read) if like is None else like._moments
        keep = len(rows) * row_bytes <= KEPT_BYTES.get(device.type, KEPT_BYTES["cpu"])
        self._kept = list(self._standardised()) if keep else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Iterate over blocks: which of the rows, and their features (b, D)."""
        return self._standardised() if self._kept is None else iter(self._kept)

    def _standardised(self) -> Iterator[tuple[slice, Tensor]]:
        mean, factor = self._moments
        for which, block in self._read():
            yield which, (block - mean) * factor

    def _read(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self._rows), self._step):
            which = slice(start, min(start + self._step, len(self._rows)))
            yield which, self._features.read(self._rows[which]).to(self.device, self.dtype)


def _moments(read: Callable[[], Iterator[tuple[slice, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Return each feature's mean (D,) and the factor that scales it (D,), from two passes in fp64."""
    sums: Any = 0
    count = 0
    for which, block in read():
        sums, count = sums + block.double().sum(dim=0), which.stop
    mean = sums / count
    squares = torch.zeros_like(mean)
    for _, block in read():
        squares += (block.double() - mean).square().sum(dim=0)
    variance = squares / count
    typical = variance.mean().sqrt()
    # Features that are all constant stay zero whatever they are multiplied by.
    least = LEAST_SCALE * typical if typical > 0 else 1.0
    factor = 1 / (variance.sqrt().clamp(min=least) * len(mean) ** 0.5)
    return mean.to(block.dtype), factor.to(block.dtype)


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """weight (D, K), bias (K,). converged: whether the search ended by itself, not after `MAX_ITERATIONS`."""

    weight: Tensor
    bias: Tensor
    converged: bool

    @torch.no_grad()
    def predict(self, rows: StandardRows) -> Tensor:
        """Return the most probable class of each row, (n,) int64."""
        return torch.cat([(block @ self.weight + self.bias).argmax(dim=1) for _, block in rows])


@torch.no_grad()
def fit_logistic(
    rows: StandardRows,
    labels: Tensor,
    num_classes: int,
    penalty: float,
    *,
    shares: Tensor | None = None,
    start: LinearClassifier | None = None,
) -> LinearClassifier:
    """Minimise sum_i shares_i CE_i + penalty / 2 ||weight||^2: the mean cross-entropy with L2, the bias free of it.

    labels: (n,) int64 on the rows' device. shares: (n,) that add up to 1, 0 for rows that are left out; None for 1 / n
    each. start: where to begin. By L-BFGS on all rows, so nothing is drawn. scikit-learn's C is 1 / (n penalty).
    """
    (n, dimension), device, dtype = rows.shape, rows.device, rows.dtype
    if shares is None:
        shares = torch.full((n,), 1 / n, device=device)
    shares = shares.to(dtype)
    weight = torch.zeros(dimension, num_classes, device=device, dtype=dtype)
    bias = torch.zeros(num_classes, device=device, dtype=dtype)
    # The gradient at zero is the measure of what is small, wherever the search starts.
    _, slope, bias_slope = _objective(rows, labels, shares, weight, bias, penalty)
    steepest = float(torch.maximum(slope.abs().max(), bias_slope.abs().max()))
    if start is not None:
        weight, bias = start.weight.clone(), start.bias.clone()
    search = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        max_eval=MOST_EVALUATIONS,
        history_size=HISTORY,
        tolerance_grad=GRADIENT_LEFT[dtype] * steepest,
        # Ends in rounding only.
        tolerance_change=torch.finfo(dtype).eps / 100,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, weight.grad, bias.grad = _objective(rows, labels, shares, weight, bias, penalty)
        return loss

    search.step(closure)
    state = search.state[weight]
    converged = state["n_iter"] < MAX_ITERATIONS and state["func_evals"] < MOST_EVALUATIONS
    return LinearClassifier(weight, bias, converged)


def _objective(
    rows: StandardRows, labels: Tensor, shares: Tensor, weight: Tensor, bias: Tensor, penalty: float
) -> tuple[float, Tensor, Tensor]:
    """Return the objective and its gradients by weight (D, K) and bias (K,)."""
    slope, bias_slope = penalty * weight, torch.zeros_like(bias)
    loss = (penalty / 2) * weight.double().square().sum()
    for which, block in rows:
        logs = F.log_softmax(block @ weight + bias, dim=1)
        picked = labels[which, None]
        loss = loss - (shares[which].double() * logs.gather(1, picked).squeeze(1).double()).sum()
        error = logs.exp()
        error.scatter_add_(1, picked, torch.full_like(logs[:, :1], -1.0))
        error *= shares[which, None]
        slope.addmm_(block.T, error)
        bias_slope += error.sum(dim=0)
    return float(loss), slope, bias_slope
