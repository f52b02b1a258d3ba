"""Decoding in processes: the results of this process, whatever dies; and nobody left behind."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from killing_transform import (
    KILLS,
    KILLS_ONCE,
    RAISES,
    WAITS,
    EndsWhereItArrives,
    KillingTransform,
    UnsendableTransform,
)
from made_pictures import add_bad, make_pictures
from PIL import Image, ImageFile
from waiting_transform import WaitingTransform

from dove_fast.data import Decoders, Loaded, ShortSideCenterCrop, load_image, worker
from dove_fast.data.decoders import CRASHED
from dove_fast.data.worker import DecodeWorker, WorkerDiedError, decode_here
from dove_fast.failures import JobError, stopping

CROP = ShortSideCenterCrop(16)


def picture(width: int, colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 10), (colour, 10, 200)).save(file, "PNG")
    return file.getvalue()


def mapped(decoders: Decoders, chunks, depth: int = 4) -> list[list[Loaded | str]]:
    chunks = list(chunks)
    found = list(decoders.map(chunks, lambda chunk: chunk, depth=depth))
    assert [chunk for chunk, _ in found] == chunks
    return [loaded for _, loaded in found]


def same(one: Loaded | str, other: Loaded | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return np.array_equal(one.pixels, other.pixels) and (one.width, one.height) == (other.width, other.height)


def all_same(found, transform, chunks) -> bool:
    expected = [[load_image(content, transform) for content in chunk] for chunk in chunks]
    return list(map(len, found)) == list(map(len, expected)) and all(
        same(one, other) for a, b in zip(found, expected, strict=True) for one, other in zip(a, b, strict=True)
    )


def state(process: int) -> str:
    """Return the state of a process as the system has it, "" for none; Z is one that has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def gone(*processes: int) -> bool:
    return wait_for(lambda: all(state(process) in ("", "Z") for process in processes))


@pytest.fixture(scope="module")
def chunks(tmp_path_factory) -> list[list[str | bytes]]:
    """Paths and bytes, whole and damaged, in chunks of many sizes."""
    folder = make_pictures(tmp_path_factory.mktemp("photos") / "p", 10)
    add_bad(folder)
    paths = sorted(str(path) for path in folder.rglob("*.*"))
    contents = [*paths, *(Path(path).read_bytes() for path in paths), b"", str(folder), f"{folder}/none.png"]
    return [contents[:5], [], contents[5:6], contents[6:20], [contents[20]], contents[21:]]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes for the tests that only need some, and the transform's folder."""
    folder = tmp_path_factory.mktemp("two")
    decoders = Decoders(KillingTransform(str(folder)), 2)
    yield decoders, folder
    decoders.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_those_of_this_process_in_order(chunks, workers):
    decoders = Decoders(CROP, workers)
    # More rounds than one, by the same processes.
    for _ in range(3):
        with warnings.catch_warnings():
            # An array that cannot be written to, for one.
            warnings.simplefilter("error")
            found = mapped(decoders, chunks)
        assert all_same(found, CROP, chunks)
        assert sum(isinstance(item, str) for items in found for item in items) == 7
    assert decoders.seconds > 0
    assert len(decoders._all) <= workers
    decoders.close()
    decoders.close()


@pytest.mark.parametrize("busy", [False, True])
def test_decoding_yields_unless_it_waits_itself(busy):
    with contextlib.closing(Decoders(WaitingTransform(busy=busy), 1, yielding=True)) as decoders:
        assert mapped(decoders, [[picture(20)]] * 6, depth=2)
        assert decoders._in_bursts() == busy
    with contextlib.closing(Decoders(WaitingTransform(busy=True), 1)) as decoders:
        mapped(decoders, [[picture(20)]] * 2)
        assert not decoders._in_bursts()


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        Decoders(CROP, -1)


def test_a_process_that_is_killed_changes_nothing(two):
    decoders, _ = two
    transform = decoders._transform
    chunks = [[picture(20, colour), picture(30, colour)] for colour in range(40)]
    mapped(decoders, chunks[:4])
    seen = []
    killed = 0
    for number, (chunk, loaded) in enumerate(decoders.map(chunks, lambda chunk: chunk, depth=3)):
        seen.append(loaded)
        assert chunk is chunks[number]
        if number in (5, 20):
            worker = decoders._all[number % len(decoders._all)]
            if worker._process is not None:
                os.kill(worker._process.pid, signal.SIGKILL)
                killed += 1
    assert killed
    assert all_same(seen, transform, chunks)


def test_a_process_that_is_killed_while_it_decodes(two):
    decoders, folder = two
    chunks = [[picture(20), picture(WAITS), picture(21)]]
    found = []
    thread = threading.Thread(target=lambda: found.extend(mapped(decoders, chunks)))
    thread.start()
    assert wait_for(lambda: list(folder.glob("waits-*")))
    (process,) = (int(path.name.removeprefix("waits-")) for path in folder.glob("waits-*"))
    assert process in [worker._process.pid for worker in decoders._all if worker._process is not None]
    os.kill(process, signal.SIGKILL)
    (folder / "go").touch()
    thread.join(60)
    assert all_same(found, decoders._transform, chunks)
    assert len({path.name for path in folder.glob("waits-*")} - {f"waits-{os.getpid()}"}) == 2


