"""How much of a codebook is used."""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast.evaluation.results import CodebookUse

__all__ = ["CodebookCounter"]


class CodebookCounter:
    """Counts the codes of a codebook of `size` codewords. name: whose codes they are."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self._counts = torch.zeros(size, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Count codes, int64 of any shape, from 0 to size - 1."""
        self._counts += torch.bincount(codes.flatten().cpu(), minlength=len(self._counts))

    def result(self) -> CodebookUse:
        """Return how many came, how many of them differ, and their perplexity: e to the entropy of their shares."""
        total = int(self._counts.sum())
        shares = self._counts[self._counts > 0].double() / max(total, 1)
        entropy = -(shares * shares.log()).sum()
        return CodebookUse(self.name, total, len(shares), len(self._counts), float(entropy.exp()))
