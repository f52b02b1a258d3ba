"""dove-fast info: what a store, a checkpoint or the installation is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dove_fast.commands.options import EXIT_DONE, add_command

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands

__all__ = ["add"]

INFO_EXAMPLES = """examples:
  dove-fast info store/
  dove-fast info model/
  dove-fast info tiny                                   the model that comes with the package
  dove-fast info                                        what was built, and which backends work"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "info", "describe a token store, a checkpoint, or this installation", INFO_EXAMPLES)
    parser.add_argument(
        "path",
        metavar="STORE|CHECKPOINT",
        nargs="?",
        help="the directory of a token store or of a checkpoint, or tiny (default: describe this installation)",
    )
    parser.set_defaults(run=run, resume="nothing was changed")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from rich.console import Console

    from dove_fast.errors import StoreError
    from dove_fast.jobs.display import show_checkpoint, show_installation, show_store
    from dove_fast.jobs.info import is_checkpoint, is_store, summarize_checkpoint, summarize_store
    from dove_fast.models.checkpoint import CONFIG_NAME
    from dove_fast.models.shipped import shipped_directory
    from dove_fast.store.layout import MANIFEST_NAME

    console = Console()
    if arguments.path is None:
        show_installation(console)
        return EXIT_DONE
    path = shipped_directory(arguments.path) or Path(arguments.path)
    if not path.exists():
        raise FileNotFoundError(f"no token store or checkpoint at {path}")
    if not is_checkpoint(path) and not is_store(path):
        raise StoreError(f"{path} is neither a token store ({MANIFEST_NAME}) nor a checkpoint ({CONFIG_NAME})")
    if is_checkpoint(path):
        show_checkpoint(summarize_checkpoint(path), arguments.path, console)
    else:
        show_store(summarize_store(path), str(path), console)
    return EXIT_DONE
