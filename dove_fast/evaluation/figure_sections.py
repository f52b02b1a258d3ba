"""An evaluation as sections of an HTML page: its tables, and what can be drawn of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from dove_fast.drawing import Axis, Chart, histogram
from dove_fast.evaluation.columns import COSTS, MEASURES, Column, measured
from dove_fast.evaluation.complexity import LEAST_COMPLEXITY
from dove_fast.evaluation.results import ADAPTIVE, FIXED, VQGAN_ALONE, Evaluation, QualityRow, RegionRow
from dove_fast.html import table
from dove_fast.jobs.info import length_histogram
from dove_fast.words import counted

__all__ = ["figure_sections", "grid"]

CHART = 440
DASH = "–"  # noqa: RUF001 - a dash for no number


def figure_sections(evaluation: Evaluation) -> Iterator[str]:
    """Yield the sections on quality, lengths and complexity and, where they were measured, on texts and probes."""
    context = evaluation.context
    yield '<h2 id="figures">Figures of the whole data</h2>'
    yield (
        f'<p class="faint">dove-fast evaluate measured {context.images:,} images of {escape(context.data)} '
        f"({context.set_aside:,} more could not be read), {context.image_size} pixels a side, on "
        f"{escape(context.device_name)} in {escape(context.dtype)}; EOS at {context.eos_threshold:g}.</p>"
    )
    for warning in context.warnings:
        yield f'<p class="warning">{escape(warning[:1].upper() + warning[1:])}.</p>'
    yield from _quality(evaluation)
    yield '<div class="charts">'
    for measure in MEASURES:
        yield from _by_tokens(evaluation.rows, measure)
    yield "</div>"
    yield from _lengths(evaluation)
    yield from _texts(evaluation)
    yield from _probes(evaluation)
    yield from _measures(evaluation)


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> Iterator[str]:
    """Yield a table of plain texts under heads, its first column the rows' names, which scrolls where it is wide."""
    yield f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label)}"><table class="grid"><thead><tr>'
    yield "".join(f'<th scope="col">{escape(head)}</th>' for head in heads) + "</tr></thead><tbody>"
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _quality(evaluation: Evaluation) -> Iterator[str]:
    shown, costs = measured(MEASURES, evaluation.rows), measured(COSTS, evaluation.rows)
    uses = {use.name: use for use in evaluation.codebooks}
    heads = ["", "tokens", *(column.label for column in shown), "PSNR, 5th to 95th", *(cost.label for cost in costs)]
    heads += ["codewords", "perplexity"] if uses else []

    def cells(row: QualityRow) -> list[str]:
        figures = [row.name, f"{row.tokens:,.1f}", *(column.text(row, DASH) for column in shown)]
        figures += [f"{row.psnr.p5:.1f} to {row.psnr.p95:.1f}", *(cost.text(row, DASH) for cost in costs)]
        use = uses.get(row.name)
        if use is not None:
            figures += [f"{use.used:,} of {use.size:,}", f"{use.perplexity:,.1f}"]
        elif uses:
            figures += [DASH, DASH]
        return figures

    yield from grid(heads, [cells(row) for row in evaluation.rows], "Quality by number of tokens")


def _by_tokens(rows: Sequence[QualityRow], measure: Column) -> Iterator[str]:
    """Draw a measure over token counts: a line of the fixed ones, a dot for the adaptive, a level for the VQGAN."""
    name = measure.name
    found = [(row, measure.mean(row)) for row in rows]
    known = [(row, number) for row, number in found if number is not None]
    fixed = [(row.tokens, number) for row, number in known if row.kind == FIXED]
    if not fixed:
        return
    x = Axis.around("tokens an image", [row.tokens for row, _ in known if row.kind != VQGAN_ALONE])
    y = Axis.around(measure.label, [number for _, number in known])
    chart = Chart(f"{name} by number of tokens", x, y, width=CHART)
    yield "<figure>"
    yield from chart.begin()
    for row, number in known:
        if row.kind == VQGAN_ALONE:
            yield from chart.level(number, row.name)
    yield from chart.line(fixed)
    for tokens, number in fixed:
        yield from chart.dot(tokens, number, f"{counted(round(tokens), 'token')}: {number:.4g}")
    for row, number in known:
        if row.kind == ADAPTIVE:
            yield from chart.dot(row.tokens, number, f"{row.name}, {row.tokens:.1f} tokens: {number:.4g}", "chosen", 5)
    yield from chart.end()
    yield f"<figcaption>{name} by number of tokens; the ring is what EOS chooses, at its mean length</figcaption>"
    yield "</figure>"


