"""What a job reads: units of images with fixed boundaries, from files, WebDataset shards or Parquet files."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from dove_fast.data.listing import ImageInput, list_inputs, printable
from dove_fast.data.urls import URL

__all__ = [
    "LEADS_OUT",
    "EncodedImage",
    "FileSource",
    "Source",
    "SourceOptions",
    "Unusable",
    "hash_keys",
    "leads_out",
    "list_shards",
    "open_source",
    "stem",
]

TAR, PARQUET = ".tar", ".parquet"
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
PIPE = "pipe:"
# Why an input is set aside whose key `leads_out`.
LEADS_OUT = "its key leads out of its folder"


@dataclass(frozen=True)
class EncodedImage:
    """An image that is not decoded yet: the path of its file, or its bytes.

    `source`: where it came from, as text. `extra`: what came with it, as JSON's types; None for nothing.
    """

    key: str
    source: str
    content: str | bytes
    extra: dict[str, Any] | None = None


@dataclass(frozen=True)
class Unusable:
    """An input that is known to be of no use before it is decoded, and why."""

    key: str
    source: str
    reason: str


def hash_keys(keys: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal, over keys in order."""
    digest = hashlib.sha256()
    for key in keys:
        encoded = key.encode()
        # The length in front: ["ab", "c"] and ["a", "bc"] differ.
        digest.update(b"%d:" % len(encoded) + encoded)
    return digest.hexdigest()


def leads_out(key: str) -> bool:
    """Tell whether a file named by `key` would lie outside the folder that it is written to, or cannot be."""
    path = PurePosixPath(key)
    return path.is_absolute() or ".." in path.parts or "\0" in key


def stem(shard: str) -> str:
    """Return a shard's name: the base name without .tar or .parquet, of a pipe the command, which is no path."""
    if shard.startswith(PIPE):
        return printable(shard).replace("/", "_")
    path = shard.split("?")[0] if URL.match(shard) else shard
    name = os.path.basename(path)
    return printable(name.removesuffix(TAR if name.endswith(TAR) else PARQUET))


class Source(Protocol):
    """Images in units whose boundaries depend on the input and `shard_size` alone.

    `units`: how many. `inputs`: how many images, None where only reading tells. `shard_size`: inputs a unit at most,
    None where the input's own shards are the units. `unique_keys`: whether no two inputs can have one key.
    """

    units: int
    inputs: int | None
    shard_size: int | None
    unique_keys: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the kind of source and how it is read, for a manifest."""
        ...

    def identity(self) -> str:
        """Return a hash of what the units hold, as far as that is known without reading them."""
        ...

    def keys(self) -> Iterable[str] | None:
        """Return every input's key in order, None where only reading tells."""
        ...

    def size_of(self, unit: int) -> int | None:
        """Return the inputs of a unit, None where only reading tells."""
        ...

    def read(self, unit: int) -> Iterator[EncodedImage | Unusable]:
        """Yield the inputs of a unit, in order. Raises `OSError` where the medium fails."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """How `open_source` reads.

    `shard_size`: inputs a unit; WebDataset shards are units as they are. `prefix_keys`: put the shard's name before the
    keys of its samples, for shards that number their samples alike. `image_column`, `key_column`: of Parquet files;
    None finds the images by name and type, and takes "key" or "__key__", or else the file's name and the row.
    """

    shard_size: int = 1024
    prefix_keys: bool = False
    image_column: str | None = None
    key_column: str | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for a shard size below 1."""
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {self.shard_size}")


