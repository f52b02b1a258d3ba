"""The demo's server, on Python's own http.server: the page, and what it asks for as JSON.

A framework would bring dependencies and no fewer lines: there are three files and three calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import socket
import socketserver
import sys
import threading
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib import resources
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from dove_fast import __version__
from dove_fast.data import DecodeError
from dove_fast.demo.connection import ClientGoneError, Incoming, Outgoing
from dove_fast.demo.gallery import Gallery, UnknownPictureError
from dove_fast.demo.guard import Guard, RefusedError, is_loopback
from dove_fast.errors import DoveError

__all__ = ["MAX_BYTES", "DemoServer"]

# An upload's bytes at most, the calls that may send or wait for the model at a time, and the clients, each a thread.
MAX_BYTES, MAX_REQUESTS, MAX_CONNECTIONS = 32 << 20, 16, 64
# Pieces in which an upload that is refused is read to its end, and how much of it.
PIECE, MAX_DISCARDED = 1 << 16, 8 * MAX_BYTES

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/script.js": ("script.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    # Pictures come as data URLs.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class DemoServer:
    """Serves the demo's page for one gallery at `url`, while `serve` runs, until `close` is called.

    name: what the page calls the model. Port 0 takes one that is free; `port` says which. `is_local` tells whether this
    machine alone reaches it. Nothing that a client sends is written to a file or to a log, no path that it names is
    looked up on the disk, and what other sites' pages ask is refused, see `Guard`.
    Raises `ValueError` for a port that is in use, or an address that cannot be served.
    """

    def __init__(self, gallery: Gallery, *, name: str = "", host: str = "127.0.0.1", port: int = 0) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, got {port}")
        self._gallery = gallery
        try:
            self._server = _Server((host, port), gallery, name)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} is in use on {host}; give another one, or --port 0 for any") from error
            raise ValueError(f"cannot serve on {host}, port {port}: {error.strerror or error}") from error
        address = str(self._server.server_address[0])
        self.port: int = self._server.server_address[1]
        self.is_local = is_loopback(address)
        # All of the machine's addresses are none that a browser could open.
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, host)
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"
        self._serving = threading.Lock()
        self._closed = False

    def serve(self) -> None:
        """Answer requests, each in a thread of its own, until `close` or an exception such as `KeyboardInterrupt`."""
        with self._serving:
            while not self._closed:
                self._server.handle_request()

    def close(self) -> None:
        """Make `serve` return, free the port, and hang up on all clients.

        From any thread but one that is inside `serve`; before `serve`, after it, or twice. Returns when the answer that
        is being computed is ready.
        """
        self._closed = True
        self._gallery.close()
        with self._serving:
            self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    """Not http.server's, which asks the name server for the host's name.

    Its threads are waited for: one that is inside the model when the interpreter ends would abort the process.
    """

    allow_reuse_address = True
    request_queue_size = 32
    # Seconds in which `handle_request` returns, so that closing does not wait.
    timeout = 0.1

    def __init__(self, address: tuple[str, int], gallery: Gallery, name: str) -> None:
        self.gallery = gallery
        folder = resources.files(__package__) / "page"
        self.files = {path: ((folder / file).read_bytes(), kind) for path, (file, kind) in FILES.items()}
        config, model = gallery.model.config, gallery.model
        self.about = {
            "name": name,
            "version": __version__,
            "image_size": config.image_size,
            "num_tokens": config.num_tokens,
            "num_features": config.num_features,
            "reads_queries": model.tokenizer is not None,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_bytes": MAX_BYTES,
            "batch_size": gallery.batch_size,
        }
        self.connections: set[socket.socket] = set()
        self.places = threading.BoundedSemaphore(MAX_REQUESTS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)
        self.guard = Guard(address[0], str(self.server_address[0]))

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Hang up on more clients than there may be; the silent ones among them go soon."""
        return len(self.connections) < MAX_CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection while its thread runs."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Hang up, so that no thread waits for its client, and wait for the threads."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""
        if not isinstance(sys.exc_info()[1], ClientGoneError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def setup(self) -> None:
        """Read and write by the files that know a client's failures from the server's."""
        self.connection = self.request
        self.rfile, self.wfile = io.BufferedReader(Incoming(self.request)), Outgoing(self.request)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        """Answer with one of the page's files, or its call with JSON; what went wrong is {"error": message}."""
        self._unread = self._content_length() or 0
        try:
            self.server.guard.check(self.headers)
            address = urlsplit(self.path)
            if self.command == "GET" and address.path in self.server.files:
                content, kind = self.server.files[address.path]
            else:
                content, kind = _encoded(self._call(address)), "application/json"
        except ClientGoneError:
            raise
        except RefusedError as error:
            self._send_error(error.status, str(error))
        except DecodeError as error:
            self._send_error(HTTPStatus.UNPROCESSABLE_ENTITY, f"this picture cannot be read: {error}")
        except UnknownPictureError as error:
            self._send_error(HTTPStatus.NOT_FOUND, str(error))
        except (ValueError, ImportError) as error:
            self._send_error(HTTPStatus.BAD_REQUEST, str(error))
        except DoveError as error:
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except Exception as error:
            traceback.print_exc()
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        else:
            self._send(HTTPStatus.OK, content, kind)

    def _call(self, address: SplitResult) -> dict[str, Any]:
        self.server.guard.check_call(self.command, self.headers)
        if not self.server.places.acquire(blocking=False):
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once; try again")
        try:
            match self.command, address.path.strip("/").split("/"):
                case "GET", ["api", "model"]:
                    return self.server.about
                case "GET", ["api", "reconstructions", name, lengths]:
                    found = self.server.gallery.reconstruct(name, _counts(lengths))
                    return {"reconstructions": [dataclasses.asdict(one) for one in found]}
                case "POST", ["api", "tokenize"]:
                    content = self._body()
                    query = parse_qs(address.query, errors="strict").get("query", [""])[0].strip()
                    return dataclasses.asdict(self.server.gallery.read(content, query))
        finally:
            self.server.places.release()
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _body(self) -> bytes:
        length = self._content_length()
        if length is None:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if length > MAX_BYTES:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the file has {length / 2**20:.1f} MiB, more than the {MAX_BYTES >> 20} that are taken",
            )
        if length == 0:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the file is empty")
        content = self.rfile.read(length)
        if len(content) < length:
            raise ClientGoneError("the client went away")
        self._unread = 0
        return content

    def _content_length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        """Send the reason, once what the client still sends is read: before that it does not listen."""
        left = min(self._unread, MAX_DISCARDED)
        while left > 0:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                break
            left -= len(piece)
        self._send(status, _encoded({"error": message}), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer as the rest does where http.server itself refuses a request: an unknown method, a broken line."""
        status = HTTPStatus(code)
        self._send(status, _encoded({"error": message or status.phrase}), "application/json")

    def version_string(self) -> str:
        """Say no more than needed."""
        return "dove-fast"

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: what people look at is theirs."""


def _encoded(found: dict[str, Any]) -> bytes:
    try:
        return json.dumps(found, allow_nan=False).encode()
    except ValueError as error:
        raise DoveError(f"the answer cannot be sent: {error}") from error


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isascii() and count.isdigit() and len(count) < 10 for count in counts):
        raise ValueError(f"token counts are whole numbers with commas between them, got {text[:40]!r}")
    return [int(count) for count in counts]
