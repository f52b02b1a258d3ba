"""A job's figures: the lines that are written, and what Prometheus gets over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from dove_fast.jobs.metrics import MetricsLog, MetricsServer
from dove_fast.jobs.progress import Progress

PROGRESS = Progress(
    elapsed=20.0,
    done=150,
    total=400,
    images=40,
    tokens=500,
    errors=10,
    stage_seconds={"decode": 12.0, "encode": 5.0},
    workers=2,
    units_done=3,
    units=8,
)
# The same run's begin: earlier runs had done 100.
BEGIN = replace(PROGRESS, elapsed=0.0, done=100, images=0, tokens=0, errors=0, stage_seconds={}, units_done=2)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def server():
    with contextlib.closing(MetricsServer(0)) as server:
        yield server


def get(server: MetricsServer, path: str = "/metrics"):
    return urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10)


def metrics(server: MetricsServer) -> dict[str, float]:
    with get(server) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.split(" ") for line in lines if not line.startswith("#"))}


def test_a_line_holds_every_figure(tmp_path):
    start = time.time()
    log = MetricsLog(tmp_path / "m.jsonl")
    log.update(BEGIN)
    assert lines_of(tmp_path / "m.jsonl") == []
    log.update(PROGRESS)
    # Flushed: the log is still open.
    (line,) = lines_of(tmp_path / "m.jsonl")
    assert start <= line.pop("time") <= time.time()
    assert [line] == [
        {
            "elapsed": 20.0,
            "done": 150,
            "total": 400,
            "units_done": 3,
            "units": 8,
            "images": 40,
            "tokens": 500,
            "errors": 10,
            "images_per_second": 2.0,
            "images_per_second_mean": 2.0,
            "mean_tokens": 12.5,
            "stages": {"decode": 0.3, "encode": 0.25},
            # 50 inputs took 20 seconds, 250 are left.
            "eta_seconds": 100.0,
        }
    ]
    log.close()


def test_lines_come_at_most_so_often_and_at_the_end(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", seconds=5)
    for elapsed in range(13):
        log.update(replace(PROGRESS, elapsed=float(elapsed), images=elapsed * elapsed))
    log.update(replace(PROGRESS, elapsed=12.0, images=200), last=True)
    log.close()
    lines = lines_of(tmp_path / "m.jsonl")
    assert [line["elapsed"] for line in lines] == [5.0, 10.0, 12.0]
    assert [line["images_per_second"] for line in lines] == [5.0, 15.0, 50.0]
    assert [line["images_per_second_mean"] for line in lines] == [5.0, 10.0, pytest.approx(200 / 12)]


def test_what_is_not_known_is_null(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.update(replace(BEGIN, total=None, units=1, units_done=0), last=True)
    log.update(replace(PROGRESS, total=None, units=1, units_done=0), last=True)
    log.update(replace(PROGRESS, done=400), last=True)
    log.close()
    nothing, unknown, done = lines_of(tmp_path / "m.jsonl")
    assert [nothing[name] for name in ("total", "images_per_second", "mean_tokens", "eta_seconds")] == [None] * 4
    assert (unknown["total"], unknown["eta_seconds"], unknown["images_per_second"]) == (None, None, 2.0)
    assert (done["eta_seconds"], done["images_per_second"]) == (0.0, None)


def test_the_time_left_goes_by_units_where_inputs_are_not_counted(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.update(replace(BEGIN, total=None))
    log.update(replace(PROGRESS, total=None))
    log.close()
    # One unit took 20 seconds, 5 are left.
    assert [(line["total"], line["eta_seconds"]) for line in lines_of(tmp_path / "m.jsonl")] == [(None, 100.0)]


def test_a_job_that_goes_on_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    for images in (40, 41):
        log = MetricsLog(path)
        log.update(replace(PROGRESS, images=images), last=True)
        log.close()
    assert [line["images"] for line in lines_of(path)] == [40, 41]
    # Its speeds are its own.
    assert lines_of(path)[1]["images_per_second"] == 41 / 20
    path.write_bytes(path.read_bytes() + b'{"time": 17')
    log = MetricsLog(path)
    log.update(PROGRESS, last=True)
    log.close()
    *_, half, last = path.read_text(encoding="utf-8").splitlines()
    assert half == '{"time": 17' and json.loads(last)["images"] == 40


def test_lines_may_go_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text(encoding="utf-8")), daemon=True)
    reader.start()
    log = MetricsLog(tmp_path / "pipe")
    log.update(PROGRESS, last=True)
    log.close()
    reader.join(10)
    assert [json.loads(line)["done"] for line in read[0].splitlines()] == [150]


def test_a_file_that_cannot_be_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        MetricsLog(tmp_path / "none/m.jsonl")
    with pytest.raises(IsADirectoryError):
        MetricsLog(tmp_path)


def test_prometheus_gets_the_latest_figures(server):
    server.update(BEGIN)
    server.update(PROGRESS)
    assert metrics(server) == {
        "dove_fast_images_total": 40,
        "dove_fast_tokens_total": 500,
        "dove_fast_errors_total": 10,
        "dove_fast_inputs_done": 150,
        "dove_fast_inputs": 400,
        "dove_fast_units_done": 3,
        "dove_fast_units": 8,
        'dove_fast_stage_busy_seconds_total{stage="decode"}': 12.0,
        'dove_fast_stage_busy_seconds_total{stage="wait"}': 0.0,
        'dove_fast_stage_busy_seconds_total{stage="encode"}': 5.0,
        'dove_fast_stage_busy_seconds_total{stage="generate"}': 0.0,
        'dove_fast_stage_busy_seconds_total{stage="write"}': 0.0,
    }
    server.update(replace(PROGRESS, images=41))
    assert metrics(server)["dove_fast_images_total"] == 41


def test_the_text_format(server):
    server.update(PROGRESS)
    with get(server, "/metrics?x=1") as answer:
        body = answer.read()
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert int(answer.headers["Content-Length"]) == len(body)
    assert body.endswith(b"\n")
    lines = body.decode().splitlines()
    kinds = {}
    for index, line in enumerate(lines):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert lines[index - 1].startswith(f"# HELP {name} ")
            assert lines[index + 1].startswith((f"{name} ", f"{name}{{"))
            kinds[name] = kind
    assert set(kinds) == {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    assert {name for name, kind in kinds.items() if kind == "counter"} == {name for name in kinds if "_total" in name}
    assert (kinds["dove_fast_inputs"], kinds["dove_fast_inputs_done"]) == ("gauge", "gauge")


def test_before_anything_is_done_and_without_a_total(server):
    found = metrics(server)
    assert set(found.values()) == {0.0}
    assert "dove_fast_images_total" in found
    assert not {"dove_fast_inputs", "dove_fast_units"} & found.keys()
    server.update(replace(PROGRESS, total=None))
    found = metrics(server)
    assert (found["dove_fast_units_done"], found["dove_fast_units"]) == (3, 8)
    assert "dove_fast_inputs" not in found


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metric", "/stage/metrics"])
def test_other_paths_are_404(server, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(server, path)
    assert metrics(server)


def test_nothing_is_written_to_the_terminal(server, capfd):
    metrics(server)
    with pytest.raises(urllib.error.HTTPError):
        get(server, "/")
    # One that goes away in the middle.
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.send(b"GET /metrics HT")
    metrics(server)
    server.close()
    assert capfd.readouterr() == ("", "")


def test_a_port_in_use_is_refused_and_free_again_afterwards():
    first = MetricsServer(0)
    with pytest.raises(ValueError, match=rf"port {first.port} is in use on 127\.0\.0\.1; give another one, or 0"):
        MetricsServer(first.port)
    metrics(first)
    first.close()
    with pytest.raises(urllib.error.URLError):
        get(first)
    with contextlib.closing(MetricsServer(first.port)) as second:
        assert second.port == first.port
        assert metrics(second)


@pytest.mark.parametrize(
    ("port", "host", "message"),
    [
        (65536, "127.0.0.1", "port must be from 0 to 65535, got 65536"),
        (-1, "127.0.0.1", "port must be from 0 to 65535, got -1"),
        # An address for documents, which no machine has.
        (0, "192.0.2.1", r"cannot serve metrics on 192\.0\.2\.1, port 0: "),
    ],
)
def test_addresses_that_cannot_be(port, host, message):
    with pytest.raises(ValueError, match=message):
        MetricsServer(port, host)
