"""The command line: exit codes, one clear line on stderr, and the whole way from photographs to pictures."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_jobs import children, is_alive
from kill_switch import contents
from made_pictures import add_bad, make_pictures
from PIL import Image
from small_models import micro_model

from dove_fast import BackendError, TokenStore, __version__, build_info
from dove_fast.atomic import is_temporary
from dove_fast.cli import main

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "m"
    micro_model().save_pretrained(directory)
    return directory


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_pictures(tmp_path / "photos")


@pytest.fixture
def dove_fast(capsys, checkpoint):
    """Run the command line in this process with the small checkpoint; returns (exit code, stdout, stderr)."""

    def run(command, *arguments):
        if command in ("tokenize", "reconstruct"):
            arguments = ("--checkpoint", checkpoint, "--device", "cpu", *arguments)
        code = main([command, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def refused(result, text):
    code, _, err = result
    assert code == 2
    assert text in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("dove-fast: ")


def test_photographs_to_pictures_with_the_shipped_model(tmp_path, capsys):
    """What the README shows first: the sample photographs, no checkpoint."""
    store, pictures = str(tmp_path / "store"), tmp_path / "pictures"
    assert main(["tokenize", str(PHOTOS), store, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "7 images" in out
    assert "0 set aside" in out
    assert err == ""
    opened = TokenStore(store)
    assert (opened[0].key, opened[0].width, opened[0].height) == ("astronaut.jpg", 512, 512)
    assert opened.config.image_size == 64

    assert main(["info", store]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "short-side-bicubic-center-crop/1, 64 pixels" in out

    assert main(["reconstruct", store, str(pictures), "--device", "cpu"]) == 0
    names = sorted(path.name for path in pictures.glob("*.png"))
    assert names == sorted(f"{Path(key).stem}.png" for key in opened.keys)
    errors, variances = [], []
    for name in names:
        picture = np.asarray(Image.open(pictures / name))
        assert picture.shape == (64, 64, 3)
        with Image.open(PHOTOS / f"{Path(name).stem}.jpg") as photo:
            left, top = ((side - min(photo.size)) // 2 for side in photo.size)
            square = photo.crop((left, top, left + min(photo.size), top + min(photo.size))).resize((64, 64))
        expected = np.asarray(square, dtype=np.float64)
        errors.append(np.square(picture - expected).mean())
        variances.append(expected.var(axis=(0, 1)).mean())
    # Not of each: of the stars there is little to see at 64 pixels.
    assert sum(errors) < 0.4 * sum(variances), (errors, variances)


def test_exit_0_1_and_again(tmp_path, photos, dove_fast):
    code, out, err = dove_fast("tokenize", photos, tmp_path / "s")
    assert (code, err) == (0, "")
    assert "10 images" in out
    assert "images/s" in out
    code, out, _ = dove_fast("tokenize", photos, tmp_path / "s")
    assert code == 0
    assert "it was complete already, nothing was computed" in out

    bad = add_bad(photos)
    for _ in range(2):
        code, out, err = dove_fast("tokenize", photos, tmp_path / "with-bad")
        assert code == 1
        assert "10 images" in out
        assert "2 set aside" in out
        assert err.startswith(f"dove-fast: 2 inputs set aside, see {tmp_path}/with-bad/errors.jsonl")
    lines = (tmp_path / "with-bad/errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == bad


def test_options_reach_the_job(tmp_path, photos, dove_fast):
    key = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))[2]
    (tmp_path / "q.jsonl").write_text(json.dumps({"key": key, "ids": [1, 2]}))
    arguments = ("--max-length", 2, "--eos-threshold", 0.999, "--dtype", "bfloat16", "--shard-size", 4)
    code, _, _ = dove_fast(
        "tokenize", photos, tmp_path / "s", *arguments, "--batch-size", 3, "--queries", tmp_path / "q.jsonl"
    )
    assert code == 0
    store = TokenStore(tmp_path / "s")
    settings = store.manifest["settings"]
    assert settings["max_length"] == 2
    assert settings["eos_threshold"] == 0.999
    assert settings["dtype"] == "bfloat16"
    assert settings["queries_sha256"] is not None
    assert len(store.manifest["shards"]) == 3
    assert store.lengths.max() == 2
    code, _, _ = dove_fast("tokenize", photos, tmp_path / "five", "--length", 5)
    assert set(TokenStore(tmp_path / "five").lengths.tolist()) == {5}


def test_exit_2_for_what_cannot_be_used(tmp_path, photos, dove_fast):
    out = tmp_path / "out"
    refused(dove_fast("tokenize", tmp_path / "nowhere", out), "no such input")
    (tmp_path / "empty").mkdir()
    refused(dove_fast("tokenize", tmp_path / "empty", out), "no images in")
    refused(dove_fast("tokenize", photos, photos), "is not empty and is no token store")
    refused(dove_fast("tokenize", photos, photos / "00.jpg"), "exists and is not a directory")
    refused(dove_fast("tokenize", photos, out, "--length", 17), "length must be from 1 to 16")
    refused(dove_fast("tokenize", photos, out, "--eos-threshold", 1), "eos_threshold must lie between 0 and 1")
    refused(dove_fast("tokenize", photos, out, "--checkpoint", tmp_path / "nowhere"), "no checkpoint directory at")
    refused(dove_fast("tokenize", photos, out, "--checkpoint", photos), "is not a checkpoint directory")
    refused(dove_fast("tokenize", photos, out, "--device", "cuda:99"), "device cuda:99 is not here")
    refused(dove_fast("tokenize", photos, out, "--queries", tmp_path / "q"), "no such queries file")
    (tmp_path / "q").write_text('{"key": "00.jpg", "text": "the cat"}')
    refused(dove_fast("tokenize", photos, out, "--queries", tmp_path / "q"), "is text, but this model has no tokenizer")
    (tmp_path / "q").write_text('{"key": "cat.jpg", "ids": [1]}')
    refused(dove_fast("tokenize", photos, out, "--queries", tmp_path / "q"), "not among the inputs: 'cat.jpg'")
    assert not out.exists()


def test_exit_2_for_other_settings_and_other_checkpoints(tmp_path, photos, dove_fast):
    dove_fast("tokenize", photos, tmp_path / "s")
    refused(dove_fast("tokenize", photos, tmp_path / "s", "--max-length", 3), "max_length: None, now 3")
    other = tmp_path / "other"
    micro_model(seed=1).save_pretrained(other)
    refused(dove_fast("tokenize", photos, tmp_path / "s", "--checkpoint", other), "made with another checkpoint")
    refused(dove_fast("reconstruct", tmp_path / "s", tmp_path / "p", "--checkpoint", other), "with another checkpoint")
    refused(dove_fast("reconstruct", photos, tmp_path / "p"), "is not a token store")
    refused(dove_fast("info", photos), "is neither a token store (manifest.json) nor a checkpoint (config.json)")
    refused(dove_fast("info", tmp_path / "nowhere"), "no token store or checkpoint at")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["tokenize", "x"],
        ["tokenize", "x", "y", "--length", "3", "--max-length", "3"],
        ["tokenize", "x", "y", "--batch-size", "0"],
        ["tokenize", "x", "y", "--dtype", "int8"],
        ["reconstruct", "x", "y", "--eos-threshold", "0.3"],
    ],
)
def test_exit_2_for_wrong_arguments(arguments, capsys):
    assert main(arguments) == 2
    assert "usage: dove-fast" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tokenize", "verify", "reconstruct", "export", "info"])
def test_help_has_examples_and_exit_codes(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"  dove-fast {command} " in out
    assert "exit codes: 0 done;" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dove-fast {__version__}\n"


def test_exit_3_when_the_disk_fails(tmp_path, photos, dove_fast, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", fail)
    code, _, err = dove_fast("tokenize", photos, tmp_path / "s")
    assert code == 3
    assert err == "dove-fast: Read-only file system; run the same command again to go on\n"
    monkeypatch.undo()
    assert dove_fast("tokenize", photos, tmp_path / "s")[0] == 0


def test_exit_3_with_the_trace_for_what_nobody_expected(tmp_path, photos, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("dove_fast.DOVE.encode", lambda *_, **__: 1 / 0)
    assert main(["tokenize", str(photos), str(tmp_path / "s"), "--checkpoint", str(checkpoint), "--device", "cpu"]) == 3
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "stopped by an unexpected error; whole shards are kept" in err


@pytest.mark.parametrize("error", [ValueError("wrong"), BackendError("no backend")], ids=repr)
def test_exit_3_for_wrong_use_that_the_user_did_not_make(tmp_path, photos, checkpoint, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("dove_fast.DOVE.encode", fail)
    assert main(["tokenize", str(photos), str(tmp_path / "s"), "--checkpoint", str(checkpoint), "--device", "cpu"]) == 3
    assert f"{type(error).__name__} in the middle of the job: {error}" in capsys.readouterr().err


def test_info_of_this_installation(dove_fast):
    code, out, err = dove_fast("info")
    assert (code, err) == (0, "")
    assert build_info()["compiler"] in out
    assert "default backend" in out
    assert "pack runs on" in out


def test_info_of_a_checkpoint(checkpoint, dove_fast):
    code, out, err = dove_fast("info", checkpoint)
    assert (code, err) == (0, "")
    assert "generator.hidden_size" in out


# In processes of their own, as users run it.

MANY = 40
# So small a model is slower on several threads, all the more beside other tests.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for index in range(MANY):
        Image.fromarray(np.full((20, 20, 3), index, np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "dove_fast.cli", *map(str, arguments)]


def job(many, output, checkpoint, *options) -> list[str]:
    sizes = ("--shard-size", 2, "--batch-size", 1)
    place = () if "--devices" in options else ("--device", "cpu")
    return command("tokenize", many, output, "--checkpoint", checkpoint, *place, *sizes, *options)


def run_here(arguments: list[str]) -> None:
    """Run a job's command in this process, on one thread as the others, so that its values are the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(arguments[3:]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(many, checkpoint, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "s"
    run_here(job(many, output, checkpoint))
    return contents(output)