def test_a_process_that_is_killed_while_it_starts(tmp_path):
    transform = KillingTransform(str(tmp_path))
    worker = DecodeWorker(transform)
    found = []
    thread = threading.Thread(target=lambda: found.append(worker.decode([picture(20)])[0]))
    thread.start()
    for _ in range(2):
        assert wait_for(lambda: worker._process is not None)
        os.kill(worker._process.pid, signal.SIGKILL)
        assert wait_for(lambda before=worker._process: worker._process is not before)
    thread.join(60)
    assert all_same(found, transform, [[picture(20)]])
    worker.close()


def test_a_picture_that_ends_the_process_is_blamed_and_no_other(two):
    decoders, folder = two
    good = [picture(width) for width in range(20, 36)]
    chunks = [[*good[:3], picture(KILLS), *good[3:6]], good[6:], [picture(KILLS_ONCE)] * 2]
    (folder / "killed").unlink(missing_ok=True)
    found = mapped(decoders, chunks)
    assert found[0][3] == CRASHED
    assert all_same([[*found[0][:3], *found[0][4:]], found[1]], decoders._transform, [good[:6], good[6:]])
    # That one ended a process at most once.
    assert all(isinstance(item, Loaded) for item in found[2])
    assert CRASHED.startswith("decoding it ended the decoding process 2 times")


def test_an_error_that_is_no_pictures_stops_with_and_without_workers(two):
    decoders, folder = two
    with pytest.raises(ValueError, match="does not like it"):
        mapped(Decoders(KillingTransform(str(folder)), 0), [[picture(RAISES)]])
    with pytest.raises(RuntimeError, match=r"(?s)no image's: Traceback.*ValueError: this transform does not like it"):
        mapped(decoders, [[picture(20)], [picture(RAISES)], [picture(21)]])
    # Nobody died of it.
    assert all_same(mapped(decoders, [[picture(20)]]), decoders._transform, [[picture(20)]])


# Reading its first bytes fails, as on a medium that is damaged.
FAILING = "/proc/self/mem"


@pytest.mark.skipif(not os.path.isfile(FAILING), reason="needs a file of Linux that cannot be read")
def test_a_medium_that_fails_stops_with_and_without_workers(two):
    decoders, folder = two
    transform = decoders._transform
    for some in (decoders, Decoders(transform, 0)):
        found = some.map([[picture(20)], [picture(21), FAILING]], lambda chunk: chunk, depth=2)
        next(found)
        with pytest.raises(OSError, match="Input/output error") as raised:
            next(found)
        error = raised.value
        assert (error.errno, error.strerror, error.filename) == (errno.EIO, os.strerror(errno.EIO), FAILING)
        with pytest.raises(JobError, match=f"^Input/output error: {FAILING}; try again$"), stopping("try again"):
            mapped(some, [[FAILING]])
        with pytest.raises(FileNotFoundError) as raised:
            mapped(some, [[f"{folder}/gone/x.png"]])
        assert raised.value.filename == f"{folder}/gone"


@pytest.mark.skipif(not os.path.isfile(FAILING), reason="needs a file of Linux that cannot be read")
def test_a_medium_that_fails_does_not_end_the_worker(tmp_path):
    worker = DecodeWorker(CROP)
    worker.decode([picture(20)])
    process = worker._process.pid
    with pytest.raises(OSError, match="Input/output error"):
        worker.decode([FAILING])
    assert isinstance(worker.decode([picture(20)])[0][0], Loaded) and worker._process.pid == process
    worker.close()


def test_a_dead_worker_says_so_and_the_next_request_starts_another(tmp_path, capfd):
    worker = DecodeWorker(KillingTransform(str(tmp_path)))
    assert worker.close() is None
    loaded, seconds, busy = worker.decode([picture(20)])
    assert isinstance(loaded[0], Loaded) and seconds > 0 and busy > 0
    # Killed while nobody asks anything of it.
    os.kill(worker._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker._process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerDiedError, match="ended with exit code -9"):
        worker.decode([picture(20)])
    assert worker.close() is None
    with pytest.raises(WorkerDiedError, match="ended with exit code 9"):
        worker.decode([picture(KILLS)])
    worker.decode([picture(20)])
    process = worker._process.pid
    assert worker.close() == 0 and worker.close() is None
    assert state(process) == ""
    assert capfd.readouterr() == ("", "")


def test_processes_that_do_not_start_are_no_pictures_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "STARTS", 1)
    decoders = Decoders(EndsWhereItArrives(str(tmp_path)), 1)
    with pytest.raises(OSError, match=r"ended 1 times while it started, the last time with exit code 7"):
        mapped(decoders, [[picture(20)]])
    decoders.close()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(FileNotFoundError, match="no-python"):
        mapped(Decoders(CROP, 1), [[picture(20)]])


