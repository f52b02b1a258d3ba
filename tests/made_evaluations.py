"""An evaluation with something in every place, without a model."""

from __future__ import annotations

from dove_fast.evaluation.results import (
    ADAPTIVE,
    FIXED,
    VQGAN_ALONE,
    CodebookUse,
    Complexity,
    Context,
    Evaluation,
    Grounding,
    Lengths,
    Measure,
    Point,
    ProbeRow,
    QualityRow,
    RegionRow,
    Spread,
)


def made_evaluation(*, warnings: tuple[str, ...] = ()) -> Evaluation:
    """Return one whose figures are all different, so that a wrong place shows."""
    spreads = [Spread(20.0 + row, 10.5 + row, 19.25 + row, 30.75 + row) for row in range(4)]
    rows = tuple(
        QualityRow(name, kind, tokens, spread, Spread(0.8, 0.7, 0.81, 0.9), Spread(0.2, 0.1, 0.21, 0.3), rfid)
        for (name, kind, tokens, rfid), spread in zip(
            (
                ("VQGAN alone", VQGAN_ALONE, 16.0, 7.04),
                ("2 tokens", FIXED, 2.0, 18.91),
                ("4 tokens", FIXED, 4.0, 9.28),
                ("adaptive", ADAPTIVE, 2.75, 12.34),
            ),
            spreads,
            strict=True,
        )
    )
    regions = tuple(
        RegionRow("adaptive", ADAPTIVE, with_text, 3.5, 0.00125, 0.0025, 29.03, 26.02) for with_text in (True, False)
    )
    return Evaluation(
        context=Context(
            version="0.1.0",
            checkpoint="path/to/model",
            fingerprint="sha256:abc",
            data="photos|held-out",
            images=1234,
            set_aside=3,
            image_size=64,
            transform="short-side-bicubic-center-crop/1",
            resample="bicubic, antialiased",
            eos_threshold=0.5,
            device="cpu",
            device_name="A processor",
            dtype="float32",
            threads=2,
            batch_size=32,
            torch="2.13.0",
            seconds=12.5,
            measures=(
                Measure("PSNR", "dB"),
                Measure("rFID", "Frechet", extractor="Inception", sha256="0123abcd", resize="bilinear"),
                Measure("LPIPS", "vgg", left_out="no backbone weights"),
            ),
            warnings=warnings,
            vqgan="path/to/vqgan",
        ),
        rows=rows,
        lengths=Lengths(2.75, {5: 1.0, 50: 3.0, 95: 4.0}, (2, 1, 4, 3)),
        complexity=Complexity(0.72, (Point(0.0, 1, 31.5), Point(120.5, 4, 22.5), Point(3.5, 2, 27.5))),
        codebooks=(CodebookUse("VQGAN", 160, 30, 32, 21.75),),
        grounding=Grounding(77, {"text too long": 5}, 0.125, 3.5, 4.25, regions),
        probes=(ProbeRow("digits", "pooled tokens", 0.9125, 1400, 397, 128),),
    )
