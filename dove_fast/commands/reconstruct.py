"""dove-fast reconstruct: a token store in, pictures out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dove_fast.commands.options import EXIT_DONE, add_command, add_length_options, add_model_options, load
from dove_fast.words import counted

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands

__all__ = ["add"]

RECONSTRUCT_EXAMPLES = """examples:
  dove-fast reconstruct store/ pictures/
  dove-fast reconstruct store/ pictures/ --max-length 8   from the first 8 tokens of each image
  dove-fast reconstruct store/ pictures/ --checkpoint model/   the checkpoint that made the store"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "reconstruct", "decode a token store to PNG files", RECONSTRUCT_EXAMPLES)
    parser.add_argument("store", metavar="STORE", help="the directory of a token store")
    parser.add_argument("output", metavar="OUT", help="the directory of the pictures")
    add_model_options(parser)
    add_length_options(parser, "decode ")
    parser.set_defaults(run=run, resume="the pictures that were written are kept, run the same command again to go on")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dove_fast.jobs import reconstruct
    from dove_fast.jobs.display import progress_bar
    from dove_fast.store import TokenStore

    store = TokenStore(arguments.store)
    loaded = load(arguments)
    with progress_bar("reconstruct") as on_progress:
        report = reconstruct(
            store,
            arguments.output,
            loaded,
            length=arguments.length,
            max_length=arguments.max_length,
            batch_size=arguments.batch_size,
            on_progress=on_progress,
        )
    if report.images == 0:
        print(f"{arguments.output}: {counted(len(store), 'picture')} there already, nothing was computed")
        return EXIT_DONE
    print(
        f"{arguments.output}: {counted(report.images, 'picture')} from {counted(report.tokens, 'token')} in "
        f"{report.seconds:.1f} s, {report.images / report.seconds:.1f} images/s"
    )
    return EXIT_DONE
