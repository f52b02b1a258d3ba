"""What a model makes of a few images: prefixes of their tokens, the lengths that EOS chooses, and where it looks.

Shape suffixes: B images of S pixels a side, N features on a grid of h x w, d width, T the most tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dove_fast.evaluation.attention import StepAttention, decoder_attention, padding_mask, step_attention
from dove_fast.evaluation.lengths import check_lengths
from dove_fast.evaluation.measures import check_finite, decibels, psnr, unit_pixels
from dove_fast.evaluation.shown import ShownRegion
from dove_fast.evaluation.vqgan_alone import decode_codes
from dove_fast.losses.region import region_mse
from dove_fast.models.dove import DOVE
from dove_fast.models.inputs import Query, check_images, check_length_options, check_queries
from dove_fast.models.lengths import eos_lengths

__all__ = ["Answer", "Frame", "OnStage", "Portrait", "answers", "doubling_lengths", "take_portrait"]

# Called after each stage of the work: how many are done, of how many.
OnStage = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Frame:
    """What one number of tokens an image gives, on the CPU.

    lengths: tokens of each image. pictures: (B, 3, S, S) fp32, clamped to [0, 1] as people see them. psnr: (B,) fp32
    dB. states: (B, N, d) fp32, the token decoder's after its final norm.
    """

    lengths: tuple[int, ...]
    pictures: Tensor
    psnr: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class Portrait:
    """What a model makes of images (B, 3, S, S) uint8; all on the CPU.

    frames: the first n tokens of every image, by n. adaptive: as many as EOS chooses. vqgan, vqgan_psnr: the VQGAN's
    codes alone, as `Frame` has them. eos: (B, T) fp32 EOS probabilities, and the threshold that ends an image.
    attention: where the generator's steps look; decoder_attention: (layers, B, N, T), where the token decoder's
    positions look where an image has all T tokens.
    """

    images: Tensor
    frames: dict[int, Frame]
    adaptive: Frame
    vqgan: Tensor
    vqgan_psnr: Tensor
    eos: Tensor
    threshold: float
    attention: StepAttention
    decoder_attention: Tensor


def doubling_lengths(most: int) -> list[int]:
    """Return 1, 2, 4, .. below `most`, and `most`: how a strip of pictures grows."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most == 1 else [*counts, most]


@dataclass(frozen=True, eq=False)
class Answer:
    """One region's picture, with its text or without: tokens, the picture (3, S, S) in [0, 1], and dB of both sides."""

    length: int
    picture: Tensor
    psnr_inside: float
    psnr_outside: float


@torch.no_grad()
def take_portrait(
    model: DOVE,
    images: Tensor,
    queries: Sequence[Query] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    eos_threshold: float | None = None,
    vqgan: DOVE | None = None,
    on_stage: OnStage | None = None,
) -> Portrait:
    """Tokenize and decode a few images by the plain forward, every position of it, and keep what it shows on the way.

    images: (B, 3, S, S) uint8, on any device. queries: as `DOVE.tokenize` takes them. lengths: tokens an image
    of the frames, None for `doubling_lengths(T)`. Every frame decodes all images: this is for tens of them.
    eos_threshold: the probability that ends an image, None for the configuration's. vqgan: a model whose VQGAN is the
    one that stands alone, such as what this one was trained from; None for its own.
    on_stage: called with how many stages are done, and of how many.
    Raises what `DOVE.tokenize` raises, `ValueError` for a length that is not from 1 to T, or a `vqgan` for images of
    another size, and `JobError` for pictures that hold NaN or infinity.
    """
    check_images(images, model.config)
    check_length_options(model.config, None, None, eos_threshold, None)
    most = model.config.num_tokens
    threshold = model.config.eos_threshold if eos_threshold is None else eos_threshold
    counts = check_lengths(doubling_lengths(most) if lengths is None else lengths, most)
    ids = check_queries(queries, len(images), model.config, model.tokenizer)
    baseline = model if vqgan is None else vqgan
    check_images(images, baseline.config)
    done, stages = 0, len(counts) + 4

    def advance() -> None:
        nonlocal done
        done += 1
        if on_stage is not None:
            on_stage(done, stages)

    images = images.cpu()
    features = _features(model, images)
    states, logits = model.generate(features, ids)
    advance()
    codes = baseline.vqgan.quantize.codes(features if vqgan is None else _features(vqgan, images))
    alone = _seen(decode_codes(baseline, codes), "VQGAN alone")
    advance()

    def frame(kept: Tensor) -> Frame:
        made, decoded = _decode(model, states, kept.to(states.device))
        advance()
        return Frame(tuple(kept.tolist()), made, psnr(unit_pixels(images), made), decoded)

    chosen = eos_lengths(logits, threshold).cpu()
    adaptive = frame(chosen)
    frames = {count: frame(torch.full_like(chosen, count)) for count in counts}
    portrait = Portrait(
        images=images,
        frames=frames,
        adaptive=adaptive,
        vqgan=alone,
        vqgan_psnr=psnr(unit_pixels(images), alone),
        eos=logits.sigmoid().cpu(),
        threshold=threshold,
        attention=step_attention(model, features, ids),
        decoder_attention=decoder_attention(model, states, torch.full((len(states),), most, device=states.device)),
    )
    advance()
    return portrait


def _features(model: DOVE, images: Tensor) -> Tensor:
    """Encode images as `DOVE.encode` does, in chunks of bounded memory."""
    return torch.cat([model.encode(images[rows].to(model.device)) for rows in model.chunks(len(images))])


def _padded(states: Tensor, lengths: Tensor) -> Tensor:
    """Return states (B, T, d) with zeros behind the lengths (B,)."""
    kept = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return torch.where(kept[..., None], states, 0.0)


def _decode(model: DOVE, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `DOVE.decode_padded` makes of the tokens, as pictures, and the token decoder's states before."""
    decoded = model.token_decoder(_padded(states, lengths), padding_mask(model, lengths, states.shape[1]))
    # The codebook would hide NaN: some codeword is the nearest.
    check_finite(decoded, "tokens", "features")
    grid = model.grid(decoded)
    made = [_seen(model.render(grid[rows]), "tokens") for rows in model.chunks(len(grid))]
    return torch.cat(made), decoded.float().cpu()


def _seen(made: Tensor, what: str) -> Tensor:
    """Return decoded pictures (B, 3, S, S) as people see them: fp32 in [0, 1] on the CPU."""
    check_finite(made, what)
    return unit_pixels(made).cpu()


def answers(
    model: DOVE, regions: Sequence[ShownRegion], *, with_text: bool, eos_threshold: float | None = None
) -> list[Answer]:
    """Reconstruct each region's picture from as many tokens as EOS chooses, by the oracle: on the CPU.

    eos_threshold: as in `take_portrait`. Raises what `DOVE.tokenize` raises, for texts without a tokenizer, say, and
    `JobError` for pictures that hold NaN or infinity.
    """
    if not regions:
        return []
    images = torch.stack([region.pixels for region in regions])
    texts = [region.text for region in regions] if with_text else None
    made, tokens = model.reconstruct(images.to(model.device), texts, engine="oracle", eos_threshold=eos_threshold)
    made = _seen(made, "tokens")
    sides = region_mse(unit_pixels(images), made, torch.stack([region.mask for region in regions]))
    inside, outside = (decibels(side).tolist() for side in sides)
    return [Answer(*row) for row in zip(tokens.host_lengths, made, inside, outside, strict=True)]
