"""WebDataset shards as a job's input: each is a unit, read once from its start, also from a pipe or a URL."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import tarfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from dove_fast.data.formats import SUFFIXES
from dove_fast.data.listing import printable
from dove_fast.data.sources import LEADS_OUT, PIPE, EncodedImage, Unusable, hash_keys, leads_out, stem
from dove_fast.data.tar import ForwardFile, Member, content, members, open_tar, what_is_wrong
from dove_fast.data.urls import URL, opened_url

__all__ = ["MAX_IMAGE_BYTES", "ShardSource"]

# A member is read into memory whole: what is larger than this is no picture that anyone would decode.
MAX_IMAGE_BYTES = 1 << 28
# What comes with a picture and is larger is not passed through.
MAX_EXTRA_BYTES = 1 << 20
# Brackets in brackets: what is nested deeper may be read and then not written.
MAX_EXTRA_DEPTH = 64
# Seconds for a command to end whose output has ended.
PATIENCE = 5.0


class ShardSource:
    """WebDataset shards, in the order given; one shard is one unit.

    Files that are one after the other in a shard and have the same path up to the first dot of the base name are one
    sample. Its key is that path, with `prefix_keys` behind the shard's name and a "/"; its picture the one file with an
    ending of `SUFFIXES`. The others pass through by their endings: json as what it holds, others as text where they are
    UTF-8, up to `MAX_EXTRA_BYTES`; what is neither is left out. NaN and infinity in json become null.

    Set aside with their reason: a sample without a picture or with several, with a link or a sparse file, one whose key
    leads out of its folder or was in the shard before, and what lies behind damage in a local shard. A "pipe:" command
    that fails, and a medium that does, raise `OSError` instead: what they would have given is not lost.
    """

    def __init__(self, shards: Sequence[str], *, prefix_keys: bool) -> None:
        self._shards = list(shards)
        self._prefix = prefix_keys
        self.units = len(self._shards)
        self.inputs: int | None = None
        self.shard_size: int | None = None
        names = [stem(shard) for shard in self._shards]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        self.unique_keys = prefix_keys
        if prefix_keys and repeated:
            raise ValueError(f"shards must have different names to prefix keys with, {repeated[0]!r} comes twice")

    def to_dict(self) -> dict[str, Any]:
        """Return the kind, and whether keys have prefixes."""
        return {"kind": "webdataset", "prefix_keys": self._prefix}

    def identity(self) -> str:
        """Return the hash of the shards' names, without their folders."""
        return hash_keys(stem(shard) for shard in self._shards)

    def keys(self) -> Iterable[str] | None:
        """Return None: only reading tells."""
        return None

    def size_of(self, unit: int) -> int | None:
        """Return None: only reading tells."""
        return None

    def read(self, unit: int) -> Iterator[EncodedImage | Unusable]:
        """Yield a shard's samples."""
        shard = self._shards[unit]
        source = printable(shard)
        seen: set[str] = set()
        damage: list[tarfile.TarError] = []
        with _opened(shard) as file:
            try:
                with open_tar(file) as archive:
                    whole = _until_damage(members(archive, file), damage)
                    for name, files in itertools.groupby(whole, key=lambda file: file.name):
                        key = f"{stem(shard)}/{printable(name)}" if self._prefix else printable(name)
                        sample = _sample(archive, key, source, files)
                        if damage and isinstance(sample, Unusable):
                            # What it lacks may lie behind the damage.
                            break
                        if key in seen:
                            sample = Unusable(key, source, "its key comes more than once in the shard")
                        seen.add(key)
                        yield sample
            except tarfile.TarError as error:
                damage.append(error)
            if damage and isinstance(file, ForwardFile):
                # A stream that ended early may be whole the next time.
                raise OSError(errno.EIO, f"the stream {what_is_wrong(file, damage[0])}", source) from damage[0]
            if damage:
                yield Unusable(stem(shard), source, f"the shard {what_is_wrong(file, damage[0])}")


def _until_damage(found: Iterable[Member], damage: list[tarfile.TarError]) -> Iterator[Member]:
    """Yield members up to damage, and put that into `damage`: raised here, it would cost the sample before it."""
    try:
        yield from found
    except tarfile.TarError as error:
        damage.append(error)


@contextlib.contextmanager
def _opened(shard: str) -> Iterator[IO[bytes] | ForwardFile]:
    if shard.startswith(PIPE):
        with _piped(shard.removeprefix(PIPE)) as stream:
            yield stream
    elif URL.match(shard):
        with opened_url(shard) as stream:
            yield ForwardFile(stream)
    else:
        with open(shard, "rb") as file:
            yield file


@contextlib.contextmanager
def _piped(command: str) -> Iterator[ForwardFile]:
    # A group of its own, for the shell may have started others.
    with subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        if process.stdout is None:
            raise OSError(errno.EPIPE, "no output to read", command)
        # Also at the interpreter's exit, when a thread may still be waiting for output.
        kill = weakref.finalize(process, _kill_group, process.pid)
        stream = ForwardFile(process.stdout)
        failed = "the command ended with exit code"
        try:
            yield stream
        except OSError as error:
            # If the command failed, that is why its output is not whole.
            code = _exit_code(process) if stream.ended else None
            kill()
            if code:
                raise OSError(errno.EIO, f"{failed} {code}", printable(PIPE + command)) from error
            raise
        except BaseException:
            kill()
            raise
        # What follows the archive, so that the command can end.
        while process.stdout.read(1 << 16):
            pass
        code = process.wait()
        kill.detach()
        if code:
            raise OSError(errno.EIO, f"{failed} {code}", printable(PIPE + command))


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return None


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _sample(archive: tarfile.TarFile, key: str, source: str, files: Iterable[Member]) -> EncodedImage | Unusable:
    picture: bytes | None = None
    extra: dict[str, Any] = {}
    reason = ""
    # In order, as a stream has to be read.
    for file in files:
        if file.unread:
            reason = file.unread
        elif file.ending in SUFFIXES:
            if picture is not None:
                reason = "more than one picture"
            elif file.header.size > MAX_IMAGE_BYTES:
                reason = f"a picture of {file.header.size} bytes, more than {MAX_IMAGE_BYTES}"
            else:
                picture = content(archive, file.header).read()
        elif file.header.size <= MAX_EXTRA_BYTES:
            value = _passed_through(file.ending, content(archive, file.header).read())
            if value is not None:
                extra[printable(file.ending[1:])] = value
    if not reason and picture is None:
        reason = "no picture"
    if leads_out(key):
        reason = LEADS_OUT
    if reason or picture is None:
        return Unusable(key, source, reason)
    return EncodedImage(key, source, picture, extra or None)


def _passed_through(ending: str, data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
        if not ending.endswith(".json"):
            return text
        value = json.loads(text, parse_constant=lambda _: None)
        # Half a surrogate pair, from an escape, could not be written again.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return None if _deeper(value, MAX_EXTRA_DEPTH) else value
    except (ValueError, RecursionError):
        return None


def _deeper(value: Any, depth: int) -> bool:
    """Tell whether lists and mappings are in one another more than `depth` times."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_deeper(item, depth - 1) for item in items)
