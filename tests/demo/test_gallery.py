"""What the demo shows is what the model's own methods give."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import IMAGE_SIZE, NUM_TOKENS, micro_model, sample_images

from dove_fast import RaggedTokens
from dove_fast.data import DecodeError
from dove_fast.demo import Gallery, UnknownPictureError
from dove_fast.demo import gallery as gallery_module
from dove_fast.errors import DoveError
from dove_fast.evaluation import laplacian_variance
from dove_fast.evaluation.attention import step_attention

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


def png(pixels) -> bytes:
    """Encode (3, H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels).transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(url: str) -> torch.Tensor:
    """Decode a data URL to (3, S, S) uint8."""
    start, _, data = url.partition(",")
    assert start == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data))))).permute(2, 0, 1)


def some_pixels(count: int = 24) -> torch.Tensor:
    return (sample_images(count) * 255).round().to(torch.uint8)


def straight_psnr(pixels, picture) -> float:
    """Of (3, S, S) uint8 and floating, in float64."""
    error = (pixels.double().numpy() / 255 - picture.double().clamp(0, 1).numpy()) ** 2
    return -10 * np.log10(error.mean())


def test_a_reading_is_what_the_model_says(model):
    gallery = Gallery(model, keep=100)
    images = some_pixels()
    readings = [gallery.read(png(pixels)) for pixels in images]
    expected = model.tokenize(images)
    assert [reading.length for reading in readings] == list(expected.host_lengths)
    assert len(set(expected.host_lengths)) > 3, "the lengths must differ for this test to say anything"
    for pixels, reading, full in zip(images, readings, model.tokenize(images, length=NUM_TOKENS), strict=True):
        assert reading.threshold == model.config.eos_threshold and reading.width_of_token == full.shape[1]
        assert reading.eos == pytest.approx(model.eos_probability(full).tolist(), abs=1e-5)
        assert (reading.width, reading.height) == (IMAGE_SIZE, IMAGE_SIZE)
        assert reading.complexity == pytest.approx(laplacian_variance(pixels[None]).item(), rel=1e-6)
        assert torch.equal(pixels_of(reading.original), pixels)
    first = readings[0]
    with torch.no_grad():
        alone = model.vqgan.decode(model.vqgan.quantize(model.vqgan.encode(images[:1] / 255))[0])[0]
    assert first.vqgan_psnr == pytest.approx(straight_psnr(images[0], alone), abs=1e-3)
    assert (pixels_of(first.vqgan).float() - alone.clamp(0, 1) * 255).abs().max() < 0.51


def test_reconstructions_are_what_the_model_decodes(model):
    gallery = Gallery(model)
    pixels = some_pixels()[3]
    reading = gallery.read(png(pixels))
    lengths = [NUM_TOKENS, 1, 5, 2, 5]
    found = gallery.reconstruct(reading.id, lengths)
    assert [one.length for one in found] == lengths
    tokens = model.tokenize(pixels[None], length=NUM_TOKENS)[0]
    for one in found:
        expected = model.decode(RaggedTokens.from_rows([tokens[: one.length]]))[0]
        assert one.psnr == pytest.approx(straight_psnr(pixels, expected), abs=1e-3)
        assert (pixels_of(one.picture).float() - expected.clamp(0, 1) * 255).abs().max() < 0.51
    assert found[0].picture != found[1].picture


def test_the_picture_of_the_tokens(model):
    reading = Gallery(model).read(png(some_pixels()[0]))
    tokens = model.tokenize(some_pixels()[:1], length=NUM_TOKENS)[0]
    shown = np.frombuffer(base64.b64decode(reading.tokens), np.uint8).reshape(tokens.shape).astype(float) - 128
    away = (tokens - tokens.mean(dim=0)).numpy()
    scale = np.quantile(np.abs(away), 0.99)
    assert np.abs(shown - np.clip(away / scale, -1, 1) * 127).max() < 0.6


def test_where_tokens_look(model):
    image = some_pixels()[:1]
    reading = Gallery(model).read(png(image[0]))
    count = model.config.num_features
    shown = np.frombuffer(base64.b64decode(reading.attention), np.uint8).reshape(NUM_TOKENS, count)
    with torch.no_grad():
        attention = step_attention(model, model.encode(image), [torch.empty(0, dtype=torch.int64)]).to_image
    expected = attention[:, 0].mean(dim=0).numpy()
    assert np.abs(shown - 255 * expected / expected.max(axis=1, keepdims=True)).max() < 0.6
    assert (shown.max(axis=1) == 255).all()