class FileSource:
    """Image files, as `list_inputs` lists them."""

    def __init__(self, inputs: list[ImageInput], shard_size: int) -> None:
        self._inputs = inputs
        self.shard_size: int | None = shard_size
        self.inputs: int | None = len(inputs)
        self.units = -(-len(inputs) // shard_size)
        self.unique_keys = True
        self._size = shard_size

    def to_dict(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": "files"}

    def identity(self) -> str:
        """Return the hash of the keys."""
        return hash_keys(item.key for item in self._inputs)

    def keys(self) -> Iterable[str] | None:
        """Return every key."""
        return [item.key for item in self._inputs]

    def size_of(self, unit: int) -> int | None:
        """Return the inputs of a unit."""
        return len(self._unit(unit))

    def read(self, unit: int) -> Iterator[EncodedImage | Unusable]:
        """Yield a unit's files; nothing is opened."""
        for item in self._unit(unit):
            yield EncodedImage(item.key, item.source, item.path)

    def _unit(self, unit: int) -> list[ImageInput]:
        return self._inputs[unit * self._size : (unit + 1) * self._size]


def open_source(source: str | os.PathLike[str], options: SourceOptions | None = None) -> Source:
    """Find out what `source` stands for.

    - WebDataset shards: a .tar file; a text with ranges, "train-{000..146}.tar"; a pattern, "shards/*.tar"; a folder
      that holds .tar files; "pipe:command", whose output is a shard; a URL that fsspec opens; or a text file of these,
      but for folders.
    - Parquet files with a column of images: the same, ending in .parquet, but for "pipe:".
    - Anything else is what `list_inputs` makes of it: an image, a folder of images, a text file of paths.

    Raises `FileNotFoundError` for no such path, `ValueError` for what is none of these or several at once, for two
    inputs with one key, and for a Parquet file without images.
    """
    options = options or SourceOptions()
    text = os.fspath(source)
    shards = list_shards(text)
    if shards is None:
        _refuse("Parquet files", image_column=options.image_column, key_column=options.key_column)
        _refuse("WebDataset shards", prefix_keys=options.prefix_keys)
        inputs = list_inputs(text)
        strange = next((item.key for item in inputs if _kind(item.path)), None)
        if strange is not None:
            raise ValueError(f"{printable(text)} lists images, but also {strange!r}; list one kind")
        return FileSource(inputs, options.shard_size)
    if all(_kind(shard) == PARQUET for shard in shards):
        from dove_fast.data.parquet import ParquetSource

        _refuse("WebDataset shards", prefix_keys=options.prefix_keys)
        return ParquetSource(shards, options)
    from dove_fast.data.shards import ShardSource

    _refuse("Parquet files", image_column=options.image_column, key_column=options.key_column)
    return ShardSource(shards, prefix_keys=options.prefix_keys)


def _refuse(what: str, **options: object) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise ValueError(f"{' and '.join(given)} {verb} for {what}, which the input has none of")


def _kind(text: str) -> str | None:
    """Return which kind of shard a text names, None for none."""
    if text.startswith(PIPE):
        return TAR
    # A URL's query is no part of the name.
    name = text.split("?")[0] if URL.match(text) else text
    return next((ending for ending in (TAR, PARQUET) if name.lower().endswith(ending)), None)


def list_shards(text: str) -> list[str] | None:
    """Return the shards that a text stands for, None if it stands for images."""
    if os.path.isdir(text):
        shards = _in_folder(text)
        return shards or None
    if _kind(text) is None:
        return _listed(text)
    return list(_expanded(text))


def _in_folder(folder: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, name) for name in files if _kind(name) and not name.startswith(".")]
    kinds = {_kind(name) for name in found}
    if len(kinds) > 1:
        raise ValueError(f"{printable(folder)} holds both .tar and .parquet files; name one kind, as '{folder}/*.tar'")
    if found:
        try:
            images = len(list_inputs(folder))
        except ValueError:
            images = 0
        if images:
            raise ValueError(
                f"{printable(folder)} holds images and {min(kinds, key=str)} files; name the shards by a pattern, "
                "or the images in a text file"
            )
    return sorted(found)


def _listed(path: str) -> list[str] | None:
    """Return the shards in a text file of them, None if it is anything else."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    lines = [line.strip() for line in start.decode("utf-8-sig", "replace").split("\n")]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if b"\0" in start or _kind(first) is None:
        return None
    # As list_inputs reads a list: names need not be UTF-8, and only "\n" ends a line.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as text:
        names = [line.strip() for line in text if line.strip() and not line.strip().startswith("#")]
    strange = [name for name in names if _kind(name) != _kind(first)]
    if strange:
        raise ValueError(f"{printable(path)} lists shards like {first!r}, but also {strange[0]!r}; list one kind")
    folder = os.path.dirname(path)
    return [shard for name in names for shard in _expanded(name, folder)]


def _expanded(text: str, folder: str = "") -> Iterator[str]:
    """Yield what one text names; relative paths start at `folder`."""
    if text.startswith(PIPE) or URL.match(text):
        yield from expand_ranges(text)
        return
    # A file may have braces or stars in its name.
    if os.path.isfile(os.path.join(folder, text)):
        yield os.path.join(folder, text)
        return
    for name in expand_ranges(text):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            yield path
            continue
        # Not the folder's name, which may have brackets.
        matches = sorted(glob.glob(name, root_dir=folder or None)) if glob.has_magic(name) else []
        found = [file for file in (os.path.join(folder, match) for match in matches) if os.path.isfile(file)]
        if not found:
            what = "input file" if os.path.exists(path) else "input"
            raise FileNotFoundError(f"no such {what}: {printable(path)}")
        yield from found


def expand_ranges(text: str) -> Iterator[str]:
    """Yield what the ranges of numbers in `text` stand for; the last one runs fastest.

    "{08..11}" is 08, 09, 10, 11: both ends are included, padded with zeros to the width of the first.
    Raises `ValueError` for a range that runs backwards.
    """
    match = RANGE.search(text)
    if match is None:
        yield text
        return
    first, last = match.groups()
    if int(last) < int(first):
        raise ValueError(f"a range must not run backwards, got {match[0]} in {printable(text)}")
    for number in range(int(first), int(last) + 1):
        for rest in expand_ranges(text[match.end() :]):
            yield f"{text[: match.start()]}{number:0{len(first)}d}{rest}"
