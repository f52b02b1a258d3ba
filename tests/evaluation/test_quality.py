"""The core of an evaluation against straight-line versions: the model's own methods, once for every token count."""

from __future__ import annotations

import pytest
import torch
from small_models import NUM_TOKENS, micro_model, sample_images
from tolerances import RELATIVE, relative_error

from dove_fast import DOVE
from dove_fast.evaluation.complexity import laplacian_variance, rank_correlation
from dove_fast.evaluation.cost import codebook_flop, decoder_flop, encoder_flop, image_cost
from dove_fast.evaluation.measures import psnr, spread, ssim
from dove_fast.evaluation.quality import MOST_POINTS, QualityMeter
from dove_fast.evaluation.results import ADAPTIVE, FIXED, VQGAN_ALONE, Measure
from dove_fast.evaluation.vqgan_alone import decode_codes, is_no_baseline
from dove_fast.failures import JobError

LENGTHS = (2, 9, NUM_TOKENS)


class Features:
    """Stands for Inception: a few numbers of an image."""

    dimension = 6
    measure = Measure("rFID", "of a test")

    def __call__(self, images):
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return torch.cat([pixels.mean(dim=(2, 3)), pixels.std(dim=(2, 3))], dim=1)


class Distance:
    """Stands for LPIPS."""

    def __call__(self, images, made):
        return (images - made).abs().mean(dim=(1, 2, 3))


def images(batch: int = 12, seed: int = 1) -> torch.Tensor:
    return (sample_images(batch, seed) * 255).round().to(torch.uint8)


def measured(model: DOVE, pixels: torch.Tensor, batch: int = 5, **options) -> QualityMeter:
    meter = QualityMeter(model, lengths=options.pop("lengths", LENGTHS), **options)
    for rows in pixels.split(batch):
        meter.add(rows)
    return meter


def rows_of(model: DOVE, pixels: torch.Tensor) -> list[tuple[str, float, torch.Tensor]]:
    """Name, mean tokens and reconstructions of every row, each from a call of its own."""
    found = [("VQGAN alone", float(model.config.num_features), alone(model, pixels))]
    for length in LENGTHS:
        made, _ = model.reconstruct(pixels, length=length)
        found.append((f"{length} tokens", float(length), made))
    made, tokens = model.reconstruct(pixels)
    found.append(("adaptive", float(tokens.lengths.double().mean()), made))
    return [(name, tokens, made.float().clamp(0, 1)) for name, tokens, made in found]


@torch.no_grad()
def alone(model: DOVE, pixels: torch.Tensor) -> torch.Tensor:
    low, high = model.config.image_range
    return (model.vqgan(pixels.float() / 255 * (high - low) + low) - low) / (high - low)


@pytest.mark.parametrize("changes", [{}, {"quantize": "none"}, {"image_range": (-1.0, 1.0)}])
def test_every_row_is_what_the_model_makes_of_that_length(changes):
    model, pixels = micro_model(**changes), images()
    meter = measured(model, pixels, lpips=Distance())
    target = pixels.float() / 255
    found = meter.rows()
    assert [row.kind for row in found] == [VQGAN_ALONE, *[FIXED] * 3, ADAPTIVE]
    for row, (name, tokens, made) in zip(found, rows_of(model, pixels), strict=True):
        assert row.name == name and row.tokens == pytest.approx(tokens)
        assert row.psnr.mean == pytest.approx(spread(psnr(target, made)).mean, rel=1e-4)
        assert row.psnr.p5 == pytest.approx(spread(psnr(target, made)).p5, rel=1e-4)
        assert row.ssim.mean == pytest.approx(ssim(target, made).mean().item(), rel=1e-4)
        assert row.lpips.mean == pytest.approx((target - made).abs().mean().item(), rel=1e-4)
        assert row.rfid is None
    assert len({row.psnr.mean for row in found}) == len(found)


def test_batches_make_no_difference():
    model, pixels = micro_model(), images()
    one, many = (measured(model, pixels, batch, inception=Features()) for batch in (12, 5))
    for a, b in zip(one.rows(), many.rows(), strict=True):
        assert a.psnr.mean == pytest.approx(b.psnr.mean, rel=1e-5)
        assert a.rfid == pytest.approx(b.rfid, rel=1e-4, abs=1e-9)
    assert one.lengths() == many.lengths() and one.codebooks() == many.codebooks()


