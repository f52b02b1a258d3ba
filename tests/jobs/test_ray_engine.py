"""Tokenization by Ray actors: the bytes of a plain job, also when one is killed or the job is stopped."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from kill_switch import contents
from made_pictures import add_bad, make_pictures
from made_shards import write_shards
from small_models import micro_model

from dove_fast import StoreError
from dove_fast.failures import JobError
from dove_fast.jobs import TokenizeOptions, load_model, ray_cluster, ray_engine, tokenize
from dove_fast.jobs.ray_engine import tokenize_with_ray
from dove_fast.store.claims import FIRST_UNIT

# Units that take long enough to kill an actor in the middle of one, and enough of them that there always is one.
OPTIONS = TokenizeOptions(batch_size=3, shard_size=15, workers=0)
PICTURES, UNITS = 120, 9


@pytest.fixture(scope="module")
def ray():
    """A Ray of two workers, as the engine starts one."""
    module = pytest.importorskip("ray")
    with ray_cluster.connected(ray_cluster.import_ray(), None, 2):
        yield module


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    micro_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint):
    """A folder with pictures in `photos`, and what a plain job that was started there made of them in `store`."""
    folder = tmp_path_factory.mktemp("whole")
    photos = make_pictures(folder / "photos", 10)
    for copy in range(PICTURES // 10 - 1):
        make_pictures(photos / f"more-{copy}", 10)
    add_bad(photos)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenize("photos", "store", load_model(checkpoint, device="cpu"), OPTIONS)
    return folder


def check_same(store: Path, expected: Path) -> None:
    found, wanted = contents(store), contents(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name], name


def holders(store: Path) -> dict[int, int]:
    """Return the processes that have a unit in hand, by its number. Asked in this way, no lock is given back."""
    inode = os.stat(store / ".lock").st_ino
    found = {}
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "POSIX" and fields[3] == "WRITE" and int(fields[5].split(":")[2]) == inode:
            found[int(fields[6]) - FIRST_UNIT] = int(fields[4])
    return found


class Killer:
    """Kills a process in the middle of its unit, once, when the run has done another one."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.unit: int | None = None

    def __call__(self, progress) -> None:
        if self.unit is not None or not progress.images:
            return
        deadline = time.monotonic() + 60
        while not (found := holders(self.store)):
            assert time.monotonic() < deadline, "no process has a unit in hand"
            time.sleep(0.005)
        self.unit, process = next(iter(found.items()))
        os.kill(process, signal.SIGKILL)
        while process in holders(self.store).values():
            time.sleep(0.01)
        assert not (self.store / f"records/{self.unit:05d}.parquet").exists()


@pytest.mark.slow
def test_a_job_that_is_stopped_and_then_loses_a_process_gives_the_same_bytes(
    tmp_path, ray, checkpoint, whole, monkeypatch
):
    # Records name their files as they were given, from here.
    monkeypatch.chdir(whole)
    store = os.path.relpath(tmp_path / "s")
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.units_done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_with_ray("photos", store, checkpoint, OPTIONS, processes=2, on_progress=stop)
    assert [progress.units_done for progress in seen[-2:]] == [0, 1]
    assert (seen[-1].total, seen[-1].units) == (PICTURES + 2, UNITS)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "s/records").glob("*.parquet")}
    assert 1 <= len(kept) < UNITS - 3

    killer = Killer(tmp_path / "s")

    def watch(progress):
        seen.append(progress)
        killer(progress)

    report = tokenize_with_ray("photos", store, checkpoint, OPTIONS, processes=2, on_progress=watch)
    assert killer.unit is not None
    check_same(tmp_path / "s", whole / "store")
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert (report.records, report.errors, report.missing, report.complete) == (PICTURES, 2, 0, True)
    assert report.computed == PICTURES - sum(pyarrow.parquet.read_metadata(path).num_rows for path in kept)
    assert (seen[-1].done, seen[-1].images, seen[-1].units_done) == (PICTURES + 2, report.computed, UNITS)

    again = tokenize_with_ray("photos", store, checkpoint, OPTIONS)
    assert (again.already_complete, again.computed, again.records) == (True, 0, PICTURES)


def test_the_bytes_of_shards_are_those_of_a_plain_job(tmp_path, ray, checkpoint, whole):
    shards = tmp_path / "shards"
    write_shards(shards, whole / "photos/more-0")
    tokenize(shards, tmp_path / "plain", load_model(checkpoint, device="cpu"), OPTIONS)
    tokenize_with_ray(shards, tmp_path / "s", checkpoint, OPTIONS)
    check_same(tmp_path / "s", tmp_path / "plain")


def test_a_unit_that_ends_every_process_stops_the_job(tmp_path, ray, checkpoint, whole, monkeypatch):
    monkeypatch.chdir(whole)
    monkeypatch.setattr(ray_engine, "RETRIES", 0)
    killer = Killer(tmp_path / "s")
    with pytest.raises(JobError, match=r"died 1 times, .*; run the same command again to go on") as caught:
        tokenize_with_ray("photos", tmp_path / "s", checkpoint, OPTIONS, processes=1, on_progress=killer)
    assert f"unit {killer.unit} died" in str(caught.value)


def test_what_an_actor_cannot_do_is_said_in_one_sentence(tmp_path, ray, checkpoint, whole, monkeypatch):
    monkeypatch.chdir(whole)
    options = dataclasses.replace(OPTIONS, max_errors=0)
    with pytest.raises(JobError, match=r"^more than 0 inputs set aside \(--max-errors\), the last one '05-cut.jpg'"):
        tokenize_with_ray("photos", tmp_path / "s", checkpoint, options, processes=1)
    assert "05-cut.jpg" in (tmp_path / "s/errors.jsonl").read_text()


