"""Archives and streams read forward: the same bytes as a file gives, and damage that is not passed over."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dove_fast.data.tar import HISTORY, LINK, MEMBER, SPARSE, ForwardFile, content, members, open_tar, what_is_wrong

RANDOM = np.random.default_rng(0).bytes(3 * HISTORY)


class Few(io.RawIOBase):
    """A stream that gives a few bytes at a time, and neither seeks nor tells."""

    def __init__(self, data: bytes, most: int) -> None:
        self._file, self._most = io.BytesIO(data), most
        self.largest = 0

    def read(self, size: int = -1) -> bytes:
        assert size > 0
        self.largest = max(self.largest, size)
        return self._file.read(min(size, self._most))


def archive(*files: tuple[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def checked(header: bytes) -> bytes:
    """Return a header with the checksum that belongs to it."""
    plain = bytearray(header)
    plain[148:156] = b"        "
    plain[148:156] = b"%06o\0 " % sum(plain)
    return bytes(plain)


def listed(file) -> list[tuple[str, str, bytes]]:
    with open_tar(file) as tar:
        return [(m.name, m.ending, content(tar, m.header).read()) for m in members(tar, file)]


def in_file(tmp_path, data: bytes) -> list[tuple[str, str, bytes]]:
    (tmp_path / "s.tar").write_bytes(data)
    with open(tmp_path / "s.tar", "rb") as file:
        return listed(file)


FILES = (
    ("a.png", RANDOM[:1000]),
    ("a.json", b"{}"),
    ("deep/b.jpg", RANDOM[: 2 * HISTORY]),
    ("deep/b.cls", b""),
    ("c" * 150 + ".txt", RANDOM[5:517]),
    ("d.png", RANDOM[:512]),
)


@contextmanager
def pipe_of(data: bytes, most: int):
    """A real pipe into which a thread writes a few bytes at a time."""
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb", buffering=0) as file:
            try:
                for start in range(0, len(data), most):
                    file.write(data[start : start + most])
            except BrokenPipeError:
                pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with open(reading, "rb", buffering=0) as file:
            yield file
    finally:
        thread.join()


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(0, len(RANDOM)),
    most=st.sampled_from([1 << 12, 40_000, 1 << 30]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.one_of(st.integers(0, 600), st.integers(0, 2 * HISTORY))),
            st.tuples(st.just("on"), st.one_of(st.integers(0, 600), st.integers(0, 2 * HISTORY))),
            st.tuples(st.just("back"), st.integers(0, 2000)),
        ),
        max_size=30,
    ),
)
def test_a_stream_read_forward_is_the_file(size, most, steps):
    file, stream = io.BytesIO(RANDOM[:size]), ForwardFile(Few(RANDOM[:size], most))
    for step, amount in steps:
        if step == "read":
            assert stream.read(amount) == file.read(amount)
        else:
            position = max(0, file.tell() + (amount if step == "on" else -amount))
            if position < min(file.tell(), size) - HISTORY // 2:
                continue
            assert stream.seek(position) == file.seek(position)
        assert stream.tell() == file.tell()


def test_what_lies_further_back_than_the_history_is_refused():
    stream = ForwardFile(io.BytesIO(RANDOM))
    stream.seek(len(RANDOM) - 10)
    stream.seek(len(RANDOM) - 10 - HISTORY)
    assert stream.read(5) == RANDOM[-10 - HISTORY : -5 - HISTORY]
    with pytest.raises(OSError, match=f"cannot go back from byte {len(RANDOM) - 10} to 3"):
        stream.seek(3)
    assert stream.read(5) == RANDOM[-5 - HISTORY : -HISTORY]
    with pytest.raises(OSError, match="cannot go back"):
        stream.seek(-1)


def test_a_seek_beyond_the_end_gives_nothing_as_in_a_file():
    stream = ForwardFile(io.BytesIO(b"hello"))
    assert not stream.ended
    assert stream.seek(100) == 100 and stream.tell() == 100 and stream.read(5) == b""
    assert stream.ended
    assert stream.seek(1) == 1 and stream.read(10) == b"ello"


def test_a_size_that_is_damaged_does_not_become_memory():
    few = Few(RANDOM, 1 << 30)
    assert ForwardFile(few).read(1 << 50) == RANDOM
    assert few.largest <= 1 << 20


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("most", [7, 512, 1 << 30])
def test_members_of_a_stream_are_those_of_the_file(tmp_path, format, most):
    # Names of 150 characters have no place in the oldest format, and a member of few bytes is enough for few at a time.
    files = FILES[:4] if format == tarfile.USTAR_FORMAT else FILES
    files = files if most > 7 else tuple((name, data[:700]) for name, data in files)
    data = archive(*files, format=format)
    expected = in_file(tmp_path, data)
    names = [MEMBER.fullmatch(name) for name, _ in files]
    assert expected == [(name[1], name[2], data) for name, (_, data) in zip(names, files, strict=True) if name]
    assert listed(ForwardFile(Few(data, most))) == expected
    with pipe_of(data, max(most, 64)) as stream:
        assert listed(ForwardFile(stream)) == expected


def test_members_that_are_not_read_are_passed_over(tmp_path):
    data = archive(*FILES)
    for read in (set(), {"deep/b"}, {"a", "d"}):
        stream = ForwardFile(Few(data, 5000))
        with open_tar(stream) as tar:
            found = [(m.name, content(tar, m.header).read()) for m in members(tar, stream) if m.name in read]
        assert found == [(name, part) for name, _, part in in_file(tmp_path, data) if name in read]


def test_names_are_split_at_the_first_dot_of_the_base_name(tmp_path):
    names = ["a.PNG", "v1.0/b.seg.Png", "./c.txt", "/d.txt", "no_dot", ".hidden", "x/.hidden.png", "e.", "f..g"]
    found = in_file(tmp_path, archive(*((name, b"") for name in names)))
    assert [(name, ending) for name, ending, _ in found] == [
        ("a", ".png"),
        ("v1.0/b", ".seg.png"),
        ("./c", ".txt"),
        ("/d", ".txt"),
        ("e", "."),
        ("f", "..g"),
    ]


def special(name: str, kind: bytes, size: int = 0) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.size = kind, "a.png", size
    return header


@pytest.mark.parametrize("streamed", [False, True])
def test_links_and_sparse_files_come_with_why_they_are_not_read(tmp_path, streamed):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(special("link.PNG", tarfile.SYMTYPE))
        tar.addfile(special("hard.txt", tarfile.LNKTYPE))
        # Neither is a sample's.
        tar.addfile(special(".hidden", tarfile.SYMTYPE))
        tar.addfile(special("no_dot", tarfile.LNKTYPE))
        for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            tar.addfile(special("dir.png", kind))
        tar.addfile(special("a.png", tarfile.REGTYPE, 3), io.BytesIO(b"abc"))
        tar.addfile(special("sparse.png", tarfile.GNUTYPE_SPARSE, 3), io.BytesIO(b"abc"))
        tar.addfile(special("b.png", tarfile.REGTYPE, 3), io.BytesIO(b"def"))
    path = tmp_path / "s.tar"
    path.write_bytes(file.getvalue())
    with open(path, "rb") as whole:
        source = ForwardFile(Few(file.getvalue(), 100)) if streamed else whole
        with open_tar(source) as tar:
            found = [(member.name, member.ending, member.unread) for member in members(tar, source)]
    assert found == [
        ("link", ".png", LINK),
        ("hard", ".txt", LINK),
        ("a", ".png", ""),
        ("sparse", ".png", SPARSE),
        ("b", ".png", ""),
    ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_cut_off_anywhere_raises(tmp_path, format):
    files = (("a.png", RANDOM[:600]), ("b" * 120 + ".txt", b"x"), ("c.png", RANDOM[:100]))
    whole = archive(*files, format=format)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        end = max(header.offset_data for header in tar) + 512
    for length in sorted({*range(0, end + 512, 256), 100, end - 1, end + 1, end + 511}):
        with pytest.raises(tarfile.TarError):
            in_file(tmp_path, whole[:length])
        with pytest.raises(tarfile.TarError):
            listed(ForwardFile(Few(whole[:length], 300)))
    # One block of zeros ends it; what follows says nothing.
    for length in (end + 512, end + 700):
        assert listed(ForwardFile(Few(whole[:length], 300))) == in_file(tmp_path, whole[:length])


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_corrupt_header_raises_after_what_was_before(tmp_path, number, streamed):
    names = ("a.png", "b.png", "c.png")
    data = bytearray(archive(*((name, RANDOM[:100]) for name in names)))
    data[1024 * number + 2] ^= 1
    (tmp_path / "s.tar").write_bytes(data)
    found = []
    with open(tmp_path / "s.tar", "rb") as raw:
        file = ForwardFile(Few(bytes(data), 100)) if streamed else raw
        with pytest.raises(tarfile.TarError) as raised, open_tar(file) as tar:
            found.extend(member.header.name for member in members(tar, file))
        assert what_is_wrong(file, raised.value).startswith("is damaged, not complete or no tar archive: ")
    assert found == list(names[:number])


@pytest.mark.parametrize(
    "record",
    [
        b"24 GNU.sparse.map=1,abc\n",
        b"23 GNU.sparse.size=abc\n",
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
        b"17 hdrcharset=\xff\xfe\n",
        b"28 size=99999999999999999999\n",
        b"12 size=-99\n",
        b"14 size=-1024\n",
        # Back to this header, over and over.
        b"14 size=-1536\n",
    ],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_extended_header_that_means_nothing_raises(tmp_path, record, first, streamed):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    pax = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    plain = archive(("a.png", b"abc"), ("b.png", b"def"))
    data = pax + plain if first else plain[:1024] + pax + plain[1024:]
    with pytest.raises(tarfile.TarError):
        listed(ForwardFile(Few(data, 100))) if streamed else in_file(tmp_path, data)


def outcome(read, *arguments):
    """Return what is read, None for a damaged archive."""
    try:
        return read(*arguments)
    except tarfile.TarError:
        return None


def test_damage_anywhere_is_a_tar_error_or_harmless(tmp_path):
    files = (("a.png", RANDOM[:600]), ("b" * 120 + ".txt", b"x"), ("c.png", RANDOM[:100]))
    random = np.random.default_rng(1)
    outcomes = set()
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = archive(*files, format=format)
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            headers = [header.offset_data - 512 for header in tar]
        for _ in range(200):
            data = bytearray(whole[: headers[-1] + 2048])
            for position in random.integers(0, len(data), 3):
                data[position] = random.integers(0, 256)
            if random.integers(2):
                # A checksum that fits lets the damage through to what reads the numbers.
                start = headers[random.integers(len(headers))]
                data[start + random.integers(100, 136)] = random.integers(0, 256)
                data[start : start + 512] = checked(data[start : start + 512])
            results = [outcome(in_file, tmp_path, data), outcome(listed, ForwardFile(Few(data, 999)))]
            assert results[0] == results[1]
            outcomes.add(results[0] is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"BZh91AY&SY", "bzip2"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
    ],
)
def test_compression_is_named(start, name):
    data = start + RANDOM[:2000]
    for file in (io.BytesIO(data), ForwardFile(Few(data, 100))):
        with pytest.raises(tarfile.TarError) as raised:
            open_tar(file)
        assert what_is_wrong(file, raised.value).startswith(f"is compressed with {name}")


def test_an_archive_of_nothing(tmp_path):
    assert in_file(tmp_path, archive()) == listed(ForwardFile(Few(archive(), 100))) == []


def test_headers_are_not_kept():
    data = archive(*((f"{number}.png", b"x") for number in range(100)))
    stream = ForwardFile(io.BytesIO(data))
    with open_tar(stream) as tar:
        for _ in members(tar, stream):
            assert len(tar.members) <= 1
