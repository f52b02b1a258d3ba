"""dove-fast tokenize: images in, a token store out."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dove_fast.commands.options import (
    EXIT_DONE,
    add_command,
    add_eos_option,
    add_length_options,
    add_model_options,
    load,
    positive,
)
from dove_fast.commands.outcome import REPORT_NAME, conclude
from dove_fast.commands.several import run_on_devices, run_with_ray

if TYPE_CHECKING:
    from dove_fast.commands.options import Commands
    from dove_fast.jobs import TokenizeOptions
    from dove_fast.jobs.progress import OnProgress, Progress

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
    add_eos_option(parser)
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
        return run_on_devices(arguments)
    if arguments.engine == "ray":
        return run_with_ray(arguments, _options(arguments, None))
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
    return conclude(arguments, report, loaded.model.device.type, curve, extremes)


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
