"""dove-fast tokenize: images in, a token store out."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dove_fast.commands.options import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_SET_ASIDE,
    EXIT_STOPPED,
    add_command,
    add_length_options,
    add_model_options,
    fail,
    load,
    positive,
    warn_of_kept,
)

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands
    from dove_fast.jobs import TokenizeOptions, TokenizeReport
    from dove_fast.jobs.progress import OnProgress, Progress
    from dove_fast.jobs.report import Curve, Extremes, RunFigures

__all__ = ["add"]

EXAMPLES = """examples:
  dove-fast tokenize photos/ store/                     every image below a folder
  dove-fast tokenize paths.txt store/ --max-length 32   a text file of paths, at most 32 tokens an image
  dove-fast tokenize 'shards/train-{0000..0146}.tar' store/ --device cuda --dtype bfloat16
  dove-fast tokenize images.parquet store/ --token-dtype int8 --codes
  dove-fast tokenize shards/ store/ --devices cuda:0,cuda:1,cuda:2,cuda:3
  torchrun --nproc-per-node 8 -m dove_fast.cli tokenize shards/ store/     or srun, on several machines

Run the same command again to go on after an interruption. Inputs that cannot be decoded are
named with their reason in OUTPUT/errors.jsonl."""

# The report stands in the store.
REPORT_NAME = "report.html"
# Options of one process that works alone.
NOT_WITH_SEVERAL = ("rank", "world_size", "dry_run", "metrics", "prometheus", "retry_errors")


def add(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "tokenize", "turn images into a store of variable-length tokens", EXAMPLES)
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="an image, a folder of images or shards, a text file of paths, WebDataset shards (.tar, with ranges "
        "{000..146} or stars, pipe:command, URLs) or Parquet files",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the directory of the token store")
    add_model_options(parser)
    add_length_options(parser, "")
    parser.add_argument(
        "--eos-threshold",
        type=float,
        metavar="P",
        help="the probability above which an image ends (default: the checkpoint's)",
    )
    parser.add_argument(
        "--queries",
        metavar="FILE",
        help='JSON lines {"key": .., "ids": [..]} of token ids, or {"key": .., "text": ".."} for a checkpoint with a '
        "tokenizer.json (Q-DOVE)",
    )
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=1024,
        metavar="N",
        help="inputs a shard, what an interruption can cost (default: %(default)s; WebDataset shards stay as they are)",
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--token-dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="of the tokens in the store; int8 with one scale a token (default: the model's)",
    )
    kept.add_argument(
        "--reduced", action="store_true", help="decode JPEGs only as large as needed: faster, nearly the same pixels"
    )
    kept.add_argument("--codes", action="store_true", help="keep the VQGAN's codes too, uint16")
    kept.add_argument("--prefix-keys", action="store_true", help="put the shard's name before its samples' keys")
    kept.add_argument("--image-column", metavar="NAME", help="of Parquet files (default: found by name and type)")
    kept.add_argument("--key-column", metavar="NAME", help="of Parquet files (default: key, or the file and the row)")
    running = parser.add_argument_group("how it runs")
    running.add_argument("--workers", type=int, metavar="N", help="decoding processes (default: one a core, at most 8)")
    running.add_argument("--max-errors", type=int, metavar="N", help="stop when more inputs are set aside")
    running.add_argument(
        "--retry-errors", action="store_true", help="do the shards again that set inputs aside, once they are mended"
    )
    running.add_argument("--join", action="store_true", help="work beside the jobs that write the same OUTPUT")
    running.add_argument("--rank", type=int, metavar="R", help="do every W-th unit from the R-th on (see --world-size)")
    running.add_argument(
        "--world-size", type=positive, metavar="W", help="of so many jobs; torchrun and srun set both by themselves"
    )
    running.add_argument("--devices", metavar="D,D,..", help="one process a device, such as cuda:0,cuda:1 or cpu,cpu")
    running.add_argument("--engine", choices=("local", "ray"), default="local", help="(default: local)")
    running.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a Ray cluster (default: one that is started here)"
    )
    running.add_argument(
        "--processes", type=positive, metavar="N", help="of Ray's that tokenize (default: as many as fit)"
    )
    running.add_argument("--dry-run", action="store_true", help="count the inputs and estimate time and size")
    seen = parser.add_argument_group("what is seen of it")
    seen.add_argument("--metrics", metavar="FILE", help="append a line of JSON with rates every ten seconds")
    seen.add_argument("--prometheus", type=int, metavar="PORT", help="serve the rates at http://127.0.0.1:PORT/metrics")
    seen.add_argument("--no-report", action="store_true", help=f"do not write OUTPUT/{REPORT_NAME}")
    parser.set_defaults(run=run, resume="whole shards are kept, run the same command again to go on")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dove_fast.jobs import read_queries
    from dove_fast.jobs.loading import own_device
    from dove_fast.jobs.ranks import rank_from

    if arguments.devices is not None:
        return _run_on_devices(arguments)
    if arguments.engine == "ray":
        return _run_with_ray(arguments)
    if arguments.ray_address is not None or arguments.processes is not None:
        raise ValueError("--ray-address and --processes are for --engine ray")
    rank = rank_from(os.environ) if arguments.rank is None and arguments.world_size is None else None
    if rank is not None:
        arguments.device = own_device(arguments.device, rank.local)
    options = _options(arguments, (rank.rank, rank.world_size) if rank is not None else None)
    queries = read_queries(arguments.queries) if arguments.queries is not None else None
    loaded = load(arguments)
    if arguments.dry_run:
        from dove_fast.jobs.estimate import estimate

        print(estimate(arguments.input, arguments.output, loaded, options, queries=queries).text())
        return EXIT_DONE

    from dove_fast.jobs import tokenize
    from dove_fast.jobs.display import progress_bar
    from dove_fast.jobs.report import Curve, Extremes

    extremes, curve = Extremes(), Curve()

    def remember(progress: Progress) -> None:
        curve.add(progress.elapsed, progress.images)

    with progress_bar("tokenize") as show, _watching(arguments, remember, show) as on_progress:
        report = tokenize(
            arguments.input,
            arguments.output,
            loaded,
            options,
            queries=queries,
            on_progress=on_progress,
            on_image=None if arguments.no_report else extremes.add,
        )
    return _conclude(arguments, report, loaded.model.device.type, curve, extremes)


def _options(arguments: argparse.Namespace, rank: tuple[int, int] | None) -> TokenizeOptions:
    from dove_fast.jobs import TokenizeOptions

    if (arguments.rank is None) != (arguments.world_size is None):
        raise ValueError("--rank and --world-size go together")
    if arguments.rank is not None:
        rank = arguments.rank, arguments.world_size
    return TokenizeOptions(
        length=arguments.length,
        max_length=arguments.max_length,
        eos_threshold=arguments.eos_threshold,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        prefix_keys=arguments.prefix_keys,
        image_column=arguments.image_column,
        key_column=arguments.key_column,
        reduced=arguments.reduced,
        token_dtype=arguments.token_dtype,
        codes=arguments.codes,
        workers=arguments.workers,
        max_errors=arguments.max_errors,
        retry_errors=arguments.retry_errors,
        join=arguments.join,
        rank=rank[0] if rank is not None else 0,
        world_size=rank[1] if rank is not None else 1,
    )


@contextlib.contextmanager
def _watching(arguments: argparse.Namespace, remember: OnProgress, show: OnProgress | None) -> Iterator[OnProgress]:
    """Tell everybody who asked how far the job is."""
    from dove_fast.failures import stopping
    from dove_fast.jobs.metrics import MetricsLog, MetricsServer

    with contextlib.ExitStack() as stack:
        watchers = [remember] if show is None else [remember, show]
        log: MetricsLog | None = None
        last: list[Progress] = []
        if arguments.prometheus is not None:
            server = MetricsServer(arguments.prometheus)
            stack.callback(server.close)
            watchers.append(server.update)
            print(f"metrics at http://127.0.0.1:{server.port}/metrics", file=sys.stderr)
        if arguments.metrics is not None:
            log = MetricsLog(arguments.metrics)
            stack.callback(log.close)
            watchers.append(log.update)

        def tell(progress: Progress) -> None:
            last[:] = [progress]
            for watcher in watchers:
                watcher(progress)

        def tell_last() -> None:
            if log is not None and last:
                log.update(last[0], last=True)

        try:
            yield tell
        except BaseException:
            # What stopped the job counts, and not that its last line is missing too.
            with contextlib.suppress(OSError):
                tell_last()
            raise
        with stopping(f"the last line of {arguments.metrics} is missing, the images are done"):
            tell_last()


def _conclude(
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
    return max(code, _write_report(arguments, None if report.already_complete else figures))


def _write_report(arguments: argparse.Namespace, figures: RunFigures | None) -> int:
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
    print(f"{output}: {report.records} images, {report.tokens} tokens{mean}, {report.errors} set aside")
    if report.already_complete:
        print("it was complete already, nothing was computed")
    else:
        print(f"{report.computed} images in {report.seconds:.1f} s, {report.computed / report.seconds:.1f} images/s")
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
        print(f"{report.missing} of {report.units} units are other jobs', or were left by them; run again to finish")
    if report.errors:
        again = "; --retry-errors tries them again once they are mended" if report.already_complete else ""
        print(f"dove-fast: {report.errors} inputs were set aside, see {output}/errors.jsonl{again}", file=sys.stderr)
    return max(warn_of_kept(output, report), EXIT_SET_ASIDE if report.errors else EXIT_DONE)


def _run_with_ray(arguments: argparse.Namespace) -> int:
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
            _options(arguments, None),
            device=device,
            dtype=arguments.dtype,
            queries=queries,
            address=arguments.ray_address,
            processes=arguments.processes,
            gpus_each=0 if device == "cpu" else 1,
            on_progress=tell,
        )
    return _conclude(arguments, report, device, curve, Extremes())


def _refuse(arguments: argparse.Namespace, option: str, others: tuple[str, ...]) -> None:
    """Raise `ValueError` for options that have no meaning beside `option`."""
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) not in (None, False)]
    if given:
        raise ValueError(f"{option} goes without {', '.join(given)}")


def _run_on_devices(arguments: argparse.Namespace) -> int:
    """Start one process a device, and tell when they are done what came of it."""
    from dove_fast.errors import DoveError
    from dove_fast.jobs.display import progress_bar
    from dove_fast.jobs.ranks import StoreWatch, run_on_devices
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
        ended = run_on_devices([*given, "--no-report"], devices, on_poll=watch.poll)
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
            print(f"{arguments.output}: the other units are other jobs', or were left by them; run again to finish")
            return max(codes)
        store = TokenStore(arguments.output)
    except (DoveError, OSError) as error:
        return fail(EXIT_STOPPED, str(error))
    totals = store.manifest["totals"]
    print(f"{arguments.output}: {len(store)} images, {totals['tokens']} tokens, {totals['errors']} set aside")
    figures = RunFigures(watch.images, seconds, ", ".join(devices), throughput=curve.rates())
    code = EXIT_SET_ASIDE if totals["errors"] else EXIT_DONE
    return max(code, _write_report(arguments, figures if watch.images else None))
