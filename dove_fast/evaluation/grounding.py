"""What a text does to Q-DOVE's tokens: errors inside and outside the region it asks for, with it and without.

Shape suffixes: B images of S pixels a side, T the most tokens an image can have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dove_fast.evaluation.lengths import check_lengths, eos_prefixes, prefixes
from dove_fast.evaluation.measures import check_finite, decibels, unit_pixels
from dove_fast.evaluation.results import ADAPTIVE, FIXED, Grounding, RegionRow
from dove_fast.losses.region import region_mse
from dove_fast.models.dove import DOVE
from dove_fast.words import counted

__all__ = ["GroundingMeter"]


class _Errors:
    """Sums over the samples of one token count: tokens, and the errors and decibels of both sides."""

    def __init__(self, name: str, kind: str, *, with_text: bool) -> None:
        self.name, self.kind, self.with_text = name, kind, with_text
        self._sums = torch.zeros(5, dtype=torch.float64)
        self._counts = torch.zeros(5, dtype=torch.float64)

    def add(self, tokens: Sequence[int], inside: Tensor, outside: Tensor, mask: Tensor) -> None:
        every = torch.ones(len(mask), dtype=torch.bool)
        has_inside, has_outside = (side.flatten(1).any(dim=1).cpu() for side in (mask, ~mask))
        columns = (torch.tensor(tokens), inside, outside, decibels(inside), decibels(outside))
        sides = torch.stack([every, has_inside, has_outside, has_inside, has_outside])
        values = torch.stack([column.double().cpu() for column in columns])
        self._sums += (values * sides).sum(dim=1)
        self._counts += sides.sum(dim=1)

    def row(self) -> RegionRow:
        return RegionRow(self.name, self.kind, self.with_text, *(self._sums / self._counts).tolist())


class GroundingMeter:
    """Measures a Q-DOVE on batches of images, texts and regions: `add` them all, then ask for the `result`.

    lengths and eos_threshold: as in `QualityMeter`. An image is tokenized twice, with its text and without it, to T
    tokens, of which every length is a prefix. Raises `ValueError` for lengths that the model does not have.
    """

    def __init__(self, model: DOVE, *, lengths: Sequence[int], eos_threshold: float | None = None) -> None:
        self._model = model
        self._lengths = check_lengths(lengths, model.config.num_tokens)
        self._threshold = model.config.eos_threshold if eos_threshold is None else eos_threshold
        names = [(counted(length, "token"), FIXED) for length in self._lengths]
        self._rows = [
            (_Errors(name, kind, with_text=True), _Errors(name, kind, with_text=False))
            for name, kind in [*names, ("adaptive", ADAPTIVE)]
        ]
        self._share = 0.0
        self.samples = self.tokens = 0

    @torch.no_grad()
    def add(self, images: Tensor, queries: Sequence[Tensor], mask: Tensor) -> None:
        """Measure images, uint8 (B, 3, S, S), with B texts as token ids and their regions, mask (B, 1, S, S) bool.

        A region that is the whole picture has no outside, and does not count in the means of that side, which are NaN
        where no sample has one. Raises what `DOVE.tokenize` raises, and `JobError` for pictures that hold NaN or
        infinity.
        """
        model = self._model
        images, mask = images.to(model.device), mask.to(model.device)
        pixels = unit_pixels(images)
        for column, given in enumerate((list(queries), None)):
            tokens, _ = model.tokenize(images, given, length=model.config.num_tokens).to_padded()
            kept = [prefixes(tokens, length) for length in self._lengths]
            kept.append(eos_prefixes(model, tokens, self._threshold))
            for pair, some in zip(self._rows, kept, strict=True):
                made = model.decode(some)
                check_finite(made, pair[column].name)
                inside, outside = region_mse(pixels, unit_pixels(made), mask)
                pair[column].add(some.host_lengths, inside, outside, mask)
        self._share += float(mask.double().mean(dim=(1, 2, 3)).sum())
        self.samples += len(images)
        # As many as EOS chose without the texts.
        self.tokens += kept[-1].values.shape[0]

    def result(self, set_aside: dict[str, int] | None = None) -> Grounding:
        """Return what was measured; `set_aside`: samples that could not be, by reason.

        Raises `ValueError` before a sample was added.
        """
        if not self.samples:
            raise ValueError("there are no samples with a text and a region to measure")
        rows = tuple(errors.row() for pair in self._rows for errors in pair)
        return Grounding(
            samples=self.samples,
            set_aside=dict(set_aside or {}),
            region_share=self._share / self.samples,
            length_with_text=rows[-2].tokens,
            length_without=rows[-1].tokens,
            rows=rows,
        )
