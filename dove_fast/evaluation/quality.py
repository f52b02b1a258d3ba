"""The core of an evaluation: images in batches, and what every token count makes of them.

Nothing grows with the data but a few numbers an image; Frechet distances come from running moments.
Shape suffixes: B images of S pixels a side, T the most tokens an image can have, d width, N features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dove_fast.evaluation.codebook import CodebookCounter
from dove_fast.evaluation.complexity import laplacian_variance, rank_correlation
from dove_fast.evaluation.cost import code_bytes, image_cost, vqgan_flop
from dove_fast.evaluation.extractors import InceptionFeatures, PerceptualDistance
from dove_fast.evaluation.frechet import Moments, frechet_distances
from dove_fast.evaluation.lengths import check_lengths, eos_prefixes, prefixes, summarize_lengths
from dove_fast.evaluation.measures import check_finite, psnr, spread, ssim, unit_pixels
from dove_fast.evaluation.results import (
    ADAPTIVE,
    FIXED,
    VQGAN_ALONE,
    CodebookUse,
    Complexity,
    Lengths,
    Point,
    QualityRow,
    Spread,
)
from dove_fast.evaluation.vqgan_alone import decode_codes
from dove_fast.generation import TokenStream
from dove_fast.models.dove import DOVE
from dove_fast.ragged import RaggedTokens
from dove_fast.store.layout import TOKEN_DTYPES
from dove_fast.words import counted

__all__ = ["QualityMeter"]

# Images that are kept one by one for a scatter.
MOST_POINTS = 2000


class _Row:
    """What has come of one token count so far."""

    def __init__(self, name: str, kind: str, moments: Moments | None, codewords: int) -> None:
        self.name, self.kind, self.moments = name, kind, moments
        self.codes = CodebookCounter(name, codewords)
        self.tokens: list[Tensor] = []
        self.values: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}

    def spread(self, name: str) -> Spread | None:
        values = self.values[name]
        return spread(torch.cat(values)) if values else None


class QualityMeter:
    """Measures a model on images that come in batches: `add` them all, then ask for the results.

    Rows: the VQGAN alone, the fixed `lengths`, and what EOS at `eos_threshold` (None: the configuration's) chooses. An
    image is encoded once, and tokenized once, to T tokens: a fixed length is the first of these, the adaptive one too
    (`dove_fast.evaluation.lengths`). lpips, inception: None leaves the measure out. vqgan: a model whose VQGAN is the
    one to compare with, on the same device; None for the model's own, whose decoder may have learnt with the tokens.
    Raises `ValueError` for lengths that the model does not have, or a `vqgan` for images of another size.
    """

    def __init__(
        self,
        model: DOVE,
        *,
        lengths: Sequence[int],
        eos_threshold: float | None = None,
        lpips: PerceptualDistance | None = None,
        inception: InceptionFeatures | None = None,
        vqgan: DOVE | None = None,
    ) -> None:
        config = model.config
        if vqgan is not None and vqgan.config.image_size != config.image_size:
            raise ValueError(
                f"vqgan must be for images of {config.image_size} pixels a side, its are {vqgan.config.image_size}"
            )
        self._model, self._baseline = model, model if vqgan is None else vqgan
        self._lengths = check_lengths(lengths, config.num_tokens)
        self._threshold = config.eos_threshold if eos_threshold is None else eos_threshold
        self._lpips, self._inception = lpips, inception
        self._reference = self._moments()
        codewords = config.vqgan.num_vq_embeddings
        self._alone = _Row("VQGAN alone", VQGAN_ALONE, self._moments(), self._baseline.config.vqgan.num_vq_embeddings)
        self._fixed = {
            length: _Row(counted(length, "token"), FIXED, self._moments(), codewords) for length in self._lengths
        }
        self._adaptive = _Row("adaptive", ADAPTIVE, self._moments(), codewords)
        self._complexity: list[Tensor] = []
        self.images = self.tokens = 0

    @property
    def image_size(self) -> int:
        """Pixels a side of the images that it takes."""
        return self._model.config.image_size

    def _moments(self) -> Moments | None:
        return None if self._inception is None else Moments(self._inception.dimension)

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Measure images, uint8 (B, 3, S, S), on any device. Raises what `DOVE.tokenize` raises.

        Raises `JobError` for a model whose pictures hold NaN or infinity, in half precision say.
        """
        model = self._model
        images = images.to(model.device)
        tokens, codes = self._tokens_and_codes(images)
        pixels = unit_pixels(images)
        if self._inception is not None and self._reference is not None:
            self._reference.add(self._in_chunks(self._inception, images))
        self._complexity.append(laplacian_variance(images).cpu())

        self._alone.codes.add(codes)
        self._measure(self._alone, pixels, decode_codes(self._baseline, codes), [codes.shape[1]] * len(images))
        for length, row in self._fixed.items():
            self._measure_tokens(row, pixels, prefixes(tokens, length))
        chosen = eos_prefixes(model, tokens, self._threshold)
        self._measure_tokens(self._adaptive, pixels, chosen)
        self.images += len(images)
        self.tokens += chosen.values.shape[0]

    def _tokens_and_codes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return all tokens (B, T, d) of images, and their codes (B, N) by the VQGAN to compare with."""
        model, baseline = self._model, self._baseline
        # The model's own codes come with the tokens: one encoding for both.
        own = baseline is model
        stream = TokenStream(model, images, batch_size=len(images), length=model.config.num_tokens, codes=own)
        items = list(stream)
        tokens = torch.stack([item.tokens for item in items])
        if own:
            return tokens, torch.stack([item.codes for item in items if item.codes is not None])
        return tokens, baseline.vqgan.quantize.codes(baseline.encode_in_chunks(images))

    def _measure_tokens(self, row: _Row, pixels: Tensor, tokens: RaggedTokens) -> None:
        """Decode tokens as `DOVE.decode` does, and count on the way what the grid is looked up as."""
        model = self._model
        made = []
        for rows in model.chunks(len(tokens)):
            states = model.generation.decode(
                model.token_decoder, tokens[rows], attends_padding=model.config.decoder_attends_padding
            )
            grid = model.grid(states)
            # The codebook would hide it: of NaN some codeword is the nearest.
            check_finite(grid, row.name, "features")
            if model.config.quantize == "nearest":
                row.codes.add(model.vqgan.quantize.codes(grid.flatten(2).transpose(1, 2)))
            made.append(model.render(grid))
        self._measure(row, pixels, torch.cat(made), tokens.host_lengths)

    def _measure(self, row: _Row, pixels: Tensor, made: Tensor, tokens: Sequence[int]) -> None:
        check_finite(made, row.name)
        made = unit_pixels(made)
        row.tokens.append(torch.tensor(tokens))
        row.values["psnr"].append(psnr(pixels, made).cpu())
        row.values["ssim"].append(ssim(pixels, made).cpu())
        if self._lpips is not None:
            row.values["lpips"].append(self._in_chunks(self._lpips, pixels, made).cpu())
        if self._inception is not None and row.moments is not None:
            row.moments.add(self._in_chunks(self._inception, made))

    def _in_chunks(self, network: Callable[..., Tensor], *images: Tensor) -> Tensor:
        """Give images (B, ..) to a network so many at a time as the model itself would take."""
        return torch.cat([network(*(some[rows] for some in images)) for rows in self._model.chunks(len(images[0]))])

    def _rows(self) -> list[_Row]:
        return [self._alone, *self._fixed.values(), self._adaptive]

    def rows(self) -> tuple[QualityRow, ...]:
        """Return the quality of every token count. Raises `ValueError` before an image was added."""
        if not self.images:
            raise ValueError("there are no images to measure")
        rows = self._rows()
        distances: list[float | None] = [None] * len(rows)
        if self._reference is not None and self._reference.count > 1:
            distances = [*frechet_distances(self._reference, [row.moments for row in rows if row.moments is not None])]
        found = []
        for row, distance in zip(rows, distances, strict=True):
            of_psnr, of_ssim = row.spread("psnr"), row.spread("ssim")
            assert of_psnr is not None and of_ssim is not None
            lengths = torch.cat(row.tokens)
            gflop, size = self._cost(row.kind, lengths)
            tokens = float(lengths.double().mean())
            found.append(
                QualityRow(row.name, row.kind, tokens, of_psnr, of_ssim, row.spread("lpips"), distance, gflop, size)
            )
        return tuple(found)

    def _cost(self, kind: str, lengths: Tensor) -> tuple[float, float | None]:
        """Return the mean GFLOP of images with lengths (n,), to the picture, and their tokens' bytes in a store."""
        if kind == VQGAN_ALONE:
            config = self._baseline.config
            return vqgan_flop(config) / 1e9, float(code_bytes(config))
        dtype = next((name for name, dtype in TOKEN_DTYPES.items() if dtype == self._model.dtype), None)
        counts = lengths.bincount().tolist()
        flop = size = 0
        for length, count in enumerate(counts):
            if count:
                cost = image_cost(self._model.config, length)
                flop += count * (cost.tokenize + cost.decode)
                size += count * (cost.token_bytes[dtype] if dtype is not None else 0)
        return flop / len(lengths) / 1e9, None if dtype is None else size / len(lengths)

    @property
    def adaptive_lengths(self) -> Tensor:
        """The tokens that EOS chose for each image, (n,) int64."""
        return torch.cat(self._adaptive.tokens)

    @property
    def adaptive_psnr(self) -> Tensor:
        """The PSNR in dB of each image at the length that EOS chose, (n,)."""
        return torch.cat(self._adaptive.values["psnr"])

    @property
    def complexities(self) -> Tensor:
        """Each image's `laplacian_variance`, (n,)."""
        return torch.cat(self._complexity)

    def lengths(self) -> Lengths:
        """Return how the lengths that EOS chose are spread."""
        return summarize_lengths(self.adaptive_lengths, self._model.config.num_tokens)

    def complexity(self) -> Complexity:
        """Return whether lengths follow complexity."""
        lengths, complexities = self.adaptive_lengths, self.complexities
        correlation = rank_correlation(complexities, lengths) if self.images > 1 else float("nan")
        shown = torch.linspace(0, self.images - 1, min(self.images, MOST_POINTS)).round().long()
        columns = (complexities[shown].tolist(), lengths[shown].tolist(), self.adaptive_psnr[shown].tolist())
        points = tuple(Point(*values) for values in zip(*columns, strict=True))
        return Complexity(None if correlation != correlation else correlation, points)

    def codebooks(self) -> tuple[CodebookUse, ...]:
        """Return how the codebook is used by every row: by the VQGAN alone where tokens are not looked up in it."""
        rows = self._rows() if self._model.config.quantize == "nearest" else [self._alone]
        return tuple(row.codes.result() for row in rows)
