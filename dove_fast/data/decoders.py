"""Decoding in processes: some of them, and what happens when one dies."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

from dove_fast.data.load import Loaded, Transform
from dove_fast.data.prefetch import prefetch
from dove_fast.data.worker import Answer, DecodeWorker, WorkerDiedError, decode_here

__all__ = ["Decoders"]

Item = TypeVar("Item")

# How often an image may be alone with a process that dies before it is blamed.
TRIES = 2
# The share of its time that decoding has a processor, with the cores to itself, unless it waits for files.
BUSY = 0.5
CRASHED = f"decoding it ended the decoding process {TRIES} times: a crash of the decoder, or too little memory"


class Decoders:
    """Loads images with `transform` in `workers` processes; with 0 where it is called.

    A process that dies is started again, and its images are tried again, each alone; one that was alone with `TRIES`
    dying processes comes back as a reason. `seconds`: the time that was spent on loading so far, all workers together.
    `yielding`: decode while the consumer waits, and not while it works, as long as it is the processor that decoding
    takes and not a slow disk: for a consumer that computes on all cores, whose threads wait for the slowest of them.
    """

    def __init__(self, transform: Transform, workers: int, *, yielding: bool = False) -> None:
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self._transform = transform
        self.workers = workers
        self._lock = threading.Lock()
        self._all: list[DecodeWorker] = []
        self._idle: list[DecodeWorker] = []
        self._yielding = yielding
        self.seconds = self._busy_seconds = 0.0

    def map(
        self, chunks: Iterable[Item], contents: Callable[[Item], Sequence[str | bytes]], *, depth: int
    ) -> Generator[tuple[Item, list[Loaded | str]], None, None]:
        """Yield every chunk with its loaded images, or reasons, in order; at most `depth` chunks ahead.

        Closed before its end, it ends the processes, whatever they decode. Raises `OSError` if a process cannot be
        started or a file's medium fails, and `RuntimeError` for another error that is no image's.
        """

        def load(chunk: Item) -> tuple[Item, list[Loaded | str]]:
            return chunk, self._load(contents(chunk))

        if self.workers == 0:
            for chunk in chunks:
                yield load(chunk)
        else:
            yield from prefetch(
                load, chunks, workers=self.workers, depth=depth, in_bursts=self._in_bursts, abandon=self._abandon
            )

    def _load(self, contents: Sequence[str | bytes]) -> list[Loaded | str]:
        if self.workers == 0 or not contents:
            return self._counted(decode_here(contents, self._transform))
        with self._worker() as worker:
            try:
                return self._counted(worker.decode(contents))
            except WorkerDiedError:
                return [self._alone(worker, content) for content in contents]

    def _alone(self, worker: DecodeWorker, content: str | bytes) -> Loaded | str:
        for _ in range(TRIES):
            try:
                return self._counted(worker.decode([content]))[0]
            except WorkerDiedError:
                continue
        return CRASHED

    def _counted(self, answer: Answer) -> list[Loaded | str]:
        with self._lock:
            self.seconds += answer.seconds
            self._busy_seconds += answer.busy_seconds
        return answer.loaded

    def _in_bursts(self) -> bool:
        with self._lock:
            # Once it is reading that takes the time, it is done beside the consumer's work, for good: from then on the
            # processor is shared, and its share says nothing.
            self._yielding = self._yielding and self._busy_seconds >= BUSY * self.seconds
            return self._yielding

    @contextlib.contextmanager
    def _worker(self) -> Iterator[DecodeWorker]:
        # One a thread that loads at the moment, so as many as there are threads at most.
        with self._lock:
            if not self._idle:
                self._idle.append(DecodeWorker(self._transform))
                self._all += self._idle
            worker = self._idle.pop()
        try:
            yield worker
        finally:
            with self._lock:
                kept = worker in self._all
                if kept:
                    self._idle.append(worker)
            if not kept:
                # Abandoned in between, and this thread's alone.
                worker.close()

    def _abandon(self) -> None:
        with self._lock:
            abandoned, self._all = self._all, []
            idle, self._idle = self._idle, []
        for worker in abandoned:
            worker.kill()
        # The threads that use the others close them.
        for worker in idle:
            worker.close()

    def close(self) -> None:
        """End the processes."""
        # All of them first, so that they end at the same time.
        for worker in self._all:
            worker.hang_up()
        for worker in self._all:
            worker.close()
