"""The command line: arguments in, exit codes out; the work is in `jobs` and `training`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dove_fast.errors import DoveError

if TYPE_CHECKING:
    from dove_fast.jobs import LoadedModel

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["main"]

EXIT_DONE, EXIT_SET_ASIDE, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

TOKENIZE_EXAMPLES = """examples:
  dove-fast tokenize photos/ store/                     every image below a folder
  dove-fast tokenize paths.txt store/ --max-length 32   a text file of paths, at most 32 tokens an image
  dove-fast tokenize photos/ store/ --checkpoint model/ --dtype bfloat16 --device cuda

Run the same command again to go on after an interruption. Inputs that cannot be decoded are
named with their reason in OUTPUT/errors.jsonl."""

RECONSTRUCT_EXAMPLES = """examples:
  dove-fast reconstruct store/ pictures/
  dove-fast reconstruct store/ pictures/ --max-length 8   from the first 8 tokens of each image
  dove-fast reconstruct store/ pictures/ --checkpoint model/   the checkpoint that made the store"""

TRAIN_EXAMPLES = """examples:
  dove-fast train run.toml
  torchrun --nproc-per-node 2 -m dove_fast.cli train run.toml   two processes, one GPU each

Run the same command again to go on after an interruption. docs/TRAINING.md describes the file."""

INFO_EXAMPLES = """examples:
  dove-fast info store/
  dove-fast info model/
  dove-fast info tiny                                   the model that comes with the package
  dove-fast info                                        what was built, and which backends work"""

EXIT_CODES = """exit codes: 0 done; 1 finished, but some inputs were set aside; 2 wrong use, a refused output, or
nothing to do; 3 stopped by a failure, resumable; 130 interrupted, resumable"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (None: the process's arguments) and return the exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    try:
        with _terminating_as_interrupt():
            return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return _fail(EXIT_INTERRUPTED, f"interrupted; {arguments.resume}")
    except BrokenPipeError:
        # The reader of our output is gone; nothing may be written there, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_STOPPED
    except (DoveError, ValueError, TypeError, OSError, ImportError) as error:
        from dove_fast.failures import JobError

        return _fail(EXIT_STOPPED if isinstance(error, JobError) else EXIT_REFUSED, str(error))
    except Exception:
        # A bug, or a failing device: the trace is what a report of it needs. Python's own code, 1, means set aside.
        traceback.print_exc()
        return _fail(EXIT_STOPPED, f"stopped by an unexpected error; {arguments.resume}")