def test_how_the_failure_of_an_actor_is_raised(tmp_path, checkpoint, whole, monkeypatch):
    monkeypatch.chdir(whole)
    # It is for a process of its own.
    monkeypatch.setattr(ray_engine, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(ray_engine._Units, "_check_attempts", lambda *_: None)
    shutil.copytree("store", tmp_path / "s")
    task = ray_engine._Task(
        *("photos", str(tmp_path / "s"), str(checkpoint), OPTIONS, "cpu", None, None, str(whole)),
        *(1, None, 0),
    )

    def add(**changes):
        fields = ray_engine._Units(dataclasses.replace(task, **changes), None)({"item": np.array([0])})
        row = ray_engine._Row(**{name: value for name, (value,) in fields.items()})
        ray_engine._Tally(None).add(row)
        return row

    assert add() == ray_engine._Row(0, done=True, images=0, tokens=0, errors=0)
    with pytest.raises(StoreError, match="made with other settings"):
        add(options=TokenizeOptions(shard_size=15, length=3))
    with pytest.raises(JobError, match=r"^FileNotFoundError: no such input: /nowhere; run the same command .* go on$"):
        add(source="/nowhere")
    with pytest.raises(RuntimeError, match=r"(?s)^a Ray actor failed: Traceback .*AttributeError: "):
        add(options=None)


def test_options_that_do_not_go_together(tmp_path, ray, checkpoint, whole):
    for options, message in (
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"gpus_each": -1}, "gpus_each must be at least 0, got -1"),
        ({"device": "cuda"}, "device must be 'cpu' or None with gpus_each=0, got 'cuda'"),
        ({"device": "cuda:1", "gpus_each": 1}, "device must be 'cuda' or None with gpus_each=1, got 'cuda:1'"),
        ({"options": TokenizeOptions(world_size=2)}, "rank and world_size are for jobs that share units by number"),
        ({"address": "auto"}, "this process is connected to Ray already; leave the address out"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_with_ray(whole / "photos", tmp_path / "s", checkpoint, **{"options": OPTIONS, **options})
    assert not (tmp_path / "s").exists()


def test_a_cluster_that_does_not_answer(tmp_path, ray, checkpoint, whole, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:
        # Bound, and not listening.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}: Connection refused"):
            tokenize_with_ray(whole / "photos", tmp_path / "s", checkpoint, OPTIONS, address=address)
    with pytest.raises(ValueError, match="Ray Data does not run through Ray Client, got ray://head:10001"):
        tokenize_with_ray(whole / "photos", tmp_path / "s", checkpoint, OPTIONS, address="ray://head:10001")
    assert not (tmp_path / "s").exists()


def test_without_ray_it_says_what_to_install(tmp_path, checkpoint, whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"Ray is not installed; install it with: pip install 'dove-fast\[ray\]'"):
        tokenize_with_ray(whole / "photos", tmp_path / "s", checkpoint, OPTIONS)


@pytest.mark.parametrize(
    ("nodes", "processes", "threads", "gpus_each", "expected"),
    [
        ([{"CPU": 2.0}], None, 1, 0, (2, 1, 0)),
        ([{"CPU": 2.0}], None, 2, 0, (1, 2, 0)),
        # More than asked for together have room for, as many CPUs each as fit.
        ([{"CPU": 8.0}, {"CPU": 5.0}], 3, 4, 0, (3, 4, 0)),
        ([{"CPU": 8.0}, {"CPU": 5.0}], 5, 4, 0, (5, 2, 0)),
        ([{"CPU": 2.0}], 9, 4, 0, (9, 1, 0)),
        # The driver has more cores than any node.
        ([{"CPU": 4.0}, {"CPU": 4.0}, {}], None, 16, 0, (2, 4, 0)),
        ([{}], None, 4, 0, (1, 1, 0)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}], None, 8, 1, (3, 1, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}], None, 8, 0.5, (4, 1, 0.5)),
    ],
)
def test_actors_are_fitted_to_the_nodes(nodes, processes, threads, gpus_each, expected):
    alive = [{"Alive": True, "Resources": resources} for resources in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    cluster = SimpleNamespace(nodes=lambda: [*alive, dead])
    pool = ray_engine._Pool.on(cluster, processes, threads, gpus_each)
    assert (pool.size, pool.cpus_each, pool.gpus_each) == expected


INTERRUPTED = """
import os, signal, sys
import torch
from dove_fast.cli import _terminating_as_interrupt
from dove_fast.jobs import TokenizeOptions
from dove_fast.jobs.ray_engine import tokenize_with_ray

torch.set_num_threads(1)
options = TokenizeOptions(batch_size=3, shard_size=15, workers=0)
with _terminating_as_interrupt():
    handler = signal.getsignal(signal.SIGTERM)
    print("begun", flush=True)
    try:
        tokenize_with_ray(
            "photos",
            sys.argv[1],
            sys.argv[2],
            options,
            processes=2,
            on_progress=lambda progress: print(progress.units_done, flush=True),
        )
    except KeyboardInterrupt:
        import ray

        assert not ray.is_initialized()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert "RAY_USAGE_STATS_ENABLED" not in os.environ
        sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "units"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_an_interrupt_ends_a_ray_of_its_own_within_seconds(tmp_path, checkpoint, whole, number, units):
    pytest.importorskip("ray")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, tmp_path / "s", checkpoint],
        cwd=whole,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != (str(units) if units else "begun"):
        assert process.poll() is None
    if not units:
        # While Ray starts.
        time.sleep(3)
    start = time.monotonic()
    # As a terminal does it, and as a scheduler.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 20
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(whole)
        tokenize("photos", tmp_path / "s", load_model(checkpoint, device="cpu"), OPTIONS)
    check_same(tmp_path / "s", whole / "store")
