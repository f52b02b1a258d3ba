"""WebDataset shards as a job's input: keys, extras, what is set aside, damage, and pipes and URLs that fail."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from made_shards import write_tar

from dove_fast.data import EncodedImage, SourceOptions, Unusable, open_source, shards

NOISE = np.random.default_rng(0).bytes(3000)
PREFIXED = SourceOptions(prefix_keys=True)


def read(path, options: SourceOptions | None = None) -> list[EncodedImage | Unusable]:
    source = open_source(path, options)
    return [item for unit in range(source.units) for item in source.read(unit)]


def read_members(tmp_path: Path, *members: tuple[str, object]) -> list[EncodedImage | Unusable]:
    """Read a shard of these files; what is not bytes is written as JSON."""
    plain = [(name, data if isinstance(data, bytes) else json.dumps(data).encode()) for name, data in members]
    return read(write_tar(tmp_path / "s.tar", plain))


def extra(tmp_path: Path, *members: tuple[str, object]) -> dict[str, object] | None:
    (item,) = read_members(tmp_path, ("a.png", b"png"), *members)
    assert isinstance(item, EncodedImage)
    return item.extra


def reasons(items: list[EncodedImage | Unusable]) -> list[tuple[str, str | None]]:
    return [(item.key, item.reason if isinstance(item, Unusable) else None) for item in items]


def some_shard(path: Path, count: int = 5) -> Path:
    members = []
    for number in range(count):
        members += [(f"{number}.png", NOISE[number : number + 700 + number]), (f"{number}.txt", b"%d" % number)]
    return write_tar(path, members)


def running(group: int) -> list[str]:
    """Return the processes of a group, without those that have ended and that nobody has waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, _, fields = stat.read_text().rpartition(")")
            state, _, its_group = fields.split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(name)
    return found


def gone(group: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while running(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(group)


def test_a_sample_is_its_key_picture_and_what_comes_with_it(tmp_path):
    items = read_members(
        tmp_path,
        ("deep/a.txt", "caf\u00e9\n".encode()),
        ("deep/a.JPG", b"jpg"),
        ("deep/a.json", {"label": [1, 2.5, None, True, "\u00fc"]}),
        ("deep/a.cls", b"7"),
        ("b.webp", b"webp"),
    )
    source = str(tmp_path / "s.tar")
    assert items == [
        EncodedImage(
            "deep/a",
            source,
            b"jpg",
            {"txt": "caf\u00e9\n", "json": {"label": [1, 2.5, None, True, "\u00fc"]}, "cls": "7"},
        ),
        EncodedImage("b", source, b"webp", None),
    ]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", b"\xef\xbb\xbftext", "text"),
        ("a.txt", b"", ""),
        ("a.txt", b"caf\xe9", None),
        ("a.npy", NOISE, None),
        ("a.seg.png.json", b"[1]", [1]),
        ("a.json", b"null", None),
        ("a.json", b"0", 0),
        ("a.json", b'{"x": 1', None),
        ("a.json", b'{"x": "caf\xe9"}', None),
        ("a.json", b'"\\ud800"', None),
        ("a.json", b'{"\\ud800": 1}', None),
        ("a.json", b'"\\ud83d\\ude00"', "\U0001f600"),
        ("a.json", b"[NaN, Infinity, -Infinity, 1]", [None, None, None, 1]),
        ("a.json", b"[1e999]", None),
        ("a.json", b"9" * 5000, None),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, None),
        ("a.json", b'{"a":' * 900 + b"1" + b"}" * 900, None),
        ("a.json", b"[" * 64 + b"]" * 64, json.loads("[" * 64 + "]" * 64)),
        ("a.json", b"[" * 66 + b"]" * 66, None),
    ],
)
def test_what_passes_through(tmp_path, name, data, expected):
    found = extra(tmp_path, (name, data))
    assert found == (None if expected is None else {name.removeprefix("a."): expected})
    if found is not None:
        # As the records keep it, wherever that is called from.
        assert json.loads(json.dumps(found, ensure_ascii=False, allow_nan=False).encode()) == found


