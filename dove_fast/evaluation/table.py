"""An evaluation as Markdown: the tables, and under each what its numbers were measured with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dove_fast.evaluation.columns import COSTS, MEASURES, Column, measured
from dove_fast.evaluation.results import Context, Evaluation, Grounding, Lengths, Measure, ProbeRow, QualityRow, Spread
from dove_fast.jobs.info import length_histogram
from dove_fast.words import counted

__all__ = ["markdown"]

# What stands where there is no number.
NONE = "-"


def markdown(evaluation: Evaluation, plots: Sequence[str] = ()) -> str:
    """Return an evaluation as a page of Markdown, which shows the plots of these names beside it."""
    return "\n".join(_lines(evaluation, plots)) + "\n"


def _lines(evaluation: Evaluation, plots: Sequence[str]) -> Iterator[str]:
    context = evaluation.context
    yield f"# Evaluation of {context.checkpoint}"
    yield ""
    set_aside = f", {counted(context.set_aside, 'input')} set aside" if context.set_aside else ""
    images = counted(context.images, "image")
    yield f"{images} of {context.data}, {context.image_size} x {context.image_size} pixels{set_aside}."
    yield from _section("Quality by number of tokens", _quality(evaluation))
    yield ""
    yield "Means over the images, in brackets the 5th and the 95th percentile. The VQGAN alone has codes, no tokens."
    for warning in context.warnings:
        yield f"\n**{warning[:1].upper()}{warning[1:]}.**"
    for name in plots:
        yield f"\n![{name.partition('.')[0]}]({name})"
    yield from _section("Lengths", _lengths(evaluation))
    yield ""
    yield from _histogram(evaluation.lengths)
    yield from _section("Codebook", _codebooks(evaluation))
    if evaluation.grounding is not None:
        yield from _section("Texts", _grounding(evaluation.grounding))
        yield from _grounding_notes(evaluation.grounding)
    if evaluation.probes:
        yield from _section("Linear probes", _probes(evaluation.probes))
    yield from _section("Measures", _measures(context.measures))
    yield from _section("Measured on", _context(context))


def _section(title: str, table: Iterable[str]) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield from table


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        cells = (" ".join(cell.replace("|", "\\|").split()) for cell in row)
        yield f"| {' | '.join(cells)} |"


def _quality(evaluation: Evaluation) -> Iterator[str]:
    columns = [*MEASURES, *measured(COSTS, evaluation.rows)]
    return _table(
        ("", "tokens", *(column.label for column in columns)),
        ((row.name, f"{row.tokens:.1f}", *(_figure(column, row) for column in columns)) for row in evaluation.rows),
    )


def _figure(column: Column, row: QualityRow) -> str:
    values, digits = column.value(row), column.digits
    if not isinstance(values, Spread):
        return column.text(row, NONE)
    return f"{values.mean:.{digits}f} ({values.p5:.{digits}f} to {values.p95:.{digits}f})"


def _histogram(lengths: Lengths) -> Iterator[str]:
    each = np.repeat(np.arange(1, lengths.num_tokens + 1), lengths.histogram)
    return _table(
        ("adaptive tokens", "images"),
        (
            (str(first) if first == last else f"{first} to {last}", f"{count:,}")
            for first, last, count in length_histogram(each, lengths.num_tokens)
        ),
    )


def _lengths(evaluation: Evaluation) -> Iterator[str]:
    lengths, correlation = evaluation.lengths, evaluation.complexity.rank_correlation
    percentiles = [(f"percentile {percent}", f"{value:g}") for percent, value in lengths.percentiles.items()]
    rows = [
        ("mean tokens", f"{lengths.mean:.2f} of {lengths.num_tokens}"),
        *percentiles,
        ("rank correlation with complexity", NONE if correlation is None else f"{correlation:.3f}"),
    ]
    return _table(("adaptive", ""), rows)


def _codebooks(evaluation: Evaluation) -> Iterator[str]:
    return _table(
        ("codes of", "codes", "codewords used", "perplexity"),
        (
            (
                use.name,
                f"{use.codes:,}",
                f"{use.used:,} of {use.size:,}, {use.used / use.size:.1%}",
                f"{use.perplexity:.1f}",
            )
            for use in evaluation.codebooks
        ),
    )


def _grounding(grounding: Grounding) -> Iterator[str]:
    head = ("", "text", "tokens", "PSNR inside, dB", "outside", "MSE inside", "outside")
    return _table(
        head,
        (
            (
                row.name,
                "with" if row.with_text else "without",
                f"{row.tokens:.1f}",
                f"{row.psnr_inside:.2f}",
                f"{row.psnr_outside:.2f}",
                f"{row.mse_inside:.5f}",
                f"{row.mse_outside:.5f}",
            )
            for row in grounding.rows
        ),
    )


def _grounding_notes(grounding: Grounding) -> Iterator[str]:
    yield (
        f"\n{grounding.samples:,} texts with their regions, {grounding.region_share:.1%} of the picture on average; "
        f"{grounding.length_with_text:.2f} tokens with the text, {grounding.length_without:.2f} without it."
    )
    if grounding.set_aside:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(grounding.set_aside.items()))
        yield f"Not used: {reasons}."


def _probes(rows: Sequence[ProbeRow]) -> Iterator[str]:
    return _table(
        ("data set", "features", "numbers an image", "accuracy", "trained on", "tested on"),
        (
            (
                row.dataset,
                row.features,
                f"{row.dimension:,}",
                f"{row.accuracy:.2%}",
                f"{row.train_images:,}",
                f"{row.test_images:,}",
            )
            for row in rows
        ),
    )


def _measures(measures: Sequence[Measure]) -> Iterator[str]:
    for measure in measures:
        if measure.left_out is not None:
            yield f"- {measure.name}: left out, {measure.left_out}"
            continue
        parts = [measure.parameters]
        if measure.extractor is not None:
            parts.append(f"by {measure.extractor}, weights' SHA-256 {measure.sha256}")
        if measure.resize is not None:
            parts.append(f"resize: {measure.resize}")
        if measure.images is not None:
            parts.append(f"N = {measure.images:,}")
        yield f"- {measure.name}: {'; '.join(parts)}"


def _context(context: Context) -> Iterator[str]:
    yield f"- checkpoint: {context.checkpoint}, {context.fingerprint}"
    if context.vqgan is not None:
        weights = f", {context.vqgan_fingerprint}" if context.vqgan_fingerprint is not None else ""
        yield f"- VQGAN alone: of {context.vqgan}{weights}"
    yield f"- data: {context.data}, N = {context.images:,}, set aside {context.set_aside:,}"
    yield (
        f"- images: {context.transform}, {context.resample}, to {context.image_size} x {context.image_size}; EOS at "
        f"{context.eos_threshold:g}"
    )
    yield (
        f"- device: {context.device} ({context.device_name}), {context.dtype}, {context.threads} threads, batches of "
        f"{context.batch_size}; dove_fast {context.version}, torch {context.torch}; {context.seconds:.0f} s"
    )