def test_the_frechet_distance_compares_all_images_with_all_reconstructions():
    from dove_fast.evaluation.frechet import Moments, frechet_distances

    model, pixels = micro_model(), images(20)
    reference = Moments(6)
    reference.add(Features()(pixels))
    for row, (_, _, made) in zip(
        measured(model, pixels, inception=Features()).rows(), rows_of(model, pixels), strict=True
    ):
        other = Moments(6)
        other.add(Features()(made))
        assert row.rfid == pytest.approx(frechet_distances(reference, [other])[0], rel=1e-3)
        assert row.lpips is None


def test_lengths_and_complexity():
    model, pixels = micro_model(), images(40)
    meter = measured(model, pixels, 16, lengths=(4,))
    lengths = model.tokenize(pixels).lengths
    assert torch.equal(meter.adaptive_lengths, lengths)
    assert meter.lengths().mean == pytest.approx(lengths.double().mean().item())
    assert sum(meter.lengths().histogram) == 40
    found, complexities = meter.complexity(), laplacian_variance(pixels)
    assert found.rank_correlation == pytest.approx(rank_correlation(complexities, lengths))
    assert [point.length for point in found.points] == lengths.tolist()
    assert [point.complexity for point in found.points] == pytest.approx(complexities.tolist())
    assert [point.psnr for point in found.points] == pytest.approx(meter.adaptive_psnr.tolist())


def test_a_correlation_that_is_not_defined():
    flat = torch.full((3, 3, 16, 16), 128, dtype=torch.uint8)
    assert measured(micro_model(), flat).complexity().rank_correlation is None
    one = measured(micro_model(), images(1)).complexity()
    assert one.rank_correlation is None and len(one.points) == 1


def test_points_are_bounded_and_spread_over_the_data(monkeypatch):
    monkeypatch.setattr("dove_fast.evaluation.quality.MOST_POINTS", 4)
    meter = measured(micro_model(), images(10))
    found = meter.complexity()
    assert MOST_POINTS >= 1000 and len(found.points) == 4
    assert [point.complexity for point in found.points] == meter.complexities[[0, 3, 6, 9]].tolist()


@torch.no_grad()
def test_codes_of_the_vqgan_and_of_the_tokens():
    model, pixels = micro_model(), images()
    own, *fixed, tokens = measured(model, pixels).codebooks()
    assert [use.name for use in (own, *fixed, tokens)] == [
        "VQGAN alone",
        "2 tokens",
        "9 tokens",
        "16 tokens",
        "adaptive",
    ]
    codes = model.vqgan.quantize(model.vqgan.encode(pixels.float() / 255))[1]
    assert own.codes == codes.numel() and own.used == len(codes.unique()) and own.size == 32
    padded, lengths = model.tokenize(pixels, engine="oracle").to_padded(NUM_TOKENS)
    grid = model.grid(model.token_decoder(padded, None))
    codes = model.vqgan.quantize(grid)[1]
    assert tokens.used == len(codes.unique()) and lengths.max() <= NUM_TOKENS
    shares = codes.flatten().bincount()[codes.unique()] / codes.numel()
    assert tokens.perplexity == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-4)
    for use, length in zip(fixed, LENGTHS, strict=True):
        padded, lengths = model.tokenize(pixels, length=length, engine="oracle").to_padded(NUM_TOKENS)
        grid_codes = model.vqgan.quantize(model.grid(model.token_decoder(padded, None)))[1]
        assert (use.codes, use.used) == (grid_codes.numel(), len(grid_codes.unique()))
    assert len(measured(micro_model(quantize="none"), pixels).codebooks()) == 1


def test_the_cost_of_each_row():
    model, pixels = micro_model(), images()
    config = model.config
    alone, *fixed, adaptive = measured(model, pixels).rows()
    assert alone.gflop == pytest.approx((encoder_flop(config) + codebook_flop(config) + decoder_flop(config)) / 1e9)
    # 16 codes of two bytes; a token is 32 numbers in fp32.
    assert alone.token_bytes == 32 and [row.token_bytes for row in fixed] == [128 * length for length in LENGTHS]
    lengths = model.tokenize(pixels).host_lengths
    costs = [image_cost(config, length) for length in lengths]
    assert len(set(lengths)) > 1, "a mean of equal lengths says nothing"
    assert adaptive.gflop == pytest.approx(sum(cost.tokenize + cost.decode for cost in costs) / 1e9 / len(costs))
    assert adaptive.token_bytes == pytest.approx(128 * sum(lengths) / len(lengths))