def wait_for_units(output: Path, ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while len(list((output / "records").glob("[0-9]*.parquet"))) < 4:
        assert not ended()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_unfinished(output: Path) -> None:
    assert json.loads((output / "manifest.json").read_text())["complete"] is False
    assert 4 <= len(list((output / "records").glob("[0-9]*.parquet"))) < MANY // 2


def all_gone(processes: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(is_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(is_alive(process) for process in processes)


INTERRUPTED = "dove-fast: interrupted; whole shards are kept, run the same command again to go on\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_signal_in_the_middle_and_the_same_command_again(tmp_path, many, checkpoint, undisturbed, number, code):
    output = tmp_path / "s"
    arguments = job(many, output, checkpoint, "--workers", 2)
    # A test run in the background of a shell has SIGINT ignored, and its children too.
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for_units(output, lambda: process.poll() is not None)
        workers = children(process.pid)
        assert len(workers) == 2
        process.send_signal(number)
        process.wait(20)
        assert all_gone(workers)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code
    if code == 130:
        assert err == INTERRUPTED
        assert not [name for name in contents(output) if is_temporary(Path(name).name)]
    assert_unfinished(output)

    run_here(arguments)
    assert without_report(contents(output)) == without_report(undisturbed)


def forked(arguments: list[str], err: Path) -> int:
    """Run a command in a fork of this process, which has imported everything, in a session as a terminal has one."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with err.open("w") as sys.stderr:
                code = main(arguments[3:])
        finally:
            os._exit(code)
    return process


@pytest.mark.parametrize("to", [os.kill, pytest.param(os.killpg, marks=pytest.mark.slow)])
def test_ctrl_c_with_one_process_a_device(tmp_path, many, checkpoint, undisturbed, monkeypatch, to):
    """The signal comes to the process that started the others, or as from a terminal to all of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "s"
    arguments = job(many, output, checkpoint, "--workers", 1, "--devices", "cpu,cpu")
    process = forked(arguments, tmp_path / "err")
    try:
        wait_for_units(output, lambda: not is_alive(process))
        jobs = children(process)
        assert len(jobs) == 2
        workers = [worker for each in jobs for worker in children(each)]
        assert workers
        to(process, signal.SIGINT)
        assert all_gone([process, *jobs, *workers])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert (tmp_path / "err").read_text() == INTERRUPTED
    assert_unfinished(output)

    run_here(arguments)
    assert without_report(contents(output)) == without_report(undisturbed)


def without_report(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out what tells of the run and not of its result."""
    assert "report.html" in files
    return {name: content for name, content in files.items() if name != "report.html"}


def test_a_disk_that_takes_no_more_bytes_exits_3_and_resumes(tmp_path, photos, checkpoint):
    arguments = command("tokenize", photos, tmp_path / "s", "--checkpoint", checkpoint, "--device", "cpu")
    # Room for the manifest, and not for a shard.
    limited = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env={**ONE_THREAD, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )
    assert (limited.returncode, limited.stderr) == (
        3,
        "dove-fast: File too large; run the same command again to go on\n",
    )
    assert list(contents(tmp_path / "s")) == [".lock", "manifest.json"]
    assert main(arguments[3:]) == 0


def test_without_a_terminal_and_without_unicode(tmp_path, photos, checkpoint):
    arguments = command("tokenize", photos, tmp_path / "s", "--checkpoint", checkpoint, "--device", "cpu")
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2
    assert "\x1b" not in done.stdout
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command("info", tmp_path / "s"), capture_output=True, env=environment, check=True)
    assert b"#" in done.stdout
    assert done.stdout.isascii()


def test_a_terminal_gets_a_progress_bar(tmp_path, many, checkpoint):
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    environment = {**ONE_THREAD, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        job(many, tmp_path / "s", checkpoint), stdout=subprocess.PIPE, stderr=child, env=environment
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:
            # Linux reports the end of a terminal as an error.
            break
        if not part:
            break
        shown += part
    os.close(parent)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"images/s" in shown
    assert f"/{MANY}".encode() in shown
    assert b" tokens" in shown


def test_verify_and_repair(tmp_path, photos, dove_fast, checkpoint):
    store = tmp_path / "s"
    dove_fast("tokenize", photos, store, "--shard-size", 4, "--batch-size", 3, "--dtype", "bfloat16", "--codes")
    keys = TokenStore(store).keys
    whole = without_report(contents(store))
    assert dove_fast("verify", store) == (0, f"{store}: 3 units, every byte as it was written\n", "")

    flipped = store / "tokens/00001.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 4
    flipped.write_bytes(content)
    (store / "records/00002.parquet").unlink()
    code, out, err = dove_fast("verify", store)
    assert code == 3
    assert out == f"{store}: damaged: 2 of 3 units; --repair does such units again\n"
    assert err.splitlines() == [
        "dove-fast: tokens/00001.safetensors: its bytes are not those that were written",
        "dove-fast: records/00002.parquet: is missing",
    ]
    refused(dove_fast("verify", store, "--input", photos), "are for --repair")

    moved = photos.rename(tmp_path / "moved")
    arguments = ("verify", store, "--repair", "--checkpoint", checkpoint, "--device", "cpu")
    code, _, err = dove_fast(*arguments)
    assert code == 2
    assert "say where its images are now (--input)" in err
    code, out, err = dove_fast(*arguments, "--input", moved)
    assert code == 0, err
    assert out.startswith(f"{store}: 2 units done again, 6 images in ")
    assert dove_fast("verify", store)[0] == 0
    # The same bytes, but for where the images are said to have come from.
    assert len(keys) == 10 and TokenStore(store).keys == keys
    again = contents(store)
    for name in ("tokens/00000.safetensors", "tokens/00001.safetensors", "tokens/00002.safetensors"):
        assert again[name] == whole[name]


def test_what_is_seen_of_a_job(tmp_path, photos, dove_fast):
    store, metrics = tmp_path / "s", tmp_path / "m.jsonl"
    add_bad(photos)
    code, _, err = dove_fast("tokenize", photos, store, "--metrics", metrics, "--prometheus", 0)
    assert code == 1
    assert "metrics at http://127.0.0.1:" in err
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert (lines[-1]["done"], lines[-1]["images"], lines[-1]["errors"]) == (12, 10, 2)
    page = (store / "report.html").read_text()
    assert "05-cut.jpg" in page
    assert page.count("data:image/png;base64") == 16
    dove_fast("tokenize", photos, tmp_path / "without", "--no-report")
    assert not (tmp_path / "without/report.html").exists()


def test_a_dry_run_writes_nothing(tmp_path, photos, dove_fast):
    add_bad(photos)
    code, out, err = dove_fast("tokenize", photos, tmp_path / "s", "--dry-run", "--batch-size", 3, "--shard-size", 4)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "12 inputs in 3 units, 0 of them done"
    assert lines[1].startswith("of 9 inputs tried 1 cannot be used; ")
    assert " KiB an image" in lines[1]
    assert lines[-1] == "nothing was written"
    assert not (tmp_path / "s").exists()


def test_one_process_a_device(tmp_path, photos, dove_fast, checkpoint):
    add_bad(photos)
    arguments = ("--shard-size", 2, "--batch-size", 3)
    dove_fast("tokenize", photos, tmp_path / "one", *arguments)
    code, out, err = dove_fast("tokenize", photos, tmp_path / "s", *arguments, "--devices", "cpu,cpu")
    refused((code, out, err), "--devices goes without --device")
    code = main(
        [
            *("tokenize", str(photos), str(tmp_path / "s"), "--checkpoint", str(checkpoint)),
            *map(str, arguments),
            "--devices=cpu,cpu",
        ]
    )
    assert code == 1
    one, two = TokenStore(tmp_path / "one"), TokenStore(tmp_path / "s")
    assert two.keys == one.keys
    assert two.lengths.tolist() == one.lengths.tolist()
    assert len((tmp_path / "s/errors.jsonl").read_text().splitlines()) == 2


def test_ranks_come_from_what_started_the_process(tmp_path, photos, dove_fast, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    code, out, _ = dove_fast("tokenize", photos, tmp_path / "s", "--shard-size", 4)
    assert code == 0
    assert "4 images" in out
    assert "not done: 2 of 3 units, which other jobs have" in out
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    code, out, _ = dove_fast("tokenize", photos, tmp_path / "s", "--shard-size", 4, "--rank", 0, "--world-size", 2)
    assert code == 0
    assert "10 images" in out
    refused(dove_fast("tokenize", photos, tmp_path / "t", "--rank", 0), "--rank and --world-size go together")
