"""A process that decodes images for another one, and ends with it."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

from dove_fast import native
from dove_fast.data.load import Loaded, Transform, load_image

__all__ = ["Answer", "DecodeWorker", "WorkerDiedError", "decode_here"]

# Seconds for a worker to end by itself once its pipe is closed.
PATIENCE = 5.0
# How often a process may die before it can do anything, which is no image's fault.
STARTS = 3
KILLED = "the decoding process was killed"


class WorkerDiedError(Exception):
    """A worker ended while it decoded: a crash of a decoder, too little memory, or a kill."""


class Answer(NamedTuple):
    """Images, or why not, the seconds that loading them took, and those in which the process had a processor for it."""

    loaded: list[Loaded | str]
    seconds: float
    busy_seconds: float


def decode_here(contents: Sequence[str | bytes], transform: Transform) -> Answer:
    """Load images in this process."""
    start, busy = time.perf_counter(), time.process_time()
    loaded = [load_image(content, transform) for content in contents]
    return Answer(loaded, time.perf_counter() - start, time.process_time() - busy)


class DecodeWorker:
    """A process of its own that loads images with `transform`, one request after the other.

    It is a fresh interpreter, started at the first request, so neither threads nor a GPU's state are forked and the
    caller's main module is not imported; Pillow's limits are those that hold here then. It holds no more than one
    request's images, ignores Ctrl-C, which is the caller's to handle, and ends when the caller does, however that
    happens.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._killed = False

    def decode(self, contents: Sequence[str | bytes]) -> Answer:
        """Return what `decode_here` would.

        Raises `WorkerDiedError`, after which the next request starts a new process, unless `kill` ended it; `OSError`
        if none starts, or where a file's medium fails; `RuntimeError`, with the trace, for what else `decode_here`
        raised there.
        """
        if self._killed:
            raise WorkerDiedError(KILLED)
        pipe = self._pipe or self._start()
        try:
            pipe.send(list(contents))
            answer = pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self.close()
            raise WorkerDiedError(f"the decoding process ended with exit code {code}") from error
        if isinstance(answer, OSError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"an error in the decoding process that is no image's: {answer}")
        return Answer(*answer)

    def _start(self) -> Connection:
        settings = pickle.dumps((self._transform, _pillow_limits()))
        code: int | None = None
        for _ in range(STARTS):
            pipe = self._started()
            try:
                pipe.send_bytes(settings)
                pipe.recv()
            except (EOFError, OSError):
                code = self.close()
            else:
                # A kill from here on finds the process; one that came before may not have.
                if not self._killed:
                    return pipe
            if self._killed:
                self.close()
                raise WorkerDiedError(KILLED)
        reason = f"the decoding process ended {STARTS} times while it started, the last time with exit code {code}"
        raise OSError(errno.ECHILD, reason)

    def _started(self) -> Connection:
        ours, theirs = Pipe()
        # The same modules as here, wherever this process has them from.
        command = (
            f"import sys; sys.path[:] = {[*map(str, sys.path)]!r}; "
            f"from dove_fast.data.worker import serve; serve({theirs.fileno()})"
        )
        with theirs:
            # Out of the terminal's reach: Ctrl-C would come to it before it can ignore it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._pipe = ours
        return ours

    def kill(self) -> None:
        """End the process for good, in the middle of a request of another thread perhaps, which raises then."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def hang_up(self) -> None:
        """Let the process end, without waiting for it."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def close(self) -> int | None:
        """End the process; returns its exit code, None where there was none."""
        self.hang_up()
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _pillow_limits() -> tuple[int | None, bool]:
    from PIL import Image, ImageFile

    return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES


def _answered(contents: Sequence[str | bytes], transform: Transform) -> Answer | OSError | str:
    try:
        return decode_here(contents, transform)
    except MemoryError:
        # As if the system had ended this process: alone, an image may have enough.
        raise
    except Exception as error:
        # Sent and not raised: the pipe is whole.
        if isinstance(error, OSError) and error.errno is not None:
            return OSError(error.errno, error.strerror, error.filename)
        return traceback.format_exc()


def serve(handle: int) -> None:
    """Answer the requests that come over the pipe with this handle, until it is closed."""
    from PIL import Image, ImageFile

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What cannot be used is set aside with its reason, so that Pillow need not say it too.
    warnings.simplefilter("ignore")
    module = native.without_torch()
    if module is not None:
        # Images are large blocks, which would be faulted in anew one after the other.
        module.keep_freed_memory()
    pipe = Connection(handle)
    try:
        transform, (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) = pipe.recv()
        # Ready: what ends this process from here on may be an image.
        pipe.send(None)
        while True:
            pipe.send(_answered(pipe.recv(), transform))
    except (EOFError, OSError):
        # The caller is gone, in the middle of a request perhaps, or done; nothing here is worth an orderly end.
        os._exit(0)
