"""What `dove-fast tokenize` says of several processes, and the report that it leaves."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from made_pictures import add_bad, make_pictures
from made_stores import settings, write
from small_models import micro_model

from dove_fast.cli import main
from dove_fast.jobs import TokenizeReport, ray_engine
from dove_fast.jobs.metrics import MetricsLog
from dove_fast.jobs.progress import Progress
from dove_fast.store.writer import StoreWriter

NO_PICTURES = "The longest and the shortest images are not shown"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    micro_model().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_pictures(tmp_path / "photos", 4)


@pytest.fixture
def tokenize(tmp_path, photos, checkpoint, capsys):
    """Run the command on the pictures, into `s`; returns (exit code, stdout, stderr)."""

    def run(*arguments, device: str | None = "cpu"):
        on = () if device is None else ("--device", device)
        words = ("tokenize", photos, tmp_path / "s", "--checkpoint", checkpoint, *on, *arguments)
        code = main([*map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def on_devices(tmp_path, monkeypatch, tokenize):
    """Run the command with --devices, and a shell script in the place of each process; $device is theirs."""

    def run(script: str, *arguments, devices: str = "cpu,cuda:1"):
        path = tmp_path / "script"
        path.write_text(f"#!/bin/sh\nfor device; do :; done\n{script}\n")
        path.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(path))
            return tokenize("--devices", devices, *arguments, device=None)

    return run


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("kill -KILL $$", 3, ["cpu: killed by SIGKILL", "cuda:1: killed by SIGKILL"]),
        (
            "echo 'dove-fast: no' >&2; exit 2",
            2,
            ["cpu: exit code 2: dove-fast: no", "cuda:1: exit code 2: dove-fast: no"],
        ),
        ("[ $device = cpu ] && exit 2; kill -SEGV $$", 3, ["cpu: exit code 2", "cuda:1: killed by SIGSEGV"]),
        # Of no command of ours: it did not stop by itself.
        ("exit 120", 3, ["cpu: exit code 120", "cuda:1: exit code 120"]),
    ],
)
def test_where_all_processes_fail_it_is_told_how_each_ended(on_devices, script, code, said):
    found, out, err = on_devices(script)
    assert (found, out) == (code, "")
    assert err.splitlines() == [f"dove-fast: {line}" for line in said]


def test_a_process_that_is_killed_beside_others_is_named_and_the_store_counts(tmp_path, on_devices):
    write(tmp_path / "made")
    script = f"[ $device = cpu ] && exec cp -r {tmp_path}/made {tmp_path}/s; kill -KILL $$"
    code, out, err = on_devices(script)
    assert (code, err) == (0, "dove-fast: cuda:1: killed by SIGKILL\n")
    assert out.startswith(f"{tmp_path}/s: 8 images, ")
    shutil.rmtree(tmp_path / "s")
    code, _, err = on_devices("[ $device = cpu ] && exit 0; kill -KILL $$")
    assert code == 3
    assert err.startswith("dove-fast: cuda:1: killed by SIGKILL\ndove-fast: no token store at ")


def test_units_of_other_jobs_are_no_failure(tmp_path, on_devices):
    store = write(tmp_path / "made")
    writer = StoreWriter(store, settings(8), {"torch": "test"})
    writer.begin(again=[1])
    writer.close()
    code, out, err = on_devices(f"[ $device = cpu ] && exec cp -r {store} {tmp_path}/s; exit 1")
    assert (code, err) == (1, "")
    assert out.endswith("/s: not done: units which other jobs have, or left behind; run again to finish\n")


def test_devices_show_one_bar_of_units(tmp_path, on_devices, monkeypatch):
    write(tmp_path / "made")
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = on_devices(f"[ $device = cpu ] || exit 0; exec cp -r {tmp_path}/made {tmp_path}/s")
    assert code == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert re.search(r"units [━╸╺ ]+ 3/3 [0-9.]+ images/s [0-9.]+ tokens", shown)


def test_devices_leave_one_report_of_all(tmp_path, on_devices):
    write(tmp_path / "made")
    script = (
        f'echo "$*" >{tmp_path}/words-$device; [ $device = cpu ] || exit 0; exec cp -r {tmp_path}/made {tmp_path}/s'
    )
    assert on_devices(script)[0] == 0
    # Theirs would tell of a part.
    assert (tmp_path / "words-cpu").read_text().endswith(" --no-report --join --device cpu\n")
    page = (tmp_path / "s/report.html").read_text()
    assert "<th>computed</th><td>8</td>" in page
    assert "<th>device</th><td>cpu, cuda:1</td>" in page
    assert NO_PICTURES in page
    # Again, with nothing to do.
    (tmp_path / "s/report.html").write_text("as it was")
    assert on_devices("exit 0")[0] == 0
    assert (tmp_path / "s/report.html").read_text() == "as it was"
    (tmp_path / "s/report.html").unlink()
    assert on_devices("exit 0", "--no-report")[0] == 0
    assert not (tmp_path / "s/report.html").exists()
    assert on_devices("exit 0")[0] == 0
    assert "<th>computed</th>" not in (tmp_path / "s/report.html").read_text()


def test_ray_leaves_a_report(tmp_path, tokenize, monkeypatch):
    report = TokenizeReport(8, 8, 20, 0, 3, 0, computed=5, seconds=2.0, complete=True, already_complete=False)

    def pretend(*_, on_progress, **__):
        write(tmp_path / "s")
        on_progress(Progress(8, 8, 5, 12))
        return report

    monkeypatch.setattr(ray_engine, "tokenize_with_ray", pretend)
    assert tokenize("--engine", "ray")[0] == 0
    page = (tmp_path / "s/report.html").read_text()
    assert "<th>computed</th><td>5</td>" in page
    assert "<th>images/s</th><td>2.5</td>" in page
    assert NO_PICTURES in page


def test_a_complete_store_without_a_report_gets_one(tmp_path, tokenize):
    assert tokenize("--no-report")[0] == 0
    path = tmp_path / "s/report.html"
    assert not path.exists()
    # As after a kill between the store's end and the report.
    code, out, _ = tokenize()
    assert code == 0
    assert "it was complete already" in out
    page = path.read_text()
    assert "<th>images</th><td>4</td>" in page
    assert NO_PICTURES in page
    path.write_text("as it was")
    assert tokenize()[0] == 0
    assert path.read_text() == "as it was"


def full_disk_for(name: str, monkeypatch) -> None:
    """Let no file of that name come to be."""
    replacing = os.replace

    def refuse(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replacing(source, target)

    monkeypatch.setattr(os, "replace", refuse)


def test_a_report_that_cannot_be_written_is_no_wrong_use(tmp_path, photos, tokenize, monkeypatch):
    add_bad(photos)
    with monkeypatch.context() as patch:
        full_disk_for("report.html", patch)
        code, out, err = tokenize()
    assert code == 3
    assert "4 images" in out
    assert err.splitlines()[1:] == [
        "dove-fast: the store is complete, but its report could not be written: No space left on device; "
        "run the same command again to write it"
    ]
    assert tokenize()[0] == 1
    assert (tmp_path / "s/report.html").exists()


def test_records_that_are_damaged_cost_the_report_and_not_the_job(tmp_path, tokenize):
    assert tokenize("--no-report")[0] == 0
    (tmp_path / "s/errors.jsonl").write_text("half of a li")
    code, _, err = tokenize()
    assert code == 3
    assert err.startswith("dove-fast: the store is complete, but its report could not be written: ")
    assert "errors.jsonl is damaged" in err


def test_a_last_line_of_metrics_that_cannot_be_written_is_no_wrong_use(tmp_path, tokenize, monkeypatch):
    def refuse(self, progress, *, last=False):
        if last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLog, "update", refuse)
    code, _, err = tokenize("--metrics", tmp_path / "m.jsonl")
    assert code == 3
    assert err == (
        f"dove-fast: No space left on device; the last line of {tmp_path}/m.jsonl is missing, the images are done\n"
    )
    # What stopped a job is told first.
    monkeypatch.setattr("dove_fast.DOVE.encode", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    shutil.rmtree(tmp_path / "s")
    assert tokenize("--metrics", tmp_path / "m.jsonl")[0] == 130


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        (None, 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        # Each sees its own only.
        ("cuda", 1, "cuda:0"),
        ("cuda:0", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        (None, 0, None),
        # To be refused, and not to be computed elsewhere.
        ("cuda", 0, "cuda"),
    ],
)
def test_each_process_of_torchrun_takes_a_gpu_of_its_own(tokenize, monkeypatch, asked, gpus, expected):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    seen = []

    def load(arguments):
        seen.append(arguments.device)
        raise ValueError("enough")

    monkeypatch.setattr("dove_fast.commands.tokenize.load", load)
    assert tokenize(device=asked)[0] == 2
    assert seen == [expected]


def test_what_was_set_aside_is_tried_again_and_what_is_lost_is_told(tmp_path, photos, tokenize):
    path = photos / "00.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    code, out, err = tokenize("--shard-size", 2)
    assert (code, "1 set aside" in out, "--retry-errors" in err) == (1, True, False)
    code, _, err = tokenize("--shard-size", 2)
    assert code == 1
    assert err.endswith("errors.jsonl; --retry-errors tries them again once they are mended\n")
    # Worse, and then mended.
    for other in photos.rglob("*.png"):
        other.rename(other.with_suffix(".away"))
        other.write_bytes(b"")
    code, out, err = tokenize("--shard-size", 2, "--retry-errors")
    assert code == 1
    assert f"fewer images than before in unit 0 (errors.jsonl says why); what there was is in {tmp_path}/s/repl" in err
    path.write_bytes(whole)
    for other in photos.rglob("*.away"):
        other.rename(other.with_suffix(".png"))
    code, out, err = tokenize("--shard-size", 2, "--retry-errors")
    assert (code, err) == (0, "")
    assert "0 set aside" in out
    assert not (tmp_path / "s/replaced").exists()
