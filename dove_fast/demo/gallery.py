"""What the demo computes: pictures read into tokens, of which the last few are kept, and decoded from any number.

Shape suffixes: S pixels a side, N features, T the most tokens an image can have, d their width.
"""

from __future__ import annotations

import base64
import contextlib
import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dove_fast.data import DecodeError, ShortSideCenterCrop, decode_image
from dove_fast.data.formats import pillow_formats
from dove_fast.errors import DoveError
from dove_fast.evaluation import laplacian_variance
from dove_fast.evaluation.attention import step_attention
from dove_fast.evaluation.measures import psnr, unit_pixels
from dove_fast.evaluation.pictures import to_pixels
from dove_fast.html import png
from dove_fast.models.dove import DOVE
from dove_fast.models.inputs import check_length_options, check_queries
from dove_fast.models.lengths import eos_lengths
from dove_fast.ragged import RaggedTokens

__all__ = ["Gallery", "Reading", "Reconstruction", "UnknownPictureError"]

# The share of the values that the picture of the tokens shows unclipped.
SHOWN = 0.99
# Of a picture that is decoded, which takes some ten times as many bytes: what cameras of 50 megapixels write.
MAX_PIXELS = 52_000_000


class UnknownPictureError(DoveError):
    """No picture with this id is kept: there never was one, or later ones took its place."""


@dataclass(frozen=True)
class Reconstruction:
    """The picture that so many tokens make, as the data URL of a PNG, and its PSNR in dB against what the model saw."""

    length: int
    picture: str
    psnr: float


@dataclass(frozen=True)
class Reading:
    """One picture, read into all T tokens.

    id: what `Gallery.reconstruct` takes. width, height: of the upright original, before it was cut to the square.
    length: the tokens that EOS keeps at `threshold`. eos: the EOS probability at each of the T steps.
    complexity: `laplacian_variance` of what the model saw, which `original` shows, the data URL of a PNG; `vqgan` is
    what the VQGAN alone makes of it, from all of its features, with `vqgan_psnr` in dB.
    tokens: T x d bytes, token after token: each value's difference from the mean of the T tokens, 0 to 255 with 128 for
    none, so scaled that `SHOWN` of them are not clipped. width_of_token: d.
    attention: T x N bytes, where each token looks on the grid of features: the mean over the generator's layers and
    heads, 255 being that token's largest. Both in base64.
    """

    id: str
    width: int
    height: int
    length: int
    threshold: float
    eos: list[float]
    complexity: float
    original: str
    vqgan: str
    vqgan_psnr: float
    tokens: str
    width_of_token: int
    attention: str


@dataclass(frozen=True, eq=False)
class _Kept:
    """`pixels`: what the model saw, (3, S, S) uint8; `tokens`: (T, d)."""

    pixels: Tensor
    tokens: Tensor


