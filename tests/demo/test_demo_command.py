"""dove-fast demo: it prints its address, serves the shipped model, and ends at Ctrl-C."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_models import micro_model

from dove_fast.cli import main
from dove_fast.demo.server import PATIENCE

PHOTO = (Path(__file__).parents[2] / "examples" / "photos" / "chelsea.jpg").read_bytes()
# Seconds in which it must be gone.
QUICK = 15


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Run the command; yields the process, its port, and the line it printed."""
    command = [sys.executable, "-m", "dove_fast.cli", "demo", "--port", "0", "--device", "cpu", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+) ", line)
        assert found, line + process.communicate()[1]
        yield process, int(found[1]), line
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    out, err = process.communicate(timeout=QUICK)
    assert process.returncode == 130
    assert (out, err) == ("", "dove-fast: interrupted; the page is no longer served\n")


def tokenize(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/api/tokenize", PHOTO)
    return connection.getresponse().status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_the_shipped_model_until_it_is_interrupted(number, tmp_path, monkeypatch):
    """It writes nothing anywhere where it could."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running() as (process, port, line):
        assert "shows tiny on cpu; Ctrl-C ends it" in line
        assert tokenize(port) == 200
        # A client that is in the middle of its request does not hold it up.
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /api/tokenize HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc")
            start = time.monotonic()
            end(process, number)
            assert time.monotonic() - start < PATIENCE
    assert list(tmp_path.iterdir()) == []


def test_it_ends_while_it_computes():
    with running() as (process, port, _):
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                try:
                    tokenize(port)
                except (OSError, http.client.HTTPException):
                    return

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        assert tokenize(port) == 200
        end(process, signal.SIGINT)
        stop.set()
        for thread in clients:
            thread.join()


def test_what_is_refused(tmp_path, capsys):
    checkpoint = tmp_path / "m"
    micro_model().save_pretrained(checkpoint)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, text in (
            (["--port", str(port)], f"port {port} is in use on 127.0.0.1; give another one, or --port 0 for any"),
            (["--port", "70000"], "port must be from 0 to 65535, got 70000"),
            (["--host", "192.0.2.1"], "cannot serve on 192.0.2.1, port 7860: "),
            (["--device", "abacus"], "device must be cpu, cuda or cuda:N, got 'abacus'"),
            (["--checkpoint", str(tmp_path / "none")], str(tmp_path / "none")),
        ):
            assert main(["demo", "--device", "cpu", "--checkpoint", str(checkpoint), *arguments]) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("dove-fast: ") and text in err and err.count("\n") == 1
