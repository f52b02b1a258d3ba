"""A running job in figures: lines of JSON in a file, and an endpoint for Prometheus."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from dove_fast.jobs.progress import Progress, TimeLeft
from dove_fast.jobs.stages import STAGES

__all__ = ["MetricsLog", "MetricsServer"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds that a client may take over its request.
PATIENCE = 10


class MetricsLog:
    """Appends lines of JSON to the file at `path`, at most one every `seconds`, each flushed.

    A line tells `images_per_second` since the line before, the other speeds are means: `eta_seconds` goes by the inputs
    that were done since the first update, by other jobs too, or by the units where inputs are not counted. What is not
    known is null.
    Opening it raises `OSError`, and so does writing. A line that a killed run left half stays, on a line of its own.
    """

    def __init__(self, path: str | os.PathLike[str], seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._last_elapsed, self._last_images = 0.0, 0
        self._left = TimeLeft()
        half = _ends_in_half_a_line(path)
        self._file = open(path, "ab")  # noqa: SIM115 - open as long as the job
        if half:
            self._file.write(b"\n")

    def update(self, progress: Progress, *, last: bool = False) -> None:
        """Write a line if it is time for one; `last`, the end of the run, in any case."""
        left = self._left.after(progress, progress.elapsed)
        if not last and progress.elapsed - self._last_elapsed < self._seconds:
            return
        line = json.dumps(self._line(progress, left), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._last_elapsed, self._last_images = progress.elapsed, progress.images

    def _line(self, progress: Progress, left: float | None) -> dict[str, Any]:
        since_last = progress.elapsed - self._last_elapsed
        return {
            "time": time.time(),
            "elapsed": progress.elapsed,
            "done": progress.done,
            "total": progress.total,
            "units_done": progress.units_done,
            "units": progress.units,
            "images": progress.images,
            "tokens": progress.tokens,
            "errors": progress.errors,
            "images_per_second": _ratio(progress.images - self._last_images, since_last),
            "images_per_second_mean": _ratio(progress.images, progress.elapsed),
            "mean_tokens": _ratio(progress.tokens, progress.images),
            "stages": progress.stages,
            "eta_seconds": left,
        }

    def close(self) -> None:
        """Close the file; what a full disk refuses was refused before."""
        with contextlib.suppress(OSError):
            self._file.close()


def _ends_in_half_a_line(path: str | os.PathLike[str]) -> bool:
    # Nothing is read of a pipe.
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _ratio(amount: float, over: float) -> float | None:
    return amount / over if over > 0 else None


class MetricsServer:
    """Serves the latest figures at http://host:port/metrics for Prometheus, from a thread, until it is closed.

    Port 0 takes one that is free; `port` says which. Raises `ValueError` for a port that is in use, or an address that
    cannot be served.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, got {port}")
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} is in use on {host}; give another one, or 0 for any") from error
            raise ValueError(f"cannot serve metrics on {host}, port {port}: {error.strerror or error}") from error
        self.port: int = self._server.server_address[1]
        # Wakes often, so that closing does not wait.
        serve, name = self._server.serve_forever, "dove-fast-metrics"
        self._thread = threading.Thread(target=serve, args=(0.1,), name=name, daemon=True)
        self._thread.start()

    def update(self, progress: Progress) -> None:
        """Serve these figures from now on."""
        self._server.progress = progress

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    """Not http.server's, which asks the name server for the host's name."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.progress = Progress(0, None, 0, 0)
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET /metrics."""

    timeout = PATIENCE
    server: _Server

    def do_GET(self) -> None:
        """Answer with the latest figures."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, explain="the metrics are at /metrics")
            return
        body = "".join(f"{line}\n" for line in _exposition(self.server.progress)).encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the terminal is the progress bar's."""


def _exposition(progress: Progress) -> Iterator[str]:
    """Yield the lines of Prometheus's text format 0.0.4."""
    yield from _metric("images_total", "counter", "Images that were tokenized by this run.", progress.images)
    yield from _metric("tokens_total", "counter", "Tokens of these images.", progress.tokens)
    yield from _metric("errors_total", "counter", "Inputs that were set aside by this run.", progress.errors)
    yield from _metric("inputs_done", "gauge", "Inputs that are done, by earlier runs too.", progress.done)
    if progress.total is not None:
        yield from _metric("inputs", "gauge", "Inputs of the job.", progress.total)
    if progress.units:
        yield from _metric("units_done", "gauge", "Units that are done, by earlier runs too.", progress.units_done)
        yield from _metric("units", "gauge", "Units of the job.", progress.units)
    name = "stage_busy_seconds_total"
    yield from _head(name, "counter", "Seconds that a stage was busy, decode of all workers together.")
    for stage, seconds in {**dict.fromkeys(STAGES, 0.0), **progress.stage_seconds}.items():
        yield f'dove_fast_{name}{{stage="{stage}"}} {seconds:.6f}'


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP dove_fast_{name} {text}"
    yield f"# TYPE dove_fast_{name} {kind}"


def _metric(name: str, kind: str, text: str, value: int) -> Iterator[str]:
    yield from _head(name, kind, text)
    yield f"dove_fast_{name} {value}"
