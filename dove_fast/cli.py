"""The command line: arguments in, exit codes out; the commands are in `commands`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from dove_fast.commands import demo, evaluate, export, info, reconstruct, report, tokenize, train, verify
from dove_fast.commands.options import EXIT_CODES, EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED, fail
from dove_fast.errors import DoveError

__all__ = ["main"]

# In the order in which the help lists them.
COMMANDS = (tokenize, verify, reconstruct, export, train, evaluate, report, demo, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (None: the process's arguments) and return the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        # For a command that starts itself again.
        arguments.argv = list(sys.argv[1:] if argv is None else argv)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    try:
        with _terminating_as_interrupt():
            return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return fail(EXIT_INTERRUPTED, f"interrupted; {arguments.resume}")
    except BrokenPipeError:
        # The reader of our output is gone; nothing may be written there, at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_STOPPED
    except (DoveError, ValueError, TypeError, OSError, ImportError) as error:
        from dove_fast.failures import JobError

        return fail(EXIT_STOPPED if isinstance(error, JobError) else EXIT_REFUSED, str(error))
    except Exception:
        # A bug, or a failing device: the trace is what a report of it needs. Python's own code, 1, means set aside.
        traceback.print_exc()
        return fail(EXIT_STOPPED, f"stopped by an unexpected error; {arguments.resume}")


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
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version; an action of its own, so that building the parser does not import the package's parts."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from dove_fast import __version__

        print(f"dove-fast {__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
