"""Uncompressed tar archives, read from their start to their end: the files that may belong to WebDataset samples."""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from dove_fast.data.listing import printable

__all__ = ["LINK", "MEMBER", "SPARSE", "ForwardFile", "Member", "content", "members", "open_tar", "what_is_wrong"]

# A sample's name and its member's ending: the path is split at the first dot of the base name.
MEMBER = re.compile(r"((?:.*/)?[^./]+)(\.[^/]*)", re.DOTALL)

# Why a member's content is not read. A link's is elsewhere, perhaps behind it, where a stream cannot be followed.
LINK = "a link in the archive, which is not followed"
SPARSE = "a sparse file in the archive, which is not read"

# How compressed files start; no tar archive does, for it starts with the name of its first file.
COMPRESSED = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ\x00": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"\x04\x22\x4d\x18": "lz4",
}
# Enough to go back to the header that was read last, and to the start of a short archive.
HISTORY = 1 << 16
# What is asked of a stream at once: a damaged size must not become that much memory.
PIECE = 1 << 20


@dataclass(frozen=True)
class Member:
    """A member of a shard: its name up to the first dot, the rest in small letters, and its header.

    `unread`: why it has no content, "" where it has.
    """

    name: str
    ending: str
    header: tarfile.TarInfo
    unread: str = ""


class ForwardFile:
    """A stream that cannot seek (a pipe, a download) as a file that can, a little back and any way forward.

    `ended`: whether its end was met.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._history = bytearray()
        self._end = 0
        self._at = 0
        self.ended = False

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, position: int) -> int:
        """Go to `position`. Raises `OSError` for one that is further back than what is kept."""
        if position < self._end - len(self._history):
            raise OSError(f"a stream cannot go back from byte {self._end} to {position}")
        while self._end < position and self._fill(min(position - self._end, HISTORY)):
            pass
        # Beyond the end, as in a file.
        self._at = position
        return position

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        parts = []
        if self._at < self._end:
            first = len(self._history) - (self._end - self._at)
            parts.append(bytes(self._history[first : first + size]))
        missing = size - sum(map(len, parts))
        while missing > 0 and (part := self._fill(min(missing, PIECE))):
            parts.append(part)
            missing -= len(part)
        result = b"".join(parts)
        self._at += len(result)
        return result

    def _fill(self, size: int) -> bytes:
        part = self._stream.read(size)
        self.ended = not part
        self._end += len(part)
        self._history += part[-HISTORY:]
        del self._history[:-HISTORY]
        return part


def open_tar(file: IO[bytes] | ForwardFile) -> tarfile.TarFile:
    """Open an uncompressed archive. Raises `tarfile.TarError`; `what_is_wrong` then says it in words."""
    with _as_tar_error():
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # type: ignore[call-overload]


@contextlib.contextmanager
def _as_tar_error() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError):
        raise
    except (ValueError, OverflowError) as error:
        # Numbers and texts in extended headers, and sizes beyond any file's.
        raise tarfile.ReadError(f"a header that cannot be read: {error}") from error


def what_is_wrong(file: IO[bytes] | ForwardFile, error: Exception) -> str:
    """Say why `file` could not be read as an archive, as the rest of a sentence."""
    try:
        file.seek(0)
        start = file.read(16)
    except OSError:
        # A stream, far behind its start.
        start = b""
    for mark, name in COMPRESSED.items():
        if re.match(mark, start):
            return f"is compressed with {name}, but samples are read from its middle: unpack it to a plain .tar"
    return f"is damaged, not complete or no tar archive: {error}; fetch it again or leave it out"


def members(archive: tarfile.TarFile, file: IO[bytes] | ForwardFile) -> Iterator[Member]:
    """Yield what may belong to a sample: files, links, sparse files; none without a dot in its name or with it first.

    Raises `tarfile.TarError` if `file` does not hold all of them, or does not end as an archive ends.
    """
    length = None if isinstance(file, ForwardFile) else os.fstat(file.fileno()).st_size
    while (header := _next(archive)) is not None:
        # The archive would keep every header that it has read.
        archive.members.clear()  # type: ignore[attr-defined]
        unread = LINK if header.islnk() or header.issym() else SPARSE if header.issparse() else ""
        # The size of a sparse file is not what it has here.
        end = header.offset_data + header.size if header.isreg() and not unread else 0
        if (header.size < 0 and unread != SPARSE) or (length is not None and end > length):
            raise tarfile.ReadError(f"{printable(header.name)} does not end within the shard")
        match = MEMBER.fullmatch(header.name)
        if match is not None and (header.isreg() or unread):
            yield Member(match[1], match[2].lower(), header, unread)
    # tarfile ends in silence at a header that it cannot read; a whole archive ends with a block of zeros.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"neither a file's header nor the end of an archive at byte {archive.offset}")


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    with _as_tar_error():
        return archive.next()


def content(archive: tarfile.TarFile, header: tarfile.TarInfo) -> IO[bytes]:
    """Return a member as a file of its own. Raises `tarfile.ReadError` for one that has no content."""
    file = archive.extractfile(header)
    if file is None:
        raise tarfile.ReadError(f"{printable(header.name)} has no content")
    return file
