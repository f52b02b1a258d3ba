"""dove-fast evaluate: a checkpoint and images in, tables and plots of what its tokens are worth out."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dove_fast.commands.options import (
    EXIT_DONE,
    EXIT_SET_ASIDE,
    add_batch_option,
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
    from dove_fast.evaluation.evaluate import OnStage
    from dove_fast.evaluation.results import Evaluation
    from dove_fast.jobs.progress import OnProgress, Progress
    from dove_fast.store.records import InputError

__all__ = ["add"]

EXAMPLES = """examples:
  dove-fast evaluate tiny photos/                            the model that comes with the package, into evaluation/
  dove-fast evaluate model/ 'val-{000..006}.tar' out/ --images 5000 --device cuda
  dove-fast evaluate model/ val/ out/ --lpips-weights vgg16.pth \\
      --inception-weights weights-inception-2015-12-05-6726825d.pth
  dove-fast evaluate model/ val/ out/ --probe labelled/ --probe digits

OUT gets evaluation.md (tables), evaluation.json (the same for programs) and plots: quality.svg, lengths.svg and
complexity.svg. Inputs that cannot be decoded are named with their reason in OUT/errors.jsonl, also where there are
more than --max-errors."""


def add(commands: Commands) -> None:
    """Add the command."""
    summary = "measure what a model's tokens are worth, by token count: PSNR, SSIM, LPIPS, rFID, lengths, codebook"
    parser = add_command(commands, "evaluate", summary, EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the model's directory, or tiny")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="images, as INPUT of dove-fast tokenize. Of WebDataset shards with texts and boxes, and a model with a "
        "tokenizer, it is also measured what the texts do",
    )
    parser.add_argument(
        "output",
        nargs="?",
        default="evaluation",
        metavar="OUT",
        help="the directory of the results, new, empty, or an evaluation's (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation that OUT holds")
    parser.add_argument("--images", type=positive, metavar="N", help="the first N images, and N texts (default: all)")
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N,..", help="token counts (default: 1/8, 2/8, .. 8/8 of the most)"
    )
    add_eos_option(parser)
    add_vqgan_option(parser, "stands in the table alone")
    networks = parser.add_argument_group("networks that measure, left out without weights")
    networks.add_argument("--lpips-weights", metavar="FILE", help="of torchvision's vgg16, or what --lpips-net names")
    networks.add_argument("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="(default: vgg)")
    networks.add_argument(
        "--inception-weights",
        metavar="FILE",
        help="weights-inception-2015-12-05-6726825d.pth, what torch-fidelity and torchmetrics load",
    )
    networks.add_argument(
        "--allow-download", action="store_true", help="download the weights and data sets that are not here"
    )
    probing = parser.add_argument_group("linear probes")
    probing.add_argument(
        "--probe",
        action="append",
        default=[],
        metavar="DATA",
        help="a folder with a folder of images for each class, digits, or cifar10:ROOT, cifar100:ROOT, stl10:ROOT; "
        "repeatable",
    )
    probing.add_argument("--probe-images", type=positive, metavar="N", help="N images of each (default: all)")
    running = parser.add_argument_group("how it runs")
    add_device_options(running)
    add_batch_option(running)
    running.add_argument(
        "--max-errors", type=int, metavar="N", help="stop when more inputs cannot be read, the probes' counted too"
    )
    running.add_argument("--no-plots", action="store_true", help="do without matplotlib")
    parser.set_defaults(run=run, resume="nothing was written, run the same command again")


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be token counts such as 8,16,32, got {text!r}") from None


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dove_fast.evaluation.evaluate import EvaluateOptions, evaluate
    from dove_fast.evaluation.outputs import TABLE_NAME, check_output, made_output, write_errors, write_outputs
    from dove_fast.evaluation.plots import check_matplotlib
    from dove_fast.failures import JobError
    from dove_fast.store.layout import ERRORS_NAME

    output = Path(arguments.output)
    options = EvaluateOptions(
        images=arguments.images,
        lengths=arguments.lengths,
        batch_size=arguments.batch_size,
        eos_threshold=arguments.eos_threshold,
        max_errors=arguments.max_errors,
        lpips_weights=arguments.lpips_weights,
        lpips_net=arguments.lpips_net,
        inception_weights=arguments.inception_weights,
        allow_download=arguments.allow_download,
        vqgan=arguments.vqgan,
        probes=tuple(arguments.probe),
        probe_images=arguments.probe_images,
    )
    check_output(output, overwrite=arguments.overwrite)
    if not arguments.no_plots:
        check_matplotlib()
    loaded = load(arguments)
    errors: list[InputError] = []
    with made_output(output):
        try:
            with _bars() as on_stage:
                found = evaluate(
                    *(loaded, arguments.checkpoint, arguments.data, options),
                    on_stage=on_stage,
                    on_set_aside=errors.append,
                ).evaluation
        except JobError:
            if errors:
                write_errors(output, errors)
                set_aside = counted(len(errors), "input")
                print(f"dove-fast: {set_aside} set aside, see {output}/{ERRORS_NAME}", file=sys.stderr)
            raise
        write_outputs(output, found, errors, plots=not arguments.no_plots)
    _show(found)
    context = found.context
    rate = context.images / max(context.measuring_seconds or context.seconds, 1e-9)
    images = counted(context.images, "image")
    print(f"{output}: {images} at {rate:.1f} images/s, {context.seconds:.1f} s in all; see {TABLE_NAME}")
    if errors:
        return fail(EXIT_SET_ASIDE, f"{counted(len(errors), 'input')} set aside, see {output}/{ERRORS_NAME}")
    return EXIT_DONE


@contextlib.contextmanager
def _bars() -> Iterator[OnStage]:
    """Show a bar on stderr while the block runs, a new one for each stage."""
    from dove_fast.jobs.display import progress_bar

    with contextlib.ExitStack() as stack:
        current: str | None = None
        show: OnProgress | None = None

        def tell(stage: str, progress: Progress) -> None:
            nonlocal current, show
            if stage != current:
                stack.close()
                current, show = stage, stack.enter_context(progress_bar(stage))
            if show is not None:
                show(progress)

        yield tell


def _show(evaluation: Evaluation) -> None:
    """Print the table of quality, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    from dove_fast.evaluation.columns import COSTS, MEASURES, measured

    left_out = {measure.name: measure.left_out for measure in evaluation.context.measures if measure.left_out}
    table = Table()
    table.add_column("")
    columns = measured([*MEASURES, *COSTS], evaluation.rows)
    table.add_column("tokens", justify="right")
    for column in columns:
        table.add_column(column.label, justify="right")
    for row in evaluation.rows:
        table.add_row(row.name, f"{row.tokens:.1f}", *(column.text(row) for column in columns))
    Console().print(table)
    for name, reason in left_out.items():
        print(f"{name}: left out, {reason}")
    for warning in evaluation.context.warnings:
        print(f"dove-fast: {warning}", file=sys.stderr)
