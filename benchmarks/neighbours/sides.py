"""Rows of bench_tokenizers.py that are shapes of TiTok and ALIT, each built in a process of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from tokenizer_facts import Facts, bytes_of_codes, counted, parameters_of
from tolerances import assert_close
from torch import Tensor

import dove_fast
from neighbours import ALIT, ALIT_SIZES, TITOK_SIZES, ALITSizes, TiTok, TiTokSizes
from neighbours.maskgit_vqgan import VQGANSizes

Row = tuple[Callable[[], Any], Callable[[], tuple[Facts, None]]]

# The published model that was trained on all of ImageNet.
ALIT_NAME = "alit_small"
# For --quick: the same structure on 64x64 pixels, cheap enough for a test.
SMALL_WIDTH = {"width": 128, "layers": 2, "heads": 4, "image": 64}
SMALL_BASE = VQGANSizes(widths=(32, 32, 64, 64, 64), blocks=1, channels=32, codewords=256)


def titok_sizes(size: str, name: str) -> TiTokSizes:
    """Return the published sizes of that name, or small ones with a quarter of the tokens."""
    published = TITOK_SIZES[name]
    if size == "base":
        return published
    return dataclasses.replace(published, **SMALL_WIDTH, tokens=published.tokens // 4)


def alit_sizes(size: str) -> ALITSizes:
    """Return the published sizes, or small ones with a quarter of the tokens."""
    published = ALIT_SIZES[ALIT_NAME]
    if size == "base":
        return published
    return dataclasses.replace(published, **SMALL_WIDTH, tokens=published.tokens // 4, base=SMALL_BASE)


def titok(size: str, batch: int, dtype: torch.dtype, device: str, *, name: str) -> Row:
    """TiTok's encoding side."""
    sizes = titok_sizes(size, name)
    model, images = _prepare(lambda: TiTok(sizes), sizes.image, batch, dtype, device)

    def run() -> Tensor:
        return model.tokenize(images)

    def report() -> tuple[Facts, None]:
        codes, flop = counted(run)
        assert codes.shape == (batch, sizes.tokens) and int(codes.max()) < sizes.codewords
        assert_close(model.features(images)[:1], model.features(images[:1]))
        return Facts(
            positions=sizes.positions,
            flop=flop / batch,
            parameters=parameters_of([model]),
            tokens=sizes.tokens,
            kind=_codes(sizes.codewords),
            token_bytes=bytes_of_codes(sizes.tokens, sizes.codewords),
        ), None

    return run, report


def alit(size: str, batch: int, dtype: torch.dtype, device: str, *, rollouts: int) -> Row:
    """ALIT with as many rollouts for every image."""
    sizes = alit_sizes(size)
    model, images = _prepare(lambda: ALIT(sizes), sizes.image, batch, dtype, device)

    def report() -> tuple[Facts, None]:
        features = model.features(images, rollouts)
        assert_close(features[0], model.features(images[:1], rollouts)[0])
        # No picture is looked at.
        parameters = parameters_of([model]) - parameters_of([model.base.decoder])
        positions = sizes.positions(rollouts, decodes=rollouts - 1)
        return _alit_facts(model, run, [rollouts] * batch, positions, parameters), None

    def run() -> list[Tensor]:
        return model.tokenize(images, rollouts)

    return run, report


def alit_chosen(size: str, batch: int, dtype: torch.dtype, device: str, *, lengths: list[int]) -> Row:
    """ALIT that looks at its picture after each rollout, stopped where it has an image's length in tokens."""
    sizes = alit_sizes(size)
    model, images = _prepare(lambda: ALIT(sizes), sizes.image, batch, dtype, device)
    imposed = [min(math.ceil(length / sizes.tokens), sizes.rollouts) for length in lengths]

    def run() -> list[Tensor]:
        return model.tokenize(images, choose=True, imposed=imposed)

    def report() -> tuple[Facts, None]:
        features = model.features(images, choose=True, imposed=imposed)
        assert_close(features[0], model.features(images[:1], imposed[0])[0])
        positions = sum(sizes.positions(count, decodes=count) for count in imposed) / batch
        return _alit_facts(model, run, imposed, positions, parameters_of([model])), None

    return run, report


def _alit_facts(
    model: ALIT, run: Callable[[], list[Tensor]], rollouts: list[int], positions: float, parameters: int
) -> Facts:
    sizes = model.sizes
    codes, flop = counted(run)
    assert [len(row) for row in codes] == [sizes.tokens * count for count in rollouts]
    tokens = sum(map(len, codes)) / len(codes)
    return Facts(
        positions=positions,
        flop=flop / len(codes),
        parameters=parameters,
        tokens=tokens,
        kind=_codes(sizes.codewords),
        token_bytes=bytes_of_codes(tokens, sizes.codewords),
    )


def _prepare(build: Callable[[], Any], side: int, batch: int, dtype: torch.dtype, device: str) -> tuple[Any, Tensor]:
    """Return a random model and its images, in a process that keeps freed memory as ours does."""
    if device == "cpu":
        assert dove_fast.keep_freed_memory()
    torch.manual_seed(7)
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(5))
    return build().eval().to(device, dtype), images.to(device, dtype)


def _codes(codewords: int) -> str:
    return f"{math.ceil(math.log2(codewords))}-bit code"
