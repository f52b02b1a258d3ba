"""The plots of an evaluation, as SVG files that are the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dove_fast.atomic import replacing
from dove_fast.evaluation.columns import MEASURES
from dove_fast.evaluation.complexity import LEAST_COMPLEXITY
from dove_fast.evaluation.results import ADAPTIVE, FIXED, VQGAN_ALONE, Complexity, Evaluation, Lengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COMPLEXITY_PLOT",
    "LENGTHS_PLOT",
    "PLOTS",
    "QUALITY_PLOT",
    "check_matplotlib",
    "draw_complexity",
    "draw_plots",
]

PLOTS = QUALITY_PLOT, LENGTHS_PLOT, COMPLEXITY_PLOT = "quality.svg", "lengths.svg", "complexity.svg"
FIXED_COLOUR, ADAPTIVE_COLOUR, VQGAN_COLOUR = "#0b6e99", "#b0483a", "#6b6b6b"


def check_matplotlib() -> None:
    """Raise `ImportError` that names the extra where matplotlib cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib, which cannot be imported ({error}); pip install 'dove-fast[eval]', or leave them "
            "out with --no-plots"
        ) from error


def draw_plots(directory: Path, evaluation: Evaluation) -> None:
    """Write `QUALITY_PLOT`, `LENGTHS_PLOT` and `COMPLEXITY_PLOT`. Raises what `check_matplotlib` raises, `OSError`."""
    check_matplotlib()
    _draw_quality(directory / QUALITY_PLOT, evaluation)
    _draw_lengths(directory / LENGTHS_PLOT, evaluation.lengths)
    draw_complexity(directory / COMPLEXITY_PLOT, evaluation.complexity, evaluation.context.images)


def draw_complexity(path: Path, complexity: Complexity, images: int) -> None:
    """Draw length against complexity, the rank correlation over `images` in the title."""
    check_matplotlib()
    figure = _figure(6, 3.5)
    axes = figure.subplots()
    x = [max(point.complexity, LEAST_COMPLEXITY) for point in complexity.points]
    y = [point.length for point in complexity.points]
    # Rasterised: thousands of points as outlines are a large file.
    axes.scatter(x, y, s=4, alpha=0.4, color=FIXED_COLOUR, rasterized=True)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("complexity: variance of the Laplacian")
    axes.set_ylabel("tokens")
    correlation = "not defined" if complexity.rank_correlation is None else f"{complexity.rank_correlation:.2f}"
    shown = f", {len(x):,} shown" if len(x) < images else ""
    axes.set_title(f"rank correlation {correlation}, {images:,} images{shown}", fontsize=10)
    _save(figure, path)


def _draw_quality(path: Path, evaluation: Evaluation) -> None:
    """Draw a panel a measure that has numbers, against tokens."""
    rows, context = evaluation.rows, evaluation.context
    panels = [
        (measure.label, values)
        for measure, values in ((measure, [measure.mean(row) for row in rows]) for measure in MEASURES)
        if None not in values
    ]
    figure = _figure(4 * len(panels), 3.2)
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found: dict[str, list[Any]] = {
            kind: [(row.tokens, value) for row, value in zip(rows, values, strict=True) if row.kind == kind]
            for kind in (VQGAN_ALONE, FIXED, ADAPTIVE)
        }
        for tokens, value in found[VQGAN_ALONE]:
            axes.axhline(value, color=VQGAN_COLOUR, linestyle="--", label=f"VQGAN alone, {tokens:g} codes")
        axes.plot(*zip(*found[FIXED], strict=True), "o-", color=FIXED_COLOUR, label="fixed lengths")
        axes.plot(*zip(*found[ADAPTIVE], strict=True), "D", color=ADAPTIVE_COLOUR, label="adaptive, mean length")
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"means of {context.images:,} images, {context.image_size} x {context.image_size}", fontsize=10)
    _save(figure, path)


def _draw_lengths(path: Path, lengths: Lengths) -> None:
    """Draw a bar a length."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(6, 3)
    axes = figure.subplots()
    axes.bar(range(1, lengths.num_tokens + 1), lengths.histogram, width=1.0, color=FIXED_COLOUR)
    axes.axvline(lengths.mean, color=ADAPTIVE_COLOUR, linestyle="--", label=f"mean {lengths.mean:.1f}")
    axes.set_xlim(0.5, lengths.num_tokens + 0.5)
    axes.set_xlabel("tokens that EOS chose")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, which keeps a state of its own and may want a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    import matplotlib as mpl

    with replacing(path, durable=False) as file, mpl.rc_context({"svg.hashsalt": "dove_fast"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, dpi=150)
