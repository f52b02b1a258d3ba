"""dove-fast train: a run as a TOML file says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dove_fast.commands.options import EXIT_DONE, EXIT_INTERRUPTED, add_command, fail
from dove_fast.words import counted

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands

__all__ = ["add"]

TRAIN_EXAMPLES = """examples:
  dove-fast train run.toml
  torchrun --nproc-per-node 2 -m dove_fast.cli train run.toml   two processes, one GPU each

Run the same command again to go on after an interruption. docs/TRAINING.md describes the file."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "train", "train a model as a TOML file says, or go on with it", TRAIN_EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="the run's TOML file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    parser.add_argument(
        "--allow-download", action="store_true", help="let LPIPS download its backbone's weights (default: never)"
    )
    parser.set_defaults(run=run, resume="run the same command again to go on from the last checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    import logging

    from dove_fast import keep_freed_memory, native
    from dove_fast.jobs.display import training_bar
    from dove_fast.training import TrainConfig, process_group, train

    logging.basicConfig(format="dove-fast: %(message)s", level=logging.INFO)
    config = TrainConfig.from_toml(arguments.config)
    with process_group(arguments.device) as ranks:
        if ranks.device.type == "cpu" and native.why_no_native() is None:
            keep_freed_memory()
        with training_bar(enabled=ranks.is_first) as on_progress:
            report = train(config, ranks, allow_download=arguments.allow_download, on_progress=on_progress)
    if ranks.is_first:
        rate = f", {report.computed / report.seconds:.2f} steps/s" if report.computed else ""
        print(f"{config.run.output}: {report.step:,} of {counted(report.steps, 'step')}, {report.computed:,} now{rate}")
    if report.interrupted:
        return fail(EXIT_INTERRUPTED, f"interrupted; {arguments.resume}")
    if ranks.is_first:
        print(f"the model is in {report.model}")
    return EXIT_DONE