def test_the_token_decoder_runs_once_a_row(monkeypatch):
    model, seen = micro_model(), []
    decode = model.generation.decode
    monkeypatch.setattr(
        model.generation, "decode", lambda *given, **options: (seen.append(1), decode(*given, **options))[1]
    )
    measured(model, images(), 12)
    assert len(seen) == len(LENGTHS) + 1


def test_networks_get_so_many_images_as_the_model_takes(monkeypatch):
    sizes = []

    class Counting(Features):
        def __call__(self, images):
            sizes.append(len(images))
            return super().__call__(images)

    class CountingDistance(Distance):
        def __call__(self, images, made):
            sizes.append(len(images))
            return super().__call__(images, made)

    model, pixels = micro_model(), images()
    expected = measured(model, pixels, 12, inception=Features(), lpips=Distance()).rows()
    monkeypatch.setattr(DOVE, "chunks", lambda self, batch: [slice(at, at + 5) for at in range(0, batch, 5)])
    found = measured(model, pixels, 12, inception=Counting(), lpips=CountingDistance()).rows()
    assert max(sizes) == 5 and len(sizes) == 3 * (2 * len(found) + 1)
    for a, b in zip(found, expected, strict=True):
        assert a.rfid == pytest.approx(b.rfid, rel=1e-4, abs=1e-9) and a.lpips.mean == pytest.approx(b.lpips.mean)


def test_the_vqgan_of_another_model():
    model, other, pixels = micro_model(), micro_model(seed=3), images()
    found, own = measured(model, pixels, vqgan=other), measured(model, pixels)
    target = pixels.float() / 255
    expected = psnr(target, alone(other, pixels).clamp(0, 1)).mean().item()
    assert found.rows()[0].psnr.mean == pytest.approx(expected, rel=1e-4)
    assert found.rows()[0] != own.rows()[0] and found.rows()[1:] == own.rows()[1:]
    with pytest.raises(ValueError, match="vqgan must be for images of 16 pixels a side, its are 64"):
        QualityMeter(model, lengths=LENGTHS, vqgan=DOVE.from_pretrained("tiny"))


def test_an_eos_threshold():
    model, pixels = micro_model(), images(30)
    meter = measured(model, pixels, eos_threshold=0.48)
    assert torch.equal(meter.adaptive_lengths, model.tokenize(pixels, eos_threshold=0.48).lengths)


def test_an_image_is_encoded_once(monkeypatch):
    model = micro_model()
    seen = []
    encode = DOVE.encode
    monkeypatch.setattr(DOVE, "encode", lambda self, rows: (seen.append(len(rows)), encode(self, rows))[1])
    measured(model, images(12), 12)
    assert sum(seen) == 12


def test_half_precision_is_measured_in_single():
    model, pixels = micro_model().to(torch.bfloat16), images()
    found = measured(model, pixels).rows()
    made, _ = model.reconstruct(pixels, length=NUM_TOKENS)
    expected = psnr(pixels.float() / 255, made.float().clamp(0, 1)).mean()
    assert found[3].psnr.mean == pytest.approx(expected.item(), rel=RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantize", ["none", "nearest"])
def test_features_that_are_not_finite(quantize, value):
    model = micro_model(quantize=quantize)
    model.out_proj.weight.data[:] = value
    with pytest.raises(JobError, match=r"2 tokens: the features hold NaN or infinity in float32; .* another --dtype"):
        measured(model, images())


def test_pictures_that_are_not_finite():
    model = micro_model()
    # Clamped to [0, 1] it would be white.
    model.vqgan.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(JobError, match="VQGAN alone: the pictures hold NaN or infinity in float32"):
        measured(model, images())


def test_what_is_refused():
    with pytest.raises(ValueError, match="from 1 to this model's 16, got 17"):
        QualityMeter(micro_model(), lengths=[17])
    with pytest.raises(ValueError, match="there are no images to measure"):
        QualityMeter(micro_model(), lengths=[4]).rows()


@pytest.mark.parametrize("quantize", ["none", "nearest"])
def test_the_codes_decode_to_what_vqgan_forward_makes(quantize):
    model, pixels = micro_model(quantize=quantize), images()
    with torch.no_grad():
        codes = model.vqgan.quantize.codes(model.encode(pixels))
        assert relative_error(decode_codes(model, codes), alone(model, pixels)) < RELATIVE[torch.float32]


def test_tokens_that_are_clearly_better_than_the_models_own_vqgan():
    assert is_no_baseline(20.0, 20.6, own=True)
    # Within the margin, or against a VQGAN that somebody named.
    assert not is_no_baseline(20.0, 20.4, own=True) and not is_no_baseline(20.0, 30.0, own=False)
