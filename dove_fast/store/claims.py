"""Who writes what: one job a store, or several that claim units, by locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from dove_fast.errors import StoreError
from dove_fast.store.layout import LOCK_NAME

__all__ = ["Claims"]

# Bytes of the lock file; locks lie behind its end, where nothing is written.
PRESENCE, MANIFEST, FIRST_UNIT = 0, 1, 16
# A file system without locks answers one of these.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
# A lock of another process.
HELD = {errno.EACCES, errno.EAGAIN}

# POSIX locks belong to the process, so two jobs in one process are told apart here.
_here: set[str] = set()
_guard = threading.Lock()


def _leave(name: str, file: int) -> None:
    with _guard:
        os.close(file)
        _here.discard(name)


class Claims:
    """The locks of one job on the store in `directory`, which exists.

    POSIX locks on the bytes of one empty file: they hold on network file systems that have them, and are gone with the
    process, however it ends. `alone` says that no other job is at work: true until `share`, for the first one.
    Raises `StoreError` if another job is at work and `join` is false, if one in this process is, or if the file system
    knows no locks.
    """

    def __init__(self, directory: Path, *, join: bool) -> None:
        self._name = os.path.realpath(directory)
        self.alone = False
        with _guard:
            if self._name in _here:
                raise StoreError(f"{directory} is being written by another job of this process")
            _here.add(self._name)
        try:
            self._file = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._enter(directory, join)
            except BaseException:
                os.close(self._file)
                raise
        except BaseException:
            with _guard:
                _here.discard(self._name)
            raise
        self._close = weakref.finalize(self, _leave, self._name, self._file)

    def _enter(self, directory: Path, join: bool) -> None:
        try:
            if self._lock(fcntl.LOCK_EX, PRESENCE):
                self.alone = True
                return
            if not join:
                raise StoreError(
                    f"{directory} is being written by another job; wait for it, choose another output, "
                    "or work beside it with --join"
                )
            # Waits while the first one makes the store.
            fcntl.lockf(self._file, fcntl.LOCK_SH, 1, PRESENCE)
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise StoreError(
                    f"{directory} lies on a file system without locks ({error.strerror}), so that two jobs could write "
                    "one unit; choose another output"
                ) from error
            raise

    def _lock(self, kind: int, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in HELD:
                return False
            raise
        return True

    def share(self) -> None:
        """Let others join: what only the first one does is done."""
        fcntl.lockf(self._file, fcntl.LOCK_SH, 1, PRESENCE)
        self.alone = False

    @contextlib.contextmanager
    def manifest(self) -> Iterator[None]:
        """Have the manifest to oneself for the length of the block, to read it and write it."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, MANIFEST)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, MANIFEST)

    def claim(self, unit: int) -> bool:
        """Take a unit; false if another process has it."""
        return self._lock(fcntl.LOCK_EX, FIRST_UNIT + unit)

    def release(self, unit: int) -> None:
        """Give a unit back."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, FIRST_UNIT + unit)

    def close(self) -> None:
        """Give everything back; also done when the object is gone."""
        self._close()
