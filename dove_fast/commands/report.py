"""dove-fast report: what a model does, as one page of pictures."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dove_fast.commands.options import (
    EXIT_DONE,
    EXIT_SET_ASIDE,
    add_command,
    add_device_options,
    add_eos_option,
    add_vqgan_option,
    fail,
    load,
    positive,
)
from dove_fast.words import counted

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands
    from dove_fast.evaluation.report import OnStage

__all__ = ["add"]

REPORT_EXAMPLES = """examples:
  dove-fast report tiny photos/ report.html
  dove-fast report model/ "shards/*.tar" report.html --images 12 --device cuda
  dove-fast report model/ photos/ report.html --evaluation figures/   with what dove-fast evaluate measured

The page is one file, which loads nothing: it opens offline, and can be sent as it is. Inputs that cannot be decoded
(exit code 1) are named with their reason at its end; there is no errors.jsonl."""


def add(commands: Commands) -> None:
    """Add the command."""
    summary = "show what a model does, as one page of pictures"
    parser = add_command(commands, "report", summary, REPORT_EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the model's directory, or tiny")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="images to show: a folder, a text file of paths, WebDataset shards or Parquet files, as for tokenize",
    )
    parser.add_argument("output", metavar="OUT.html", help="the page; one that is there is replaced")
    parser.add_argument(
        "--images",
        type=_images,
        default=8,
        metavar="N",
        help="images shown, simple to complex, at most 64 (default: %(default)s)",
    )
    add_eos_option(parser)
    parser.add_argument(
        "--evaluation",
        metavar="DIR",
        help="where dove-fast evaluate wrote evaluation.json (default: OUT's folder, if there is one)",
    )
    add_vqgan_option(parser, "is shown alone")
    add_device_options(parser)
    parser.set_defaults(run=run, resume="nothing was written")


def _images(text: str) -> int:
    from dove_fast.evaluation.report import MOST_IMAGES

    value = positive(text)
    if value > MOST_IMAGES:
        raise argparse.ArgumentTypeError(f"a page shows at most {MOST_IMAGES} images, got {value}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dove_fast.evaluation.report import check_output, find_evaluation, make_page
    from dove_fast.evaluation.report_page import write_report

    output = check_output(arguments.output)
    evaluation = find_evaluation(output, arguments.evaluation)
    loaded = load(arguments)
    with _bar() as on_stage:
        page = make_page(
            loaded,
            arguments.checkpoint,
            arguments.data,
            evaluation,
            images=arguments.images,
            eos_threshold=arguments.eos_threshold,
            vqgan=arguments.vqgan,
            on_stage=on_stage,
        )
    write_report(output, page)
    shown = page.shown
    print(f"{output}: {len(shown.keys):,} of {counted(shown.looked_at, 'image')}, {output.stat().st_size / 1e6:.1f} MB")
    if shown.errors:
        unread = counted(len(shown.errors), "input")
        return fail(EXIT_SET_ASIDE, f"{unread} could not be read, the end of {output} says why")
    return EXIT_DONE


@contextlib.contextmanager
def _bar() -> Iterator[OnStage | None]:
    """Show what is being made on stderr while the block runs; None where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("report", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield show