class Gallery:
    """Reads pictures with one model, and keeps the tokens of the last `keep` of them.

    batch_size: how many reconstructions are computed at a time, at most. eos_threshold: the EOS probability above which
    a picture ends; None takes the configuration's.
    Safe to call from several threads: calls take turns, so that memory is bounded by one call's work.
    """

    def __init__(
        self, model: DOVE, *, keep: int = 16, batch_size: int = 32, eos_threshold: float | None = None
    ) -> None:
        for name, value in (("keep", keep), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_length_options(model.config, None, None, eos_threshold, None)
        self.model, self.batch_size = model, batch_size
        self.eos_threshold = model.config.eos_threshold if eos_threshold is None else float(eos_threshold)
        self._keep = keep
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    @torch.no_grad()
    def read(self, content: bytes, query: str = "") -> Reading:
        """Read an encoded picture, any format of `dove_fast.data`; `query` is a text for the model's tokenizer.

        Raises `DecodeError` for bytes that are no picture or one of more than `MAX_PIXELS`, `ValueError` for a query
        that this model cannot read, `ImportError` for one without the `tokenizers` library, and `DoveError` for a model
        that gives NaN or infinity.
        """
        with self._turn():
            _check_size(content)
            model, config = self.model, self.model.config
            decoded = decode_image(content)
            pixels = torch.from_numpy(ShortSideCenterCrop(config.image_size)(decoded.image))
            ids = check_queries([query], 1, config, model.tokenizer)
            # All T tokens are wanted, so the plain forward computes nothing in vain, and its features serve all.
            features = model.encode(pixels[None].to(model.device))
            states, logits = model.generate(features, ids)
            self._check_finite(states, logits)
            grid = features.transpose(1, 2).unflatten(2, (config.grid_size, config.grid_size))
            rendered = model.render(model.vqgan.quantize(grid)[0])
            self._check_finite(rendered)
            alone = unit_pixels(rendered.cpu())
            attention = step_attention(model, features, ids).to_image.mean(dim=(0, 1))
            name = secrets.token_urlsafe(12)
            self._kept[name] = _Kept(pixels, states[0])
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
            return Reading(
                id=name,
                width=decoded.width,
                height=decoded.height,
                length=int(eos_lengths(logits, self.eos_threshold)[0]),
                threshold=self.eos_threshold,
                eos=logits[0].sigmoid().tolist(),
                complexity=float(laplacian_variance(pixels[None])[0]),
                original=png(pixels, config.image_size),
                vqgan=png(to_pixels(alone[0]), config.image_size),
                vqgan_psnr=float(psnr(unit_pixels(pixels[None]), alone)[0]),
                tokens=_differences(states[0]),
                width_of_token=states.shape[2],
                attention=_bytes(attention / attention.amax(dim=1, keepdim=True).clamp(min=1e-12) * 255),
            )

    def reconstruct(self, name: str, lengths: Sequence[int]) -> list[Reconstruction]:
        """Decode the first n tokens of the picture `name`, for each n of `lengths`, at most `batch_size` of them.

        Raises `UnknownPictureError`, `ValueError` for lengths out of 1 to T or too many of them, and `DoveError` for a
        model that gives NaN or infinity.
        """
        most = self.model.config.num_tokens
        if not 1 <= len(lengths) <= self.batch_size:
            raise ValueError(f"expected 1 to {self.batch_size} token counts at a time, got {len(lengths)}")
        for length in lengths:
            if not 1 <= length <= most:
                raise ValueError(f"a token count must be from 1 to {most}, got {length}")
        with self._turn():
            if name not in self._kept:
                raise UnknownPictureError(
                    f"this picture is no longer kept: only the last {self._keep} are; give it once more"
                )
            # Whoever still looks at a picture keeps it longer.
            self._kept.move_to_end(name)
            kept = self._kept[name]
            tokens = RaggedTokens.from_rows([kept.tokens[:length] for length in lengths])
            decoded = self.model.decode(tokens)
            self._check_finite(decoded)
            made = unit_pixels(decoded.cpu())
            decibels = psnr(unit_pixels(kept.pixels[None]).expand_as(made), made).tolist()
            return [
                Reconstruction(length, png(to_pixels(picture), picture.shape[-1]), value)
                for length, picture, value in zip(lengths, made, decibels, strict=True)
            ]

    def close(self) -> None:
        """Refuse all calls from now on, those that wait for their turn too, with `DoveError`."""
        self._closed = True

    def _check_finite(self, *values: Tensor) -> None:
        """Pictures before they are clamped, where infinity would pass for white."""
        if not all(bool(value.isfinite().all()) for value in values):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise DoveError(f"the model gives NaN or infinity in {dtype}; start the demo with another --dtype")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise DoveError("the demo is ending")
            yield


def _check_size(content: bytes) -> None:
    """Refuse what would fill the memory, from the header alone; `upright_size` decodes a PNG or TIFF to turn it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=pillow_formats()) as image:
            width, height = image.size
    except Exception:
        # What is no picture, or too large for Pillow itself, decoding refuses with its reason.
        return
    if width * height > MAX_PIXELS:
        raise DecodeError(
            f"too many pixels: {width} x {height} are {width * height / 1e6:.0f} million, more than the "
            f"{MAX_PIXELS // 10**6} that are taken"
        )


def _differences(tokens: Tensor) -> str:
    away = (tokens - tokens.mean(dim=0)).float()
    scale = away.abs().flatten().quantile(SHOWN).clamp(min=1e-6)
    return _bytes(128 + 127 * (away / scale).clamp(-1, 1))


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.round().to(torch.uint8).cpu().numpy().tobytes()).decode()