def _fail(code: int, message: str) -> int:
    print(f"dove-fast: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _terminating_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM and SIGINT; a signal that is ignored (nohup, a background job) stays so."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dove-fast",
        description="Images to variable-length tokens, and back.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tokenize(commands)
    _add_reconstruct(commands)
    _add_train(commands)
    _add_info(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version; an action of its own, so that building the parser does not import the package's parts."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from dove_fast import __version__

        print(f"dove-fast {__version__}")
        parser.exit()


def _command(commands: Commands, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"{examples}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_tokenize(commands: Commands) -> None:
    parser = _command(commands, "tokenize", "turn images into a store of variable-length tokens", TOKENIZE_EXAMPLES)
    parser.add_argument(
        "input", metavar="INPUT", help="an image, a folder of images, or a text file of paths, relative to its folder"
    )
    parser.add_argument("output", metavar="OUTPUT", help="the directory of the token store")
    _add_model_options(parser)
    _add_length_options(parser, "")
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
        type=_positive,
        default=1024,
        metavar="N",
        help="inputs a shard, what an interruption can cost (default: %(default)s)",
    )
    parser.set_defaults(run=_tokenize, resume="whole shards are kept, run the same command again to go on")


def _add_reconstruct(commands: Commands) -> None:
    parser = _command(commands, "reconstruct", "decode a token store to PNG files", RECONSTRUCT_EXAMPLES)
    parser.add_argument("store", metavar="STORE", help="the directory of a token store")
    parser.add_argument("output", metavar="OUT", help="the directory of the pictures")
    _add_model_options(parser)
    _add_length_options(parser, "decode ")
    parser.set_defaults(
        run=_reconstruct, resume="the pictures that were written are kept, run the same command again to go on"
    )


def _add_train(commands: Commands) -> None:
    parser = _command(commands, "train", "train a model as a TOML file says, or go on with it", TRAIN_EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="the run's TOML file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    parser.add_argument(
        "--allow-download", action="store_true", help="let LPIPS download its backbone's weights (default: never)"
    )
    parser.set_defaults(run=_train, resume="run the same command again to go on from the last checkpoint")


def _add_info(commands: Commands) -> None:
    parser = _command(commands, "info", "describe a token store, a checkpoint, or this installation", INFO_EXAMPLES)
    parser.add_argument(
        "path",
        metavar="STORE|CHECKPOINT",
        nargs="?",
        help="the directory of a token store or of a checkpoint, or tiny (default: describe this installation)",
    )
    parser.set_defaults(run=_info, resume="nothing was changed")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="the model's directory (default: tiny, the model of 64x64 pixels that comes with the package)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: the checkpoint's; tiny's is float32)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=32,
        metavar="N",
        help="images given to the model at a time (default: %(default)s)",
    )


def _add_length_options(parser: argparse.ArgumentParser, verb: str) -> None:
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--length", type=int, metavar="N", help=f"{verb}exactly N tokens an image")
    lengths.add_argument("--max-length", type=int, metavar="N", help=f"{verb}at most N tokens an image")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _tokenize(arguments: argparse.Namespace) -> int:
    from dove_fast.jobs import TokenizeOptions, read_queries, tokenize
    from dove_fast.jobs.display import progress_bar

    options = TokenizeOptions(
        length=arguments.length,
        max_length=arguments.max_length,
        eos_threshold=arguments.eos_threshold,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
    )
    queries = read_queries(arguments.queries) if arguments.queries is not None else None
    loaded = _load(arguments)
    with progress_bar("tokenize") as on_progress:
        report = tokenize(arguments.input, arguments.output, loaded, options, queries=queries, on_progress=on_progress)
    mean = f", mean {report.tokens / report.records:.2f}" if report.records else ""
    print(f"{arguments.output}: {report.records} images, {report.tokens} tokens{mean}, {report.errors} set aside")
    if report.already_complete:
        print("it was complete already, nothing was computed")
    else:
        print(f"{report.computed} images in {report.seconds:.1f} s, {report.computed / report.seconds:.1f} images/s")
    if report.errors:
        print(f"dove-fast: {report.errors} inputs were set aside, see {arguments.output}/errors.jsonl", file=sys.stderr)
    return EXIT_SET_ASIDE if report.errors else EXIT_DONE


def _reconstruct(arguments: argparse.Namespace) -> int:
    from dove_fast.jobs import reconstruct
    from dove_fast.jobs.display import progress_bar
    from dove_fast.store import TokenStore

    store = TokenStore(arguments.store)
    loaded = _load(arguments)
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
        print(f"{arguments.output}: all {len(store)} pictures were there already, nothing was computed")
        return EXIT_DONE
    print(
        f"{arguments.output}: {report.images} pictures from {report.tokens} tokens in {report.seconds:.1f} s, "
        f"{report.images / report.seconds:.1f} images/s"
    )
    return EXIT_DONE


def _train(arguments: argparse.Namespace) -> int:
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
        print(f"{config.run.output}: {report.step} of {report.steps} steps, {report.computed} now{rate}")
    if report.interrupted:
        return _fail(EXIT_INTERRUPTED, f"interrupted; {arguments.resume}")
    if ranks.is_first:
        print(f"the model is in {report.model}")
    return EXIT_DONE


def _load(arguments: argparse.Namespace) -> LoadedModel:
    from dove_fast import keep_freed_memory, native
    from dove_fast.jobs import load_model

    loaded = load_model(arguments.checkpoint, device=arguments.device, dtype=arguments.dtype)
    if loaded.model.device.type == "cpu" and native.why_no_native() is None:
        # The process is this job's alone, and goes through the same sizes batch after batch.
        keep_freed_memory()
    return loaded


def _info(arguments: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
