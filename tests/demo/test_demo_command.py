"""dove-fast demo: it prints its address, serves the shipped model, and ends at Ctrl-C."""

from __future__ import annotations

import http.client
import io
import json
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
from PIL import Image
from small_models import micro_model

from dove_fast.cli import main
from dove_fast.demo.connection import PATIENCE
from dove_fast.demo.guard import PAGE_HEADER

PHOTO = (Path(__file__).parents[2] / "examples" / "photos" / "chelsea.jpg").read_bytes()
# Seconds in which it must be gone.
QUICK = 15


@contextmanager
def running(*arguments: str, host: str = "127.0.0.1") -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Run the command; yields the process, its port, and the line it printed."""
    command = [sys.executable, "-m", "dove_fast.cli", "demo", "--host", host, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {PAGE_HEADER: "test"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def tokenize(port: int) -> int:
    return ask(port, "POST", "/api/tokenize", PHOTO)[0]


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
            slow.sendall(
                f"POST /api/tokenize HTTP/1.1\r\nHost: localhost\r\n{PAGE_HEADER}: test\r\n"
                "Content-Length: 1000\r\n\r\nabc".encode()
            )
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


def test_a_checkpoint_and_a_threshold(tmp_path):
    """The page learns the model's name, not where it lies; a large picture leaves no line on stderr."""
    micro_model().save_pretrained(tmp_path / "m")
    picture = io.BytesIO()
    Image.new("1", (10000, 10000)).save(picture, "PNG")
    with running("--checkpoint", f"{tmp_path}/m/", "--eos-threshold", "0.123") as (process, port, line):
        assert f"shows {tmp_path}/m/ on cpu" in line
        assert ask(port, "GET", "/api/model")[1]["name"] == "m"
        assert ask(port, "POST", "/api/tokenize", PHOTO)[1]["threshold"] == 0.123
        status, found = ask(port, "POST", "/api/tokenize", picture.getvalue())
        assert status == 422 and "too many pixels: 10000 x 10000 are 100 million" in found["error"]
        end(process, signal.SIGINT)


def test_other_machines_are_warned_of(tmp_path):
    micro_model().save_pretrained(tmp_path / "m")
    with running("--checkpoint", str(tmp_path / "m"), host="0.0.0.0") as (process, port, line):
        # An address that a browser can open.
        assert line.startswith(f"http://127.0.0.1:{port} ")
        assert ask(port, "GET", "/api/model")[0] == 200
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=QUICK)[1]
        assert err.startswith(f"dove-fast: other machines that reach 0.0.0.0, port {port}, can use this page; there is")


def test_what_is_refused(tmp_path, capsys):
    checkpoint = tmp_path / "m"
    micro_model().save_pretrained(checkpoint)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, text in (
            (["--port", str(port)], f"port {port} is in use on 127.0.0.1; give another one, or --port 0 for any"),
            (["--port", "70000"], "port must be from 0 to 65535, got 70000"),
            (["--host", "192.0.2.1"], "cannot serve on 192.0.2.1, port 7860: "),
            (["--eos-threshold", "1"], "eos_threshold must lie between 0 and 1, both excluded, got 1.0"),
            (["--device", "abacus"], "device must be cpu, cuda or cuda:N, got 'abacus'"),
            (["--checkpoint", str(tmp_path / "none")], str(tmp_path / "none")),
        ):
            assert main(["demo", "--device", "cpu", "--checkpoint", str(checkpoint), *arguments]) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("dove-fast: ") and text in err and err.count("\n") == 1
