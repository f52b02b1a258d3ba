"""URLs, which fsspec opens: whatever its libraries raise comes as `OSError`."""

from __future__ import annotations

import contextlib
import errno
import io
import re
from collections.abc import Iterator
from typing import IO, cast

__all__ = ["URL", "opened_url"]

# Also a chain of file systems, such as simplecache::s3://bucket/00.tar.
URL = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class _UrlFile(io.RawIOBase):
    """A file of fsspec's, to read."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes:
        with _as_os_error(errno.EIO, "reading failed", self._url):
            return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _as_os_error(errno.EIO, "reading failed", self._url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextlib.contextmanager
def opened_url(url: str) -> Iterator[IO[bytes]]:
    """Open what a URL names, for the length of the block.

    Raises `OSError`: `FileNotFoundError` where that is known, and for a protocol or a package that is missing too.
    """
    # It comes with torch.
    import fsspec

    with _as_os_error(errno.EINVAL, "cannot be opened", url):
        file = fsspec.open(url, "rb").open()
    with contextlib.closing(file):
        # It has what is used of one.
        yield cast(IO[bytes], _UrlFile(file, url))


@contextlib.contextmanager
def _as_os_error(number: int, what: str, url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # File systems on a network raise what their libraries do.
        raise OSError(number, f"{what}: {type(error).__name__}: {error}", url) from error
