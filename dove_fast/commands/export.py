"""dove-fast export: a token store in, files for other libraries out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dove_fast.commands.options import EXIT_DONE, add_command, positive
from dove_fast.words import counted

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands

__all__ = ["add"]

EXAMPLES = """examples:
  dove-fast export store/ tars/ --format webdataset      000000.tar and on: .npy, .json and .codes.npy an image
  dove-fast export store/ tables/ --format parquet       for datasets.load_dataset("parquet", data_files=..)
  dove-fast export store/ tables/ --format arrow         for datasets.Dataset.from_file (Arrow's streaming format)
  dove-fast export store/ codes/ --format megatron       tokens.bin and tokens.idx, of a store made with --codes

Run the same command again to go on after an interruption. numpy has no bfloat16: such tokens become
float32, as int8 tokens do. megatron takes integers only: an image's codes are a sequence."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "export", "write a token store in another library's format", EXAMPLES)
    parser.add_argument("store", metavar="STORE", help="the directory of a token store")
    parser.add_argument("output", metavar="OUT", help="the directory of the files")
    parser.add_argument(
        "--format",
        required=True,
        # Those of dove_fast.jobs.export, which a parser must not import.
        choices=("webdataset", "parquet", "arrow", "megatron"),
        help="of the files",
    )
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=1024,
        metavar="N",
        help="images a file (default: %(default)s; megatron has one for all)",
    )
    parser.set_defaults(run=run, resume="whole files are kept, run the same command again to go on")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dove_fast.jobs import export
    from dove_fast.jobs.display import progress_bar
    from dove_fast.store import TokenStore

    store = TokenStore(arguments.store)
    with progress_bar("export") as on_progress:
        report = export(
            store, arguments.output, arguments.format, shard_size=arguments.shard_size, on_progress=on_progress
        )
    if report.files == 0:
        images = counted(len(store), "image")
        print(f"{arguments.output}: all files of {images} were there already, nothing was written")
        return EXIT_DONE
    print(
        f"{arguments.output}: {counted(report.files, 'file')}, {counted(report.images, 'image')}, "
        f"{counted(report.tokens, 'code' if arguments.format == 'megatron' else 'token')} in {report.seconds:.1f} s"
    )
    return EXIT_DONE
