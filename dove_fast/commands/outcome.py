"""What a tokenization came to: said, and reported in the store."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dove_fast.commands.options import EXIT_DONE, EXIT_SET_ASIDE, EXIT_STOPPED, fail, warn_of_kept
from dove_fast.words import counted

if TYPE_CHECKING:
    from dove_fast.jobs import TokenizeReport
    from dove_fast.jobs.report import Curve, Extremes, RunFigures

__all__ = ["REPORT_NAME", "conclude", "write_store_report"]

# The report stands in the store.
REPORT_NAME = "report.html"


def conclude(
    arguments: argparse.Namespace, report: TokenizeReport, device: str, curve: Curve, extremes: Extremes
) -> int:
    """Say what came of a run, leave its report in the store, and return the exit code."""
    from dove_fast.jobs.report import RunFigures

    code = _say(arguments.output, report)
    if not report.complete:
        return code
    figures = RunFigures(
        computed=report.computed,
        seconds=report.seconds,
        device=device,
        shares=report.stages,
        throughput=curve.rates(),
        longest=extremes.longest,
        shortest=extremes.shortest,
    )
    return max(code, write_store_report(arguments, None if report.already_complete else figures))


def write_store_report(arguments: argparse.Namespace, figures: RunFigures | None) -> int:
    """Write the report of a complete store, without `figures` only where there is none; returns the exit code."""
    from dove_fast.errors import DoveError
    from dove_fast.failures import stopping
    from dove_fast.jobs.report import store_report, write_report

    output = Path(arguments.output)
    path = output / REPORT_NAME
    if arguments.no_report or (figures is None and path.exists()):
        return EXIT_DONE
    try:
        with stopping("run the same command again to write it"):
            write_report(path, store_report(output, figures))
    except DoveError as error:
        # Neither wrong use nor a job that has to go on.
        return fail(EXIT_STOPPED, f"the store is complete, but its report could not be written: {error}")
    return EXIT_DONE


def _say(output: str, report: TokenizeReport) -> int:
    """Print what came of it, and return the exit code."""
    from rich.console import Console

    from dove_fast.jobs.display import TokenizeSummary, show_tokenize_summary

    mean = f", mean {report.tokens / report.records:.2f}" if report.records else ""
    held = f"{counted(report.records, 'image')}, {counted(report.tokens, 'token')}"
    print(f"{output}: {held}{mean}, {report.errors:,} set aside")
    if report.already_complete:
        print("it was complete already, nothing was computed")
    else:
        rate = report.computed / report.seconds
        print(f"{counted(report.computed, 'image')} in {report.seconds:.1f} s, {rate:.1f} images/s")
    console = Console()
    if console.is_terminal and not report.already_complete:
        summary = TokenizeSummary(
            images=report.records,
            set_aside=report.errors,
            tokens=report.tokens,
            computed=report.computed,
            seconds=report.seconds,
            stages=report.stages,
            quantization_error=report.quantization_error,
        )
        show_tokenize_summary(summary, output, console)
    if not report.complete:
        left = f"{report.missing:,} of {counted(report.units, 'unit')}"
        print(f"not done: {left}, which other jobs have, or left behind; run again to finish")
    if report.errors:
        again = "; --retry-errors tries them again once they are mended" if report.already_complete else ""
        set_aside = counted(report.errors, "input")
        print(f"dove-fast: {set_aside} set aside, see {output}/errors.jsonl{again}", file=sys.stderr)
    return max(warn_of_kept(output, report), EXIT_SET_ASIDE if report.errors else EXIT_DONE)
