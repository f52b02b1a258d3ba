"""What vq_lookup is held to: every distance in fp64, up to the bounds that the kernels derive."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    """All squared distances (n, K) in fp64, column after column: the same order for every pair."""
    total = torch.zeros(x.shape[0], codebook.shape[0], dtype=torch.float64, device=x.device)
    for column in range(x.shape[1]):
        total += (x[:, column, None].double() - codebook[None, :, column].double()) ** 2
    return total


def score_errors(x: Tensor, codebook: Tensor, backend: str) -> Tensor:
    """How far each score |c|^2 / 2 - x.c of a kernel may be from the true one (n, K), as its file derives it."""
    width, unit = x.shape[1], 2.0**-24
    norms, squares = x.double().norm(dim=1)[:, None], codebook.double().square().sum(1)
    size = squares / 2 + norms * squares.sqrt()
    sums = (width + 1) * unit / (1 - (width + 1) * unit)
    relative = 3 * 2.0**-20 + (4 * width + 2) * 2 * unit if backend == "triton" else 2 * sums
    return relative * size + 4 * width * 2.0**-126


def assert_nearest(codes: Tensor, x: Tensor, codebook: Tensor, backend: str = "reference") -> None:
    """Each code is at the smallest distance, and the first of its identical codewords.

    The smallest up to fp64 rounding for the reference; for a kernel up to the bounds of the two scores, which are half
    of |c|^2 - 2 x.c. Where those leave nothing of the distances, a kernel is tested for the lowest index alone.
    """
    every_distance = distances(x, codebook)
    best, nearest = every_distance.min(1)
    chosen = every_distance.gather(1, codes[:, None]).squeeze(1)
    if backend != "reference" and torch.float64 not in (x.dtype, codebook.dtype):
        errors = score_errors(x, codebook, backend)
        rounding = 2 * (errors.gather(1, codes[:, None]).squeeze(1) + errors.gather(1, nearest[:, None]).squeeze(1))
    else:
        rounding = torch.zeros_like(chosen)
    assert (chosen <= best * (1 + 1e-13) + rounding).all()
    same = (codebook[codes][:, None] == codebook[None]).all(-1)
    assert torch.equal(codes, same.int().argmax(1)), "an identical codeword has a lower index"