def test_a_transform_that_cannot_be_sent(tmp_path):
    worker = DecodeWorker(UnsendableTransform(str(tmp_path)))
    for _ in range(2):
        with pytest.raises(TypeError, match="cannot be sent"):
            worker.decode([picture(20)])
    assert worker._process is None


def test_the_limits_of_pillow_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    contents = [picture(20), picture(101), picture(40)[:-30]]
    assert isinstance(decode_here(contents, CROP)[0][2], str)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    plain, large, cut = decode_here(contents, CROP)[0]
    assert isinstance(plain, Loaded) and large.startswith("too many pixels") and isinstance(cut, Loaded)
    decoders = Decoders(CROP, 1)
    assert all_same(mapped(decoders, [contents]), CROP, [contents])
    decoders.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_chunks_are_taken_ahead(two, depth):
    decoders, _ = two
    taken = 0

    def items():
        nonlocal taken
        for number in range(20):
            taken += 1
            yield [picture(20 + number)]

    for consumed, _ in enumerate(decoders.map(items(), lambda chunk: chunk, depth=depth)):
        time.sleep(0.005)
        assert taken - consumed <= depth


def test_large_pictures_come_back_whole(two):
    decoders, _ = two
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    chunks = [[file.getvalue()] * 3] * 2
    assert all_same(mapped(decoders, chunks), decoders._transform, chunks)


PARENT = """
import sys, pathlib
sys.path[:0] = {path!r}
from killing_transform import KillingTransform
from dove_fast.data import Decoders
picture = pathlib.Path({folder!r}, "wait.png").read_bytes()
decoders = Decoders(KillingTransform({folder!r}), 2)
try:
    for _ in decoders.map([[picture]] * 8, lambda chunk: chunk, depth=4):
        pass
except KeyboardInterrupt:
    decoders.close()
    print("interrupted")
"""


def parent(folder: Path, **options) -> subprocess.Popen:
    """Start a process with two workers that wait at their pictures."""
    (folder / "wait.png").write_bytes(picture(WAITS))
    script = PARENT.format(path=[str(Path(__file__).parents[1])], folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def workers_of(folder: Path) -> list[int]:
    assert wait_for(lambda: len(list(folder.glob("waits-*"))) == 2)
    return [int(path.name.removeprefix("waits-")) for path in folder.glob("waits-*")]


def children(process: int) -> list[int]:
    """Return the processes that any thread of a process has started."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = parent(tmp_path)
    workers = workers_of(tmp_path)
    assert all(state(worker) in "SR" for worker in workers)
    process.kill()
    process.wait()
    # They end once they are done with what they are at.
    (tmp_path / "go").touch()
    assert gone(*workers)
    assert process.communicate() == (b"", b"")


@pytest.mark.parametrize("started", [True, False])
def test_ctrl_c_prints_nothing_from_the_workers(tmp_path, started):
    process = parent(tmp_path, start_new_session=True)
    if started:
        workers = workers_of(tmp_path)
        # Also where it comes to them.
        for worker in workers:
            os.kill(worker, signal.SIGINT)
    else:
        assert wait_for(lambda: len(children(process.pid)) == 2)
        workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    # Nothing lets the pictures go on: what is being decoded is abandoned.
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"interrupted\n", b"")
    assert gone(*workers)


def test_closed_early_it_ends_what_is_being_decoded_and_may_begin_again(tmp_path):
    chunks = [[picture(20)], [picture(WAITS)], [picture(WAITS)], [picture(21)]]
    with contextlib.closing(Decoders(KillingTransform(str(tmp_path)), 2)) as decoders:
        found = decoders.map(chunks, lambda chunk: chunk, depth=4)
        next(found)
        workers = workers_of(tmp_path)
        found.close()
        assert gone(*workers)
        again = chunks[::3]
        assert all_same(mapped(decoders, again), decoders._transform, again)


def test_closed_early_it_leaves_no_process_that_nobody_waits_for(tmp_path):
    decoders = Decoders(KillingTransform(str(tmp_path)), 2)
    with decoders._worker() as one, decoders._worker() as other:
        for worker in (one, other):
            worker.decode([picture(20)])
    workers = [one, other]
    processes = [worker._process.pid for worker in workers]
    found = decoders.map([[picture(20)], [picture(WAITS)]], lambda chunk: chunk, depth=2)
    next(found)
    assert wait_for(lambda: list(tmp_path.glob("waits-*")) and len(decoders._idle) == 1)
    found.close()
    # The idle one and the busy one, though both objects are still there.
    assert [state(process) for process in processes] == ["", ""]
    assert all(worker._pipe is None and worker._process is None for worker in workers)


def test_a_worker_that_is_abandoned_after_its_answer_is_closed_by_its_thread(tmp_path):
    decoders = Decoders(CROP, 1)
    with decoders._worker() as worker:
        worker.decode([picture(20)])
        process = worker._process.pid
        decoders._abandon()
        # It is this thread's, which may be reading from it.
        assert worker._pipe is not None
    assert state(process) == "" and worker._pipe is None and decoders._idle == []
