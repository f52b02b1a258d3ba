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
    names = (
        ("VQGAN alone", VQGAN_ALONE, 16.0, 7.04, 1.51, 32.0),
        ("2 tokens", FIXED, 2.0, 18.91, 2.62, 256.0),
        ("4 tokens", FIXED, 4.0, 9.28, 3.73, 512.0),
        ("adaptive", ADAPTIVE, 2.75, 12.34, 4.84, 352.0),
    )
    rows = tuple(
        QualityRow(
            name,
            kind,
            tokens,
            Spread(20.0 + row, 10.5 + row, 19.25 + row, 30.75 + row),
            Spread(0.8 + row / 100, 0.7 + row / 100, 0.81 + row / 100, 0.9 + row / 100),
            Spread(0.2 + row / 50, 0.1 + row / 50, 0.21 + row / 50, 0.3 + row / 50),
            rfid,
            gflop,
            size,
        )
        for row, (name, kind, tokens, rfid, gflop, size) in enumerate(names)
    )
    regions = (
        RegionRow("adaptive", ADAPTIVE, True, 3.5, 0.00125, 0.0025, 29.03, 26.02),
        RegionRow("adaptive", ADAPTIVE, False, 4.25, 0.0015, 0.00275, 28.24, 25.61),
    )
    uses = tuple(CodebookUse(name, 160 + row, 27 + row, 32, 21.75 + row) for row, (name, *_) in enumerate(names))
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
                Measure("PSNR", "dB", images=1234),
                Measure("rFID", "Frechet", extractor="Inception", sha256="0123abcd", resize="bilinear"),
                Measure("LPIPS", "vgg", left_out="no backbone weights"),
            ),
            warnings=warnings,
            vqgan="path/to/vqgan",
            vqgan_fingerprint="sha256:def",
            measuring_seconds=8.25,
        ),
        rows=rows,
        lengths=Lengths(2.75, {5: 1.0, 50: 3.0, 95: 4.0}, (2, 1, 4, 3)),
        complexity=Complexity(0.72, (Point(0.0, 1, 31.5), Point(120.5, 4, 22.5), Point(3.5, 2, 27.5))),
        codebooks=uses,
        grounding=Grounding(77, {"text too long": 5}, 0.125, 3.5, 4.25, regions),
        probes=(ProbeRow("digits", "pooled tokens", 0.9125, 1400, 397, 128),),
    )
