"""Exact nearest codeword in plain torch, any device: fp32 scores, and fp64 distances where rounding could decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of the largest temporary: (rows, K) scores, (pairs, C) differences.
MAX_ELEMENTS = 1 << 22


def vq_lookup(x: Tensor, codebook: Tensor, codebook_sq: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (codes (...) int64, quantized (..., C) in x's dtype) for x (..., C), codebook (K, C).

    The code is the argmin over k of sum((x - c_k)^2) computed in fp64, the lowest k on a tie. A row of x with NaN or
    infinity gets code 0.
    """
    rows = x.reshape(-1, x.shape[-1])
    wide = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    words = codebook.to(wide)
    squares = codebook_squares(words) if codebook_sq is None else codebook_sq.to(wide)
    codes = torch.empty(rows.shape[0], dtype=torch.int64, device=x.device)
    step = max(1, MAX_ELEMENTS // words.shape[0])
    # Under autocast the product below would be rounded to 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, rows.shape[0], step):
            codes[start : start + step] = _nearest(rows[start : start + step].to(wide), words, squares)
    return codes.view(x.shape[:-1]), codebook[codes].to(x.dtype).view(x.shape)


def _nearest(rows: Tensor, words: Tensor, squares: Tensor) -> Tensor:
    """Return the codes (n,) of rows (n, C); words (K, C) and squares (K,) = |c|^2 have the same dtype, fp32 or fp64."""
    # |x - c|^2 / 2 = |x|^2 / 2 + s with the score s = |c|^2 / 2 - x.c; |x|^2 is the same for every codeword.
    scores = torch.addmm(squares / 2, rows, words.T, alpha=-1)
    best, codes = scores.min(dim=1)
    limit = best + 2 * _score_error(rows, squares)
    # The negation keeps every codeword where an overflow made a score or the limit NaN.
    candidates = ~(scores > limit[:, None])
    undecided = candidates.count_nonzero(dim=1) != 1
    finite = torch.isfinite(rows).all(dim=1)
    codes = torch.where(finite, codes, 0)
    index = (undecided & finite).nonzero().squeeze(1)
    if index.numel():
        codes[index] = _nearest_exactly(rows[index], words, candidates[index])
    return codes


def _score_error(rows: Tensor, squares: Tensor) -> Tensor:
    """Return (n,): how far a computed score can be from the true one, for every codeword.

    A sum of C products, added in any order with unit roundoff u, is off by at most g sum|x_i c_i| with
    g = C u / (1 - C u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and
    sum|x_i c_i| <= |x| |c|. So |c|^2 / 2 is off by g |c|^2 / 2, x.c by (g + 2 r) |x| |c| with inputs rounded to r
    (TF32, bf16; 0 in full precision), and their difference by one more u of its size: (g + 2 r + u)
    (|c|^2 / 2 + |x| |c|) in all, for the longest codeword. Doubling it covers the second-order terms and the
    roundings of this bound itself. Underflow loses at most the smallest normal number a term: in the C products
    of each sum, and in those of |x|^2 and |c|^2 here.
    """
    info = torch.finfo(rows.dtype)
    width = rows.shape[1]
    unit = info.eps / 2
    lost = 2 * width * info.tiny
    longest = squares.max() + lost
    norms = (rows.square().sum(1) + lost).sqrt()
    relative = width * unit / (1 - width * unit) + unit + 2 * _product_roundoff(rows)
    return 2 * relative * (longest / 2 + norms * longest.sqrt()) + 2 * lost


def _product_roundoff(rows: Tensor) -> float:
    """Return the relative rounding of a matrix product's inputs under torch's present precision settings."""
    if rows.dtype == torch.float64:
        return 0.0
    setting: Any = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(rows.device.type)
    if setting is not None and setting.matmul.fp32_precision in ("none", "ieee"):
        return 0.0
    # bf16 has 8 significant bits; TF32 and other devices' short formats have as many or more.
    return 2.0**-8


def _nearest_exactly(rows: Tensor, words: Tensor, candidates: Tensor) -> Tensor:
    """Return the codes (n,) of rows (n, C) by fp64 distance among candidates (n, K) bool, at least one a row."""
    row, code = candidates.nonzero(as_tuple=True)
    step = max(1, MAX_ELEMENTS // (2 * rows.shape[1]))
    distance = torch.cat([_distance(rows[r], words[c]) for r, c in zip(row.split(step), code.split(step), strict=True)])
    # A codeword with NaN is never the nearest.
    distance = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)
    best = distance.new_full((rows.shape[0],), torch.inf).scatter_reduce(0, row, distance, "amin")
    tied = distance == best[row]
    last = torch.full((rows.shape[0],), words.shape[0] - 1, device=rows.device)
    return last.scatter_reduce(0, row[tied], code[tied], "amin")


def _distance(x: Tensor, c: Tensor) -> Tensor:
    """Return sum((x - c)^2) over the last dimension in fp64, for pairs x, c (p, C) -> (p,)."""
    return _sum_rows((x.double() - c.double()).square())


def codebook_squares(codebook: Tensor) -> Tensor:
    """Return |c|^2 of the codewords (K, C) -> (K,), in fp32 or better; identical codewords have the same."""
    return _sum_rows(codebook.to(torch.promote_types(codebook.dtype, torch.float32)).square())


def _sum_rows(terms: Tensor) -> Tensor:
    """Return the rows' sums (n, C) -> (n,).

    Halves are added until one column is left: element by element, so that every row is summed in one same order,
    which a library's reduction need not do, and identical codewords tie.
    """
    while (width := terms.shape[1]) > 1:
        half = width // 2
        folded = terms[:, :half] + terms[:, half : 2 * half]
        terms = torch.cat([folded, terms[:, 2 * half :]], dim=1) if width % 2 else folded
    return terms.sum(1)
