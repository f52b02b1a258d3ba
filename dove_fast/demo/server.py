"""The demo's server, on Python's own http.server: the page, and what it asks for as JSON.

A framework would bring dependencies and no fewer lines: there are three files and three calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
from urllib.parse import parse_qs, urlsplit

from dove_fast import __version__
from dove_fast.data import DecodeError
from dove_fast.demo.gallery import Gallery, UnknownPictureError
from dove_fast.errors import DoveError

__all__ = ["MAX_BYTES", "DemoServer"]

# An upload's bytes at most, and the requests that may wait for the model or send at a time.
MAX_BYTES, MAX_REQUESTS = 32 << 20, 16
# Seconds that a client may be silent within its request.
PATIENCE = 10
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


class _RefusedError(Exception):
    """An answer other than 200, with the message for the page."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class DemoServer:
    """Serves the demo's page for one gallery at `url`, until `serve` is left by an exception or `close` is called.

    Port 0 takes one that is free; `port` says which. Nothing that a client sends is written to a file or to a log, no
    path that it names is looked up on the disk, and other sites' pages are refused.
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
        self.port: int = self._server.server_address[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def serve(self) -> None:
        """Answer requests, each in a thread of its own, until `stop` or an exception such as `KeyboardInterrupt`."""
        # Wakes often, so that stopping does not wait.
        self._server.serve_forever(0.1)

    def stop(self) -> None:
        """Make `serve`, in another thread, return."""
        self._server.shutdown()

    def close(self) -> None:
        """Free the port and hang up on all clients; returns when the answer that is being computed is ready."""
        self._gallery.close()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    """Not http.server's, which asks the name server for the host's name.

    Its threads are waited for: one that is inside the model when the interpreter ends would abort the process.
    """

    allow_reuse_address = True
    request_queue_size = 32

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
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server: _Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in self.server.files:
            self._send(HTTPStatus.OK, *self.server.files[path])
        else:
            self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        """Answer a call of the page's with JSON; what went wrong is {"error": message}."""
        if not self.server.places.acquire(blocking=False):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once; try again")
            return
        try:
            status, found = HTTPStatus.OK, self._call()
        except _RefusedError as error:
            status, found = error.status, {"error": str(error)}
        except DecodeError as error:
            status, found = HTTPStatus.UNPROCESSABLE_ENTITY, {"error": f"this picture cannot be read: {error}"}
        except UnknownPictureError as error:
            status, found = HTTPStatus.NOT_FOUND, {"error": str(error)}
        except (ValueError, ImportError) as error:
            status, found = HTTPStatus.BAD_REQUEST, {"error": str(error)}
        except DoveError as error:
            status, found = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
        except OSError:
            # The client is gone.
            raise
        except Exception as error:
            traceback.print_exc()
            status, found = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.server.places.release()
        self._send_json(status, found)

    def _call(self) -> dict[str, Any]:
        # A page of another site may not make this machine compute.
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise self._refused(HTTPStatus.FORBIDDEN, "only the demo's own page may ask")
        address = urlsplit(self.path)
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
        raise self._refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _body(self) -> bytes:
        length = self._content_length()
        if length is None:
            raise self._refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if length > MAX_BYTES:
            raise self._refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the file has {length / 2**20:.1f} MiB, more than the {MAX_BYTES >> 20} that are taken",
            )
        if length == 0:
            raise self._refused(HTTPStatus.BAD_REQUEST, "the file is empty")
        content = self.rfile.read(length)
        if len(content) < length:
            raise ConnectionError("the client went away")
        return content

    def _content_length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None

    def _refused(self, status: HTTPStatus, message: str) -> _RefusedError:
        """Return the refusal, once what the client still sends is read: before that it does not listen."""
        left = min(self._content_length() or 0, MAX_DISCARDED)
        while left > 0:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                break
            left -= len(piece)
        return _RefusedError(status, message)

    def _send_json(self, status: HTTPStatus, found: dict[str, Any]) -> None:
        self._send(status, json.dumps(found, allow_nan=False).encode(), "application/json")

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
        self._send_json(status, {"error": message or status.phrase})

    def version_string(self) -> str:
        """Say no more than needed."""
        return "dove-fast"

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: what people look at is theirs."""


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isascii() and count.isdigit() and len(count) < 10 for count in counts):
        raise ValueError(f"token counts are whole numbers with commas between them, got {text[:40]!r}")
    return [int(count) for count in counts]
