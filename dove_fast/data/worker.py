"""A process that decodes images for another one, and ends with it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING

import numpy as np
import torch

from dove_fast.data.load import Loaded, Transform, load_image

if TYPE_CHECKING:
    pass

__all__ = ["DecodeWorker", "WorkerDiedError", "decode_here"]

# Seconds for a worker to end by itself once its pipe is closed.
PATIENCE = 5.0


class WorkerDiedError(Exception):
    """A worker ended while it decoded: a crash of a decoder, too little memory, or a kill."""


def decode_here(contents: Sequence[str | bytes], transform: Transform) -> tuple[list[Loaded | str], float]:
    """Load images in this process; returns them, or why not, and the seconds it took."""
    start = time.perf_counter()
    loaded = [load_image(content, transform) for content in contents]
    return loaded, time.perf_counter() - start


class DecodeWorker:
    """A process of its own that loads images with `transform`, one request after the other.

    It is a fresh interpreter, started at the first request, so neither threads nor a GPU's state are forked and the
    caller's main module is not imported. It holds no more than one request's images, ignores Ctrl-C, which is the
    caller's to handle, and ends when the caller does, however that happens.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def decode(self, contents: Sequence[str | bytes]) -> tuple[list[Loaded | str], float]:
        """Return what `decode_here` would. Raises `WorkerDiedError`; the next request starts a new process."""
        try:
            pipe = self._pipe or self._start()
            pipe.send(list(contents))
            answers, seconds = pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self.close()
            raise WorkerDiedError(f"the decoding process ended with exit code {code}") from error
        return [answer if isinstance(answer, str) else _loaded(*answer) for answer in answers], seconds

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        # The same modules as here, wherever this process has them from.
        command = (
            f"import sys; sys.path[:] = {sys.path!r}; from dove_fast.data.worker import serve; serve({theirs.fileno()})"
        )
        self._process = subprocess.Popen([sys.executable, "-c", command], pass_fds=[theirs.fileno()])
        theirs.close()
        self._pipe = ours
        ours.send(self._transform)
        return ours

    def close(self) -> int | None:
        """End the process; returns its exit code, None where there was none."""
        pipe, process = self._pipe, self._process
        self._pipe = self._process = None
        if pipe is not None:
            pipe.close()
        if process is None:
            return None
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _loaded(pixels: np.ndarray, width: int, height: int) -> Loaded:
    return Loaded(torch.from_numpy(pixels), width, height)


def _plain(loaded: Loaded | str) -> tuple[np.ndarray, int, int] | str:
    # As numpy's, because torch would send a tensor through shared memory.
    return loaded if isinstance(loaded, str) else (loaded.pixels.numpy(), loaded.width, loaded.height)


def serve(handle: int) -> None:
    """Answer the requests that come over the pipe with this handle, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # What cannot be used is set aside with its reason, so that Pillow need not say it too.
    warnings.simplefilter("ignore")
    pipe = Connection(handle)
    try:
        transform = pipe.recv()
        while True:
            answers, seconds = decode_here(pipe.recv(), transform)
            pipe.send(([_plain(answer) for answer in answers], seconds))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The caller is gone, or done; nothing of this process is worth an orderly end.
        os._exit(0)