def test_any_picture(model):
    """A photograph comes as the transform makes it; its size is the original's."""
    gallery = Gallery(model)
    reading = gallery.read((PHOTOS / "chelsea.jpg").read_bytes())
    assert (reading.width, reading.height) == (451, 300)
    assert pixels_of(reading.original).shape == (3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_query_changes_what_is_read(reading_model):
    gallery, content = Gallery(reading_model), png(some_pixels()[0])
    plain, asked = gallery.read(content), gallery.read(content, "red cat")
    expected = reading_model.tokenize(some_pixels()[:1], ["red cat"], length=NUM_TOKENS)
    assert asked.eos == pytest.approx(reading_model.eos_probability(expected.values).tolist(), abs=1e-5)
    assert asked.eos != plain.eos


def test_what_cannot_be_read(model):
    gallery, content = Gallery(model), png(some_pixels()[0])
    for bad, text in ((b"hello", "not an image"), (content[: len(content) // 2], "truncated")):
        with pytest.raises(DecodeError, match=text):
            gallery.read(bad)
    with pytest.raises(ValueError, match="no tokenizer"):
        gallery.read(content, "a cat")


def test_too_many_pixels(model, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DecodeError, match="too many pixels"):
        Gallery(model).read(png(some_pixels()[0]))


def test_large_pictures_are_refused_before_they_are_decoded(model, monkeypatch):
    """PNG, TIFF and turned JPEG, of which `upright_size` would decode two."""
    monkeypatch.setattr(gallery_module, "decode_image", lambda content: pytest.fail("it was decoded"))
    for kind in ("PNG", "TIFF", "JPEG"):
        buffer = io.BytesIO()
        Image.new("1", (8001, 6500)).save(buffer, kind)
        with pytest.raises(DecodeError, match="too many pixels: 8001 x 6500 are 52 million, more than the 52 that are"):
            Gallery(model).read(buffer.getvalue())


def test_another_threshold(model):
    images = some_pixels()
    for threshold in (0.3, 0.9):
        gallery = Gallery(model, eos_threshold=threshold, keep=100)
        readings = [gallery.read(png(pixels)) for pixels in images]
        lengths = model.tokenize(images, eos_threshold=threshold).host_lengths
        assert [reading.length for reading in readings] == list(lengths)
        assert {reading.threshold for reading in readings} == {threshold}
    with pytest.raises(ValueError, match="eos_threshold must lie between 0 and 1"):
        Gallery(model, eos_threshold=0.0)


def test_lengths_that_are_refused(model):
    gallery = Gallery(model, batch_size=3)
    name = gallery.read(png(some_pixels()[0])).id
    for lengths in ([0], [NUM_TOKENS + 1], [1, -1]):
        with pytest.raises(ValueError, match=f"must be from 1 to {NUM_TOKENS}, got"):
            gallery.reconstruct(name, lengths)
    for lengths in ([], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"expected 1 to 3 token counts at a time, got {len(lengths)}"):
            gallery.reconstruct(name, lengths)
    for options in ({"keep": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            Gallery(model, **options)


def test_the_last_few_are_kept(model):
    gallery = Gallery(model, keep=2)
    contents = [png(pixels) for pixels in some_pixels(3)]
    first, second = (gallery.read(content).id for content in contents[:2])
    # It was looked at last, so the other one goes.
    gallery.reconstruct(first, [1])
    third = gallery.read(contents[2]).id
    gallery.reconstruct(first, [1])
    gallery.reconstruct(third, [1])
    for unknown in (second, "", "never"):
        with pytest.raises(UnknownPictureError, match="only the last 2 are"):
            gallery.reconstruct(unknown, [1])
    assert len({first, second, third}) == 3


def test_a_model_that_gives_nan_says_so():
    model = micro_model()
    model.generator.final_layer_norm.bias.data[0] = torch.nan
    with pytest.raises(DoveError, match="NaN or infinity in float32; start the demo with another --dtype"):
        Gallery(model).read(png(some_pixels()[0]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_decoder_that_gives_nan_or_infinity_says_so(value):
    """Infinity too, which clamping would show as white."""
    model, content = micro_model(), png(some_pixels()[0])
    gallery = Gallery(model)
    name = gallery.read(content).id
    model.vqgan.decoder.conv_out.bias.data[0] = value
    for call in (lambda: gallery.read(content), lambda: gallery.reconstruct(name, [1, 2])):
        with pytest.raises(DoveError, match="NaN or infinity in float32"):
            call()


def test_a_closed_gallery_refuses(model):
    gallery = Gallery(model)
    name = gallery.read(png(some_pixels()[0])).id
    gallery.close()
    for call in (lambda: gallery.read(b""), lambda: gallery.reconstruct(name, [1])):
        with pytest.raises(DoveError, match="the demo is ending"):
            call()
