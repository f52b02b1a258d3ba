"""dove-fast verify: read every byte of a store, and do its damaged units again."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dove_fast.commands.options import EXIT_DONE, EXIT_STOPPED, add_command, warn_of_kept
from dove_fast.words import counted

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands

__all__ = ["add"]

EXAMPLES = """examples:
  dove-fast verify store/
  dove-fast verify store/ --repair                       from where its images were read
  dove-fast verify store/ --repair --input photos/ --checkpoint model/

Every file is compared with the checksum that was taken when it was written. Damage that is found and
not repaired is exit code 3. --repair does the damaged units again, and needs the same images and model; where
one has fewer images then, what it was stays in STORE/replaced, and the exit code is 1."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "verify", "compare every byte of a token store with its checksums", EXAMPLES)
    parser.add_argument("store", metavar="STORE", help="the directory of a complete token store")
    parser.add_argument("--repair", action="store_true", help="do the damaged units again")
    parser.add_argument("--input", metavar="INPUT", help="where the images are (default: where they were)")
    parser.add_argument("--checkpoint", metavar="DIR", help="the model that made the store (default: tiny)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--queries", metavar="FILE", help="the queries that the store was made with")
    parser.set_defaults(run=run, resume="run dove-fast tokenize as the store was made to go on")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dove_fast.jobs.display import progress_bar
    from dove_fast.jobs.progress import Progress
    from dove_fast.store.verify import verify

    if not arguments.repair and (arguments.input or arguments.checkpoint or arguments.queries):
        raise ValueError("--input, --checkpoint and --queries are for --repair")
    with progress_bar("verify") as on_progress:

        def show(done: int, units: int) -> None:
            if on_progress is not None:
                on_progress(Progress(done, units, 0, 0))

        units, found = verify(arguments.store, on_unit=show)
    for damage in found:
        print(f"dove-fast: {damage.file}: {damage.reason}", file=sys.stderr)
    if not found:
        print(f"{arguments.store}: {counted(units, 'unit')}, every byte as it was written")
        return EXIT_DONE
    damaged = sorted({damage.unit for damage in found if damage.unit is not None})
    if not arguments.repair:
        some = f"{len(damaged):,} of {counted(units, 'unit')}"
        print(f"{arguments.store}: damaged: {some}; --repair does such units again")
        return EXIT_STOPPED
    return _repair(arguments, damaged)


def _repair(arguments: argparse.Namespace, damaged: list[int]) -> int:
    from pathlib import Path

    from dove_fast.commands.options import load
    from dove_fast.jobs import read_queries
    from dove_fast.jobs.display import progress_bar
    from dove_fast.jobs.repair import repair
    from dove_fast.store.layout import read_manifest

    arguments.dtype = read_manifest(Path(arguments.store))["environments"][-1]["model_dtype"]
    queries = read_queries(arguments.queries) if arguments.queries is not None else None
    loaded = load(arguments)
    with progress_bar("repair") as on_progress:
        report = repair(
            arguments.store, damaged, loaded, source=arguments.input, queries=queries, on_progress=on_progress
        )
    again, images = counted(len(damaged), "unit"), counted(report.computed, "image")
    print(f"{arguments.store}: {again} done again, {images} in {report.seconds:.1f} s")
    return warn_of_kept(arguments.store, report)