def test_what_is_large_does_not_pass_through(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_EXTRA_BYTES", 10)
    assert extra(tmp_path, ("a.txt", b"x" * 10), ("a.cls", b"x" * 11)) == {"txt": "x" * 10}


def test_a_picture_that_is_too_large_is_set_aside_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 100)
    members = (("a.png", NOISE[:101]), ("a.txt", b"x"), ("b.png", NOISE[:100]), ("c.png", NOISE), ("c.jpg", b"x"))
    items = read_members(tmp_path, *members)
    assert reasons(items) == [
        ("a", "a picture of 101 bytes, more than 100"),
        ("b", None),
        ("c", "a picture of 3000 bytes, more than 100"),
    ]
    assert items[1].content == NOISE[:100]


def test_none_or_two_pictures(tmp_path):
    items = read_members(
        tmp_path, ("a.txt", b"x"), ("b.png", b"1"), ("b.jpg", b"2"), ("c.image.png", b"3"), ("d.gif", b"4")
    )
    assert reasons(items) == [("a", "no picture"), ("b", "more than one picture"), ("c", "no picture"), ("d", None)]
    assert {item.source for item in items} == {str(tmp_path / "s.tar")}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("piped", [False, True])
def test_links_are_set_aside_and_not_lost(tmp_path, kind, piped):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a.png", "+b.png", "c.png", "+c.txt", "+d.png", "d.txt", "+.hidden.png", "+no_dot", "e.png"):
            header = tarfile.TarInfo(name.removeprefix("+"))
            if name.startswith("+"):
                header.type, header.linkname = kind, "a.png"
                archive.addfile(header)
            else:
                header.size = 1
                archive.addfile(header, io.BytesIO(b"1"))
    link = "a link in the archive, which is not followed"
    items = read(f"pipe:cat {tmp_path}/s.tar" if piped else tmp_path / "s.tar")
    assert reasons(items) == [("a", None), ("b", link), ("c", link), ("d", link), ("e", None)]


