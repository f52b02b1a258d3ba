"""A tokenization by several processes: one a device of this machine, or Ray's."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dove_fast.commands.options import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_SET_ASIDE,
    EXIT_STOPPED,
    fail,
)
from dove_fast.commands.outcome import conclude, write_store_report
from dove_fast.words import counted

if TYPE_CHECKING:
    from dove_fast.jobs import TokenizeOptions
    from dove_fast.jobs.progress import Progress

__all__ = ["run_on_devices", "run_with_ray"]

# Options of one process that works alone.
NOT_WITH_SEVERAL = ("rank", "world_size", "dry_run", "metrics", "prometheus", "retry_errors")


def run_on_devices(arguments: argparse.Namespace) -> int:
    """Start one process a device, and tell when they are done what came of it."""
    from dove_fast.errors import DoveError
    from dove_fast.jobs.display import progress_bar
    from dove_fast.jobs.ranks import StoreWatch
    from dove_fast.jobs.ranks import run_on_devices as run_processes
    from dove_fast.jobs.report import Curve, RunFigures
    from dove_fast.store import TokenStore
    from dove_fast.store.layout import read_manifest

    devices = [name.strip() for name in arguments.devices.split(",") if name.strip()]
    if not devices:
        raise ValueError("--devices must name devices, such as cuda:0,cuda:1")
    if arguments.engine == "ray":
        raise ValueError("--devices goes without --engine ray; see --processes")
    _refuse(arguments, "--devices", ("device", *NOT_WITH_SEVERAL))
    given = list(arguments.argv)
    place = next(i for i, word in enumerate(given) if word.split("=")[0] == "--devices")
    del given[place : place + (1 if "=" in given[place] else 2)]
    curve, start = Curve(), time.perf_counter()
    with progress_bar("units") as show:

        def tell(progress: Progress) -> None:
            curve.add(progress.elapsed, progress.images)
            if show is not None:
                show(progress)

        watch = StoreWatch(Path(arguments.output), tell)
        # One report, of what all of them did.
        ended = run_processes([*given, "--no-report"], devices, on_poll=watch.poll)
        seconds = time.perf_counter() - start
        watch.look()
    for process in ended:
        if process.code not in (EXIT_DONE, EXIT_SET_ASIDE):
            why = f": {process.error}" if process.error else ""
            print(f"dove-fast: {process.device}: {process.how}{why}", file=sys.stderr)
    codes = {process.code for process in ended}
    if EXIT_INTERRUPTED in codes:
        raise KeyboardInterrupt
    if codes.isdisjoint((EXIT_DONE, EXIT_SET_ASIDE)):
        # Also for a signal, whose number is no exit code.
        return EXIT_REFUSED if codes == {EXIT_REFUSED} else EXIT_STOPPED
    try:
        if codes <= {EXIT_DONE, EXIT_SET_ASIDE} and not read_manifest(Path(arguments.output))["complete"]:
            print(f"{arguments.output}: not done: units which other jobs have, or left behind; run again to finish")
            return max(codes)
        store = TokenStore(arguments.output)
    except (DoveError, OSError) as error:
        return fail(EXIT_STOPPED, str(error))
    totals = store.manifest["totals"]
    held = f"{counted(len(store), 'image')}, {counted(totals['tokens'], 'token')}"
    print(f"{arguments.output}: {held}, {totals['errors']:,} set aside")
    figures = RunFigures(watch.images, seconds, ", ".join(devices), throughput=curve.rates())
    code = EXIT_SET_ASIDE if totals["errors"] else EXIT_DONE
    return max(code, write_store_report(arguments, figures if watch.images else None))


def run_with_ray(arguments: argparse.Namespace, options: TokenizeOptions) -> int:
    """Let Ray's processes do the work."""
    import torch

    from dove_fast.jobs import read_queries
    from dove_fast.jobs.display import progress_bar
    from dove_fast.jobs.ray_engine import tokenize_with_ray
    from dove_fast.jobs.report import Curve, Extremes

    _refuse(arguments, "--engine ray", NOT_WITH_SEVERAL)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    queries = read_queries(arguments.queries) if arguments.queries is not None else None
    curve, start = Curve(), time.perf_counter()
    with progress_bar("tokenize") as show:

        def tell(progress: Progress) -> None:
            # Its own time is that of the last look at the store.
            curve.add(time.perf_counter() - start, progress.images)
            if show is not None:
                show(progress)

        report = tokenize_with_ray(
            arguments.input,
            arguments.output,
            arguments.checkpoint,
            options,
            device=device,
            dtype=arguments.dtype,
            queries=queries,
            address=arguments.ray_address,
            processes=arguments.processes,
            gpus_each=0 if device == "cpu" else 1,
            on_progress=tell,
        )
    return conclude(arguments, report, device, curve, Extremes())


def _refuse(arguments: argparse.Namespace, option: str, others: tuple[str, ...]) -> None:
    """Raise `ValueError` for options that have no meaning beside `option`."""
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) not in (None, False)]
    if given:
        raise ValueError(f"{option} goes without {', '.join(given)}")
