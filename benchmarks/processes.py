"""Functions that run in processes of their own, where settings hold for the whole process, such as malloc's."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch


class Remote:
    """A function that a process of its own builds and runs.

    `build(*arguments)`, of a module that can be imported by its bare name, returns two functions: one without arguments
    to be timed, and one that returns what the benchmark compares and records. It is called in the new process, with as
    many threads of torch as here.
    """

    def __init__(self, build: Callable[..., tuple[Callable[[], Any], Callable[[], Any]]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads(), build, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self) -> None:
        """Run the function once."""
        self._ask("run")

    def report(self) -> Any:
        """Return what the second function returns."""
        return self._ask("report")

    def _ask(self, what: str) -> Any:
        self._connection.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process ended with exit code {self._process.exitcode}") from None
        if not done:
            raise RuntimeError(f"in the process:\n{answer}")
        return answer

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(connection: Connection, threads: int, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            run, report = build(*arguments)
            connection.send((True, None))
            while True:
                question = connection.recv()
                if question == "run":
                    run()
                    if torch.cuda.is_initialized():
                        torch.cuda.synchronize()
                    connection.send((True, None))
                else:
                    connection.send((True, report()))
    except EOFError:
        return
    except BaseException:
        connection.send((False, traceback.format_exc()))
