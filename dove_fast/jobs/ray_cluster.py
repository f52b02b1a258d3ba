"""Ray as this process sees it: connected to or started here, kept silent, and ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["connected", "import_ray", "overridden", "quiet"]

# Seconds for a cluster to answer.
PATIENCE = 10.0
# Ray's loggers, which would write between the lines of a progress bar.
LOGGERS = ("ray", "ray.data")
# For a Ray that is started here: no report to its makers, and of what its core would print only what ends a process.
ENVIRONMENT_OF_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def import_ray() -> Any:
    """Return Ray, with its data module. Raises `ImportError` that names the extra to install."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("Ray is not installed; install it with: pip install 'dove-fast[ray]'") from error
    return ray


@contextlib.contextmanager
def connected(ray: Any, address: str | None, processes: int | None) -> Iterator[None]:
    """Connect to Ray, or start it here, unless this process is connected; what was begun here ends with the block."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError("this process is connected to Ray already; leave the address out, or call ray.shutdown()")
        yield
        return
    if address is not None:
        _check_address(address)
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        cores = os.cpu_count() or 1
        settings.update(address="local", num_cpus=max(cores, processes or 1), include_dashboard=False)
    with quiet():
        try:
            with _environment(ENVIRONMENT_OF_RAY), _signals_held():
                ray.init(**settings)
            yield
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raise `ValueError` for Ray Client, and `ConnectionError` where nothing answers: Ray itself tries for minutes."""
    if address.startswith("ray://"):
        raise ValueError(f"Ray Data does not run through Ray Client, got {address}; run this on a node, as host:port")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def overridden(context: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes for the length of the block."""
    before = {name: getattr(context, name) for name in settings if hasattr(context, name)}
    try:
        for name in before:
            setattr(context, name, settings[name])
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM for the length of the block: a Ray stopped while it starts leaves processes behind.

    It also takes SIGTERM for itself, to exit on the spot; this process's own handlers are put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    except SystemExit:
        came.append(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Ray's loggers: what it has to say comes as an exception."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