def test_a_key_that_comes_again_in_one_shard(tmp_path):
    items = read_members(tmp_path, ("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"x"), ("a.png", b"3"), ("b.png", b"4"))
    again = "its key comes more than once in the shard"
    assert reasons(items) == [("a", None), ("b", None), ("a", again), ("b", again)]
    assert [item.content for item in items[:2]] == [b"1", b"2"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..//x", "a/../x"])
def test_keys_that_lead_out_are_set_aside(tmp_path, name):
    items = read_members(tmp_path, (f"{name}.png", b"1"), ("./y.png", b"2"), ("..z/a..b.png", b"3"))
    assert reasons(items)[0] == (name, "its key leads out of its folder")
    assert reasons(items)[1:] == [("./y", None), ("..z/a", "no picture")]


def test_keys_are_text_whatever_the_name_is(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("caf\u00e9", "caf\udce9", "x" * 200):
            header = tarfile.TarInfo(f"{name}.png")
            header.size = 1
            archive.addfile(header, io.BytesIO(b"1"))
    assert [item.key for item in read(tmp_path / "s.tar")] == ["caf\u00e9", r"caf\xe9", "x" * 200]


def test_prefixes(tmp_path):
    for name in ("one", "two/one.5"):
        write_tar(tmp_path / f"{name}.tar", [("deep/a.png", b"1"), ("b.txt", b"2"), ("../c.png", b"3")])
    items = read(tmp_path, PREFIXED)
    assert [item.key for item in items] == [
        *("one/deep/a", "one/b", "one/../c"),
        *("one.5/deep/a", "one.5/b", "one.5/../c"),
    ]
    assert [reason for _, reason in reasons(items)[:3]] == [None, "no picture", "its key leads out of its folder"]
    source = open_source(tmp_path, PREFIXED)
    assert source.unique_keys and source.to_dict() == {"kind": "webdataset", "prefix_keys": True}
    assert source.identity() == open_source(tmp_path).identity()
    write_tar(tmp_path / "three/one.tar", [("a.png", b"1")])
    with pytest.raises(ValueError, match="must have different names to prefix keys with, 'one' comes twice"):
        open_source(tmp_path, PREFIXED)


def test_one_ending_is_no_part_of_a_shards_name(tmp_path):
    write_tar(tmp_path / "a.parquet.tar", [("x.png", b"1")])
    assert [item.key for item in read(tmp_path / "a.parquet.tar", PREFIXED)] == ["a.parquet/x"]


def test_prefixes_of_pipes_and_urls(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("x.png", b"1")])
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    # The command is no path that could lead anywhere.
    (item,) = read("pipe:cat ../a.tar", PREFIXED)
    assert (item.key, item.source) == ("pipe:cat .._a.tar/x", "pipe:cat ../a.tar") and isinstance(item, EncodedImage)
    (item,) = read(f"file://{tmp_path}/a.tar", PREFIXED)
    assert item.key == "a/x"
    assert open_source("https://h.invalid/a.tar?sig=b/c.tar").identity() == open_source(tmp_path / "a.tar").identity()


def test_a_shard_cut_off_anywhere_gives_what_was_before(tmp_path):
    path = some_shard(tmp_path / "s.tar")
    whole, complete = path.read_bytes(), read(path)
    with tarfile.open(path) as archive:
        ends = [header.offset_data + header.size for header in archive]
    padded = [-(-end // 512) * 512 for end in ends]
    for length in (*range(0, padded[-1] + 512, 300), *ends, *padded):
        path.write_bytes(whole[:length])
        *items, last = read(path)
        assert isinstance(last, Unusable) and last.key == "s"
        assert last.reason.startswith("the shard is damaged, not complete or no tar archive: ")
        assert last.reason.endswith("; fetch it again or leave it out")
        # Every picture that is whole has come, and with all that came with it but for the last one.
        pictures = sum(end <= length for end in ends[::2])
        assert [item.key for item in items] == [item.key for item in complete[:pictures]]
        assert items[:-1] == complete[: len(items)][:-1]
        assert [item.content for item in items] == [item.content for item in complete[:pictures]]
    path.write_bytes(whole[: padded[-1] + 512])
    assert read(path) == complete


@pytest.mark.parametrize("member", range(10))
def test_a_corrupt_header_costs_what_is_behind_it(tmp_path, member):
    path = some_shard(tmp_path / "s.tar")
    complete = read(path)
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[member].offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    *items, last = read(path)
    assert last.key == "s" and last.reason.startswith("the shard is damaged")
    assert [item.key for item in items] == [item.key for item in complete[: (member + 1) // 2]]
    assert all(isinstance(item, EncodedImage) for item in items)
    with pytest.raises(OSError, match="the stream is damaged"):
        read(f"pipe:cat {path}")


def test_a_sample_at_the_damage_whose_picture_may_be_behind_it_is_not_set_aside_by_itself(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"1"), ("b.txt", b"x"), ("b.png", b"2")])
    path.write_bytes(path.read_bytes()[: 4 * 512 + 100])
    assert [item.key for item in read(path)] == ["a", "s"]


def test_a_compressed_shard(tmp_path):
    path = some_shard(tmp_path / "s.tar")
    subprocess.run(["gzip", path], check=True)
    path.with_suffix(".tar.gz").rename(path)
    ((key, reason),) = reasons(read(path))
    assert key == "s" and reason.startswith("the shard is compressed with gzip")
    with pytest.raises(OSError, match="the stream is compressed with gzip"):
        read(f"pipe:cat {path}")
    assert len(read(f"pipe:gzip -dc < {path}")) == 5


def test_a_shard_that_vanishes(tmp_path):
    source = open_source(some_shard(tmp_path / "s.tar"))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(FileNotFoundError):
        list(source.read(0))


def same_but_for_the_source(items, others) -> bool:
    return [(item.key, item.content, item.extra) for item in items] == [
        (item.key, item.content, item.extra) for item in others
    ]


def test_a_pipe_equals_the_file(tmp_path):
    path = some_shard(tmp_path / "s.tar", 200)
    for command in (
        f"cat {path}",
        f"(head -c 1000; sleep 0.05; cat) < {path}",
        f"cat {path}; head -c 300000 /dev/zero",
    ):
        items = read(f"pipe:{command}")
        assert same_but_for_the_source(items, read(path))
        assert {item.source for item in items} == {f"pipe:{command}"}


@pytest.mark.parametrize(
    ("command", "before", "message"),
    [
        ("cat {path}; exit 3", 5, "the command ended with exit code 3"),
        ("cat {path}; kill -9 $$", 5, "the command ended with exit code -9"),
        ("exit 4", 0, "the command ended with exit code 4"),
        ("head -c 3000 {path}; exit 5", 1, "the command ended with exit code 5"),
        ("head -c 3000 {path}; exec >&-; sleep 0.3; exit 6", 1, "the command ended with exit code 6"),
        ("no-such-command-anywhere {path} 2>/dev/null", 0, "the command ended with exit code 127"),
        ("true", 0, "the stream is damaged, not complete or no tar archive: empty file"),
        ("head -c 3000 {path}", 1, "the stream is damaged, not complete or no tar archive"),
        ("echo hello", 0, "the stream is damaged, not complete or no tar archive"),
        ("yes", 0, "the stream is damaged, not complete or no tar archive"),
    ],
)
def test_a_pipe_that_fails_or_is_cut_off_raises(tmp_path, command, before, message):
    text = "pipe:" + command.format(path=some_shard(tmp_path / "s.tar"))
    found = []
    with pytest.raises(OSError, match=message) as raised:
        found.extend(open_source(text).read(0))
    assert raised.value.filename == text
    assert [item.key for item in found if isinstance(item, EncodedImage)][:before] == [str(n) for n in range(before)]


def test_a_pipe_that_is_closed_early_leaves_no_process_behind(tmp_path):
    path = some_shard(tmp_path / "s.tar", 50)
    # The shell, those that it waits for, and one in the background.
    command = f"echo $$ > {tmp_path}/shell; sleep 600 & cat {path} /dev/zero | cat; sleep 600"
    with contextlib.closing(open_source(f"pipe:{command}").read(0)) as items:
        assert next(items).key == "0"
        shell = int((tmp_path / "shell").read_text())
        assert len(running(shell)) == 4
    assert gone(shell)


def test_a_pipe_that_hangs_ends_with_the_interpreter(tmp_path):
    script = f"""
import pathlib, threading, time
from dove_fast.data import open_source
items = open_source("pipe:echo $$ > {tmp_path}/shell; sleep 600; true").read(0)
threading.Thread(target=next, args=(items,), daemon=True).start()
while not (pathlib.Path("{tmp_path}/shell").exists() and pathlib.Path("{tmp_path}/shell").read_text().endswith("\\n")):
    time.sleep(0.01)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert gone(int((tmp_path / "shell").read_text()))


def in_memory(name: str, data: bytes) -> str:
    import fsspec

    fsspec.filesystem("memory").pipe(f"/dove-fast-test/{name}", data)
    return f"memory://dove-fast-test/{name}"


def test_a_url_equals_the_file(tmp_path):
    path = some_shard(tmp_path / "s.tar", 20)
    url = in_memory("s.tar", path.read_bytes())
    # Twice, as a resumed job would.
    for _ in range(2):
        items = read(url)
        assert same_but_for_the_source(items, read(path))
        assert {item.source for item in items} == {url}


def test_a_url_that_is_cut_off_or_not_there_raises(tmp_path):
    whole = some_shard(tmp_path / "s.tar").read_bytes()
    for length in (0, 100, 3000):
        with pytest.raises(OSError, match="the stream is damaged, not complete or no tar archive"):
            read(in_memory("cut.tar", whole[:length]))
    with pytest.raises(FileNotFoundError):
        read("memory://dove-fast-test/nowhere.tar")
    with pytest.raises(OSError, match=r"cannot be opened: ValueError: .*nosuch"):
        read("nosuch://host/a.tar")


def test_what_a_url_raises_in_the_middle_is_an_oserror(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFile

    url = in_memory("s.tar", some_shard(tmp_path / "s.tar").read_bytes())
    plain = MemoryFile.read

    def fail(file, *size):
        if file.tell() > 2000:
            raise RuntimeError("503 Slow Down")
        return plain(file, *size)

    monkeypatch.setattr(MemoryFile, "read", fail)
    with pytest.raises(OSError, match="reading failed: RuntimeError: 503 Slow Down"):
        read(url)


def test_a_shard_of_nothing(tmp_path):
    assert read(write_tar(tmp_path / "s.tar", [])) == []
    assert read(write_tar(tmp_path / "s.tar", [("README", b"x"), (".hidden", b"x")])) == []
