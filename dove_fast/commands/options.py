"""What several commands have in common: exit codes, options, and the model they name."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dove_fast.jobs import LoadedModel, TokenizeReport

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = [
    "EXIT_CODES",
    "EXIT_DONE",
    "EXIT_INTERRUPTED",
    "EXIT_REFUSED",
    "EXIT_SET_ASIDE",
    "EXIT_STOPPED",
    "add_batch_option",
    "add_command",
    "add_device_options",
    "add_eos_option",
    "add_length_options",
    "add_model_options",
    "add_vqgan_option",
    "fail",
    "load",
    "positive",
    "warn_of_kept",
]

EXIT_DONE, EXIT_SET_ASIDE, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

EXIT_CODES = """exit codes: 0 done; 1 finished, but some inputs were set aside; 2 wrong use, a refused output, or
nothing to do; 3 stopped by a failure, resumable; 130 interrupted, resumable"""


def fail(code: int, message: str) -> int:
    """Print one line on stderr and return the exit code."""
    print(f"dove-fast: {message}", file=sys.stderr)
    return code


def warn_of_kept(store: str, report: TokenizeReport) -> int:
    """Say which units have fewer images than before they were done again; returns the exit code, 0 for none."""
    if not report.kept:
        return EXIT_DONE
    from dove_fast.store.replaced import REPLACED_NAME

    units = ("unit " if len(report.kept) == 1 else "units ") + ", ".join(map(str, report.kept))
    return fail(
        EXIT_SET_ASIDE,
        f"fewer images than before in {units} (errors.jsonl says why); what there was is in {store}/{REPLACED_NAME}",
    )


def add_command(commands: Commands, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Add a command's parser; `examples` stand at the end of its help."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the model and how it runs."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="the model's directory (default: tiny, the model of 64x64 pixels that comes with the package)",
    )
    add_device_options(parser)
    add_batch_option(parser)


def add_device_options(parser: argparse._ActionsContainer) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: the checkpoint's; tiny's is float32)",
    )


def add_batch_option(parser: argparse._ActionsContainer) -> None:
    """Add --batch-size."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="images given to the model at a time (default: %(default)s)",
    )


def add_eos_option(parser: argparse._ActionsContainer) -> None:
    """Add --eos-threshold."""
    parser.add_argument(
        "--eos-threshold",
        type=float,
        metavar="P",
        help="the probability above which an image ends (default: the checkpoint's)",
    )


def add_length_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add --length and --max-length."""
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--length", type=int, metavar="N", help=f"{verb}exactly N tokens an image")
    lengths.add_argument("--max-length", type=int, metavar="N", help=f"{verb}at most N tokens an image")


def add_vqgan_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --vqgan, the VQGAN without tokens that is measured or shown; `what` says which of the two, as a verb."""
    parser.add_argument(
        "--vqgan",
        metavar="DIR",
        help=f"the checkpoint whose VQGAN {what}, such as what CHECKPOINT was trained from (default: CHECKPOINT's "
        "own, whose decoder may have learnt with the tokens)",
    )


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load(arguments: argparse.Namespace) -> LoadedModel:
    """Load the model that `add_model_options` named."""
    from dove_fast import keep_freed_memory, native
    from dove_fast.jobs import load_model

    loaded = load_model(arguments.checkpoint, device=arguments.device, dtype=arguments.dtype)
    if loaded.model.device.type == "cpu" and native.why_no_native() is None:
        # The process is this job's alone, and goes through the same sizes batch after batch.
        keep_freed_memory()
    return loaded
