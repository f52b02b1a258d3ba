"""A client's connection as two files, which end a request that takes too long and tell its failures from others."""

from __future__ import annotations

import io
import socket
import time
from typing import Any

__all__ = ["DEADLINE", "PATIENCE", "ClientGoneError", "Incoming", "Outgoing"]

# Seconds that a client may be silent within its request, and that all of a request may take, or an answer.
PATIENCE, DEADLINE = 10.0, 60.0


class ClientGoneError(Exception):
    """The client hung up, or takes too long: there is nobody to answer."""


class Incoming(io.RawIOBase):
    """What the client sends, for one request: `DEADLINE` begins here. Raises `ClientGoneError`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._end = time.monotonic() + DEADLINE

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for the next bytes; 0 is the end."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise ClientGoneError("the request takes too long")
        try:
            self._connection.settimeout(min(PATIENCE, left))
            return self._connection.recv_into(buffer)
        except OSError as error:
            raise ClientGoneError(str(error)) from error


class Outgoing(io.BufferedIOBase):
    """What is sent to the client, without a buffer. Raises `ClientGoneError`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def write(self, data: Any) -> int:
        """Send all of it."""
        try:
            # For all of it, not for each piece.
            self._connection.settimeout(DEADLINE)
            self._connection.sendall(data)
        except OSError as error:
            raise ClientGoneError(str(error)) from error
        return memoryview(data).nbytes
