"""What a portrait shows is what `tokenize` and `decode` give."""

from __future__ import annotations

import pytest
import torch
from small_models import micro_model, sample_images
from tolerances import assert_close

from dove_fast.evaluation.portrait import answers, doubling_lengths, take_portrait
from dove_fast.evaluation.shown import ShownRegion
from dove_fast.failures import JobError

IMAGES = (sample_images(5) * 255).round().to(torch.uint8)
QUERIES = [torch.tensor([3, 9]), None, torch.tensor([1, 2, 30, 4]), None, torch.tensor([7])]


def decibels(images, made):
    return torch.stack(
        [
            -10 * ((image.double() / 255 - other.double()) ** 2).mean().log10()
            for image, other in zip(images, made, strict=True)
        ]
    )


def test_lengths_double():
    assert doubling_lengths(64) == [1, 2, 4, 8, 16, 32, 64]
    assert doubling_lengths(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert doubling_lengths(1) == [1] and doubling_lengths(2) == [1, 2]


@pytest.mark.parametrize("queries", [None, QUERIES])
@pytest.mark.parametrize("attends_padding", [True, False])
def test_against_tokenize_and_decode(queries, attends_padding):
    model = micro_model(decoder_attends_padding=attends_padding)
    seen = []
    portrait = take_portrait(model, IMAGES, queries, on_stage=lambda *state: seen.append(state))
    assert list(portrait.frames) == [1, 2, 4, 8, 16]
    assert seen == [(number, 9) for number in range(1, 10)]
    made, tokens = model.reconstruct(IMAGES, queries, engine="oracle")
    assert portrait.adaptive.lengths == tuple(tokens.host_lengths) and len(set(tokens.host_lengths)) > 1
    assert_close(portrait.adaptive.pictures, made.clamp(0, 1))
    torch.testing.assert_close(portrait.adaptive.psnr.double(), decibels(IMAGES, made.clamp(0, 1)))
    for count, frame in portrait.frames.items():
        expected, _ = model.reconstruct(IMAGES, queries, length=count)
        assert frame.lengths == (count,) * 5
        assert_close(frame.pictures, expected.clamp(0, 1))
        assert_close(model.pictures(frame.states).detach(), expected)
    for row, length in enumerate(portrait.adaptive.lengths):
        above = portrait.eos[row] > portrait.threshold
        assert not above[: length - 1].any() and (above[length - 1] or length == 16)


@pytest.mark.parametrize("quantize", ["none", "nearest"])
@torch.no_grad()
def test_the_vqgan_alone(quantize):
    """It goes through the codebook, whatever becomes of the tokens."""
    model, other = micro_model(quantize=quantize), micro_model(seed=5, quantize=quantize)
    portrait = take_portrait(model, IMAGES, lengths=[3])
    assert list(portrait.frames) == [3]
    grid, _ = model.vqgan.quantize(model.vqgan.encode(IMAGES.float() / 255))
    expected = model.vqgan.decode(grid).clamp(0, 1)
    assert_close(portrait.vqgan, expected)
    torch.testing.assert_close(portrait.vqgan_psnr.double(), decibels(IMAGES, expected))
    changed = take_portrait(model, IMAGES, lengths=[3], vqgan=other)
    assert_close(changed.vqgan, take_portrait(other, IMAGES, lengths=[3]).vqgan)
    torch.testing.assert_close(changed.frames[3].pictures, portrait.frames[3].pictures)


def test_an_eos_threshold():
    model = micro_model()
    images = (sample_images(24) * 255).round().to(torch.uint8)
    portrait = take_portrait(model, images, lengths=[1], eos_threshold=0.48)
    assert portrait.threshold == 0.48
    expected = tuple(model.tokenize(images, engine="oracle", eos_threshold=0.48).host_lengths)
    assert portrait.adaptive.lengths == expected != take_portrait(model, images, lengths=[1]).adaptive.lengths
    model.tokenizer = Words()
    regions = [ShownRegion(str(n), "3 9", image, (), torch.ones(1, 16, 16).bool()) for n, image in enumerate(images)]
    found = answers(model, regions, with_text=False, eos_threshold=0.48)
    assert tuple(answer.length for answer in found) == expected


def test_pictures_that_are_not_finite():
    model = micro_model()
    model.vqgan.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(JobError, match="VQGAN alone: the pictures hold NaN or infinity"):
        take_portrait(model, IMAGES)
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    with pytest.raises(JobError, match="tokens: the pictures hold NaN or infinity"):
        answers(model, [ShownRegion("r", "", IMAGES[0], (), mask)], with_text=False)


def test_refusals():
    model = micro_model()
    with pytest.raises(ValueError, match="eos_threshold"):
        take_portrait(model, IMAGES, eos_threshold=2.0)
    with pytest.raises(ValueError, match="from 1 to this model's 16, got 17"):
        take_portrait(model, IMAGES, lengths=[1, 17])
    with pytest.raises(ValueError, match="images"):
        take_portrait(model, IMAGES[:, :, :8])
    with pytest.raises(ValueError, match="one entry an image"):
        take_portrait(model, IMAGES, [None])


class Words:
    """A tokenizer of numbers."""

    def encode(self, text):
        return torch.tensor([int(word) for word in text.split()])


def test_answers_with_a_text_and_without():
    model = micro_model()
    model.tokenizer = Words()
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 4:8, 2:10] = True
    regions = [ShownRegion(str(n), text, IMAGES[n], ((2, 4, 10, 8),), mask) for n, text in ((0, "3 9"), (2, "7"))]
    with_text, without = (answers(model, regions, with_text=flag) for flag in (True, False))
    for found, queries in ((with_text, [torch.tensor([3, 9]), torch.tensor([7])]), (without, None)):
        made, tokens = model.reconstruct(IMAGES[[0, 2]], queries, engine="oracle")
        assert [answer.length for answer in found] == list(tokens.host_lengths)
        for answer, picture, image in zip(found, made.clamp(0, 1), IMAGES[[0, 2]], strict=True):
            assert_close(answer.picture, picture)
            inside = decibels(image[None, :, 4:8, 2:10], picture[None, :, 4:8, 2:10])
            assert answer.psnr_inside == pytest.approx(float(inside), abs=1e-3)
            error = (image.double() / 255 - picture.double()) ** 2
            outside = error[~mask.expand(3, -1, -1)].mean()
            assert answer.psnr_outside == pytest.approx(float(-10 * outside.log10()), abs=1e-3)
    assert not torch.allclose(with_text[0].picture, without[0].picture)
    assert answers(model, [], with_text=True) == []