def _lengths(evaluation: Evaluation) -> Iterator[str]:
    lengths, complexity = evaluation.lengths, evaluation.complexity
    yield '<h2 id="lengths">Lengths</h2>'
    percentiles = ", ".join(f"{percent}%: {value:g}" for percent, value in sorted(lengths.percentiles.items()))
    chosen = f"{lengths.mean:.1f} of {lengths.num_tokens} tokens"
    yield f"<p>EOS chooses {chosen} on average. Percentiles: {percentiles}.</p>"
    yield '<div class="charts"><figure>'
    each = np.repeat(np.arange(1, lengths.num_tokens + 1), lengths.histogram)
    yield from histogram(length_histogram(each, lengths.num_tokens), CHART)
    yield "</figure>"
    points = complexity.points
    if points:
        x = Axis.around(
            "complexity: variance of the Laplacian", [max(p.complexity, LEAST_COMPLEXITY) for p in points], log=True
        )
        y = Axis.around("tokens", [1, lengths.num_tokens])
        chart = Chart("Tokens against complexity, one dot an image", x, y, width=CHART)
        yield "<figure>"
        yield from chart.begin()
        for point in points:
            # A title for each of thousands would be most of the page.
            yield from chart.dot(max(point.complexity, LEAST_COMPLEXITY), point.length, kind="cloud", radius=2)
        yield from chart.end()
        rank = complexity.rank_correlation
        said = "undefined, one side is constant" if rank is None else f"{rank:.2f}"
        drawn = counted(len(points), "image")
        yield f"<figcaption>{drawn}; Spearman's rank correlation of all: {said}</figcaption></figure>"
    yield "</div>"


def _texts(evaluation: Evaluation) -> Iterator[str]:
    grounding = evaluation.grounding
    if grounding is None:
        return
    yield '<h2 id="grounding">What a text changes</h2>'
    yield (
        f"<p>{grounding.samples:,} texts with a region, {grounding.region_share:.0%} of the picture on average: "
        f"{grounding.length_with_text:.1f} tokens with the text, {grounding.length_without:.1f} without.</p>"
    )

    def cells(row: RegionRow) -> list[str]:
        text = "with the text" if row.with_text else "without"
        return [row.name, text, f"{row.tokens:.1f}", f"{row.psnr_inside:.2f}", f"{row.psnr_outside:.2f}"]

    heads = ["", "", "tokens", "PSNR inside, dB", "PSNR outside, dB"]
    yield from grid(heads, [cells(row) for row in grounding.rows], "Errors inside and outside of regions")


def _probes(evaluation: Evaluation) -> Iterator[str]:
    if not evaluation.probes:
        return
    yield '<h2 id="probes">Linear probes</h2>'
    heads = ["data set", "features", "accuracy", "train", "test", "numbers an image"]
    rows = [
        [
            *(row.dataset, row.features, f"{row.accuracy:.1%}"),
            *(f"{count:,}" for count in (row.train_images, row.test_images, row.dimension)),
        ]
        for row in evaluation.probes
    ]
    yield from grid(heads, rows, "Accuracy of linear classifiers")


def _measures(evaluation: Evaluation) -> Iterator[str]:
    """Say how each number came about."""
    context = evaluation.context
    yield "<details><summary>How this was measured</summary>"
    rows = []
    for measure in context.measures:
        parts = [measure.parameters]
        parts += [f"extractor {measure.extractor}"] if measure.extractor else []
        parts += [f"sha256 {measure.sha256}"] if measure.sha256 else []
        parts += [f"resized by {measure.resize}"] if measure.resize else []
        parts += [f"N = {measure.images:,}"] if measure.images is not None else []
        parts += [f"left out: {measure.left_out}"] if measure.left_out else []
        rows.append((measure.name, "; ".join(parts)))
    alone = ", ".join(filter(None, (context.vqgan, context.vqgan_fingerprint))) or "the checkpoint's own"
    rows += [
        ("checkpoint", f"{context.checkpoint}, {context.fingerprint}"),
        ("VQGAN alone", alone),
        ("images", f"N = {context.images:,}; {context.transform}, {context.resample}"),
        ("device", f"{context.device}: {context.device_name}, {context.threads} threads, torch {context.torch}"),
        ("time", f"{context.seconds:.0f} s, batches of {context.batch_size}, dove_fast {context.version}"),
    ]
    yield from table("Measures", rows)
    yield "</details>"
