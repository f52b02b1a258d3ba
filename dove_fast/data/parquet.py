"""Parquet files with a column of images as a job's input: units of rows, read a few at a time."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dove_fast.data.listing import printable
from dove_fast.data.sources import LEADS_OUT, EncodedImage, SourceOptions, Unusable, hash_keys, leads_out, stem
from dove_fast.data.urls import URL, opened_url
from dove_fast.errors import first_line

__all__ = ["ParquetSource"]

# Names that images go by, in the order in which they are looked for.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
KEY_COLUMNS = ("key", "__key__")
# Rows in memory at a time.
ROWS = 64
# Of a column's bytes at a time: a row group may be as large as its file.
BUFFER = 1 << 20


class ParquetSource:
    """The rows of Parquet files, in order; a unit is `shard_size` rows of one file at most.

    Images are encoded, as bytes or, as Hugging Face's `datasets` writes them, in a struct with a field "bytes". The key
    is the key column's text, or the file's name without .parquet, a "/" and the row's number. Other columns pass
    through: times as text (in UTC where they have a zone), NaN and infinity as null, without bytes and what cannot be
    read.

    Set aside with their reason: a row without image or key, one whose key leads out of its folder or was in the unit
    before, and rows of a local file that are damaged. Raises `FileNotFoundError`, and `ValueError` for files that
    cannot be opened as Parquet, have other columns than the first, or no images.
    """

    def __init__(self, files: Sequence[str], options: SourceOptions) -> None:
        self._files = list(files)
        self._options = options
        self.shard_size: int | None = options.shard_size
        rows = [self._check(name) for name in self._files]
        # Each unit's file, first row and end.
        self._units = [
            (number, first, min(first + options.shard_size, count))
            for number, count in enumerate(rows)
            for first in range(0, count, options.shard_size)
        ]
        if not self._units:
            raise ValueError(f"no rows in {printable(self._files[0])}")
        self._rows = rows
        self.units = len(self._units)
        self.inputs: int | None = sum(rows)
        self.unique_keys = self._key is None
        repeated = [name for name, count in Counter(map(stem, self._files)).items() if count > 1]
        if self._key is None and repeated:
            raise ValueError(f"files must have different names to make keys of, {repeated[0]!r} comes twice")

    def _check(self, name: str) -> int:
        """Return a file's rows; the first file decides what the columns are."""
        import pyarrow

        try:
            with _opened(name) as file:
                schema, rows = file.schema_arrow, int(file.metadata.num_rows)
        except FileNotFoundError:
            raise FileNotFoundError(f"no such input: {printable(name)}") from None
        except (OSError, ImportError, pyarrow.ArrowException) as error:
            raise ValueError(f"{printable(name)} is damaged or no Parquet file: {first_line(error)}") from None
        if name == self._files[0]:
            self._image = self._found_image(schema, name)
            self._key = self._found_key(schema, name)
        first = printable(self._files[0])
        if self._image not in _holding(schema):
            # One of text would be taken for paths.
            raise ValueError(f"{printable(name)} has no column {self._image!r} of bytes, which {first} has")
        if self._key is not None and self._key not in schema.names:
            raise ValueError(f"{printable(name)} has no column {self._key!r}, which {first} has")
        return rows

    def _found_image(self, schema: Any, name: str) -> str:
        holding = _holding(schema)
        wanted = self._options.image_column
        if wanted is not None:
            if wanted not in holding:
                raise ValueError(f"{printable(name)} has no column {wanted!r} of bytes; those of bytes: {holding}")
            return wanted
        named = [column for column in IMAGE_COLUMNS if column in holding]
        if named or len(holding) == 1:
            return (named or holding)[0]
        raise ValueError(
            f"{printable(name)} has no column that is surely the images (--image-column names it); of bytes: {holding}"
        )

    def _found_key(self, schema: Any, name: str) -> str | None:
        import pyarrow.types as types

        wanted = self._options.key_column
        if wanted is not None and wanted not in schema.names:
            raise ValueError(f"{printable(name)} has no column {wanted!r}; it has {schema.names}")
        able = [field.name for field in schema if field.name != self._image and not types.is_nested(field.type)]
        if wanted is not None and wanted not in able:
            raise ValueError(f"{printable(name)}: column {wanted!r} cannot hold keys; those that can: {able}")
        return wanted or next((column for column in KEY_COLUMNS if column in able), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the columns."""
        return {"kind": "parquet", "image_column": self._image, "key_column": self._key}

    def identity(self) -> str:
        """Return the hash of the files' names and rows, without their folders."""
        return hash_keys(f"{stem(name)}:{rows}" for name, rows in zip(self._files, self._rows, strict=True))

    def keys(self) -> Iterable[str] | None:
        """Return every key where it follows from the row, else None: only reading tells."""
        if self._key is not None:
            return None
        return [
            f"{stem(name)}/{row}" for name, rows in zip(self._files, self._rows, strict=True) for row in range(rows)
        ]

    def size_of(self, unit: int) -> int | None:
        """Return the rows of a unit."""
        _, first, end = self._units[unit]
        return end - first

    def read(self, unit: int) -> Iterator[EncodedImage | Unusable]:
        """Yield a unit's rows. Raises `OSError` where the medium fails."""
        import pyarrow

        number, first, end = self._units[unit]
        name = self._files[number]
        seen: set[str] = set()
        try:
            for row, values in self._between(name, first, end):
                item = values if isinstance(values, Unusable) else self._item(name, row, values)
                if isinstance(item, EncodedImage) and item.key in seen:
                    item = Unusable(item.key, item.source, "its key comes more than once")
                if isinstance(item, EncodedImage):
                    seen.add(item.key)
                yield item
        except pyarrow.ArrowException as error:
            if isinstance(error, MemoryError):
                raise
            raise OSError(errno.EIO, f"the file is damaged: {first_line(error)}", printable(name)) from error

    def _between(self, name: str, first: int, end: int) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
        import pyarrow

        with _opened(name) as file:
            start = 0
            for group in range(file.metadata.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                row = max(first, start)
                if row < min(end, stop):
                    try:
                        for values in _rows(file, group, row - start, min(end, stop) - start):
                            yield row, values
                            row += 1
                    except (OSError, pyarrow.ArrowException) as error:
                        # What the system says comes with a number. A file from elsewhere may be whole the next time.
                        if isinstance(error, MemoryError) or getattr(error, "errno", None) or URL.match(name):
                            raise
                        reason = f"the file is damaged here: {first_line(error)}"
                        for lost in range(row, min(end, stop)):
                            yield lost, Unusable(f"{stem(name)}/{lost}", printable(name), reason)
                start = stop

    def _item(self, name: str, row: int, values: dict[str, Any]) -> EncodedImage | Unusable:
        source = printable(name)
        place = f"{stem(name)}/{row}"
        key = place if self._key is None else _text(values.pop(self._key))
        if key is None:
            return Unusable(place, source, "its key is null, empty or no text")
        if leads_out(key):
            return Unusable(key, source, LEADS_OUT)
        image = values.pop(self._image)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not image:
            return Unusable(key, source, "no picture")
        plain = {column: _plain(value) for column, value in values.items()}
        extra = {column: value for column, value in plain.items() if value is not None}
        return EncodedImage(key, source, image, extra or None)


@contextlib.contextmanager
def _opened(name: str) -> Iterator[Any]:
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        if URL.match(name):
            source: Any = stack.enter_context(opened_url(name))
        else:
            # As bytes, for a file's name need not be UTF-8.
            source = stack.enter_context(pyarrow.OSFile(os.fsencode(name)))
        yield stack.enter_context(
            pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True)
        )


def _rows(file: Any, group: int, first: int, end: int) -> Iterator[dict[str, Any]]:
    """Yield the rows from `first` to `end` of a row group."""
    row = 0
    for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], use_threads=False):
        if row + batch.num_rows > first:
            # Only these rows become Python's objects.
            part = batch.slice(max(first - row, 0), end - max(first, row))
            columns = [_values(column) for column in part.columns]
            for values in zip(*columns, strict=True):
                yield dict(zip(part.schema.names, values, strict=True))
        row += batch.num_rows
        if row >= end:
            return


def _values(column: Any) -> list[Any]:
    """Return a column as Python's objects; None for a text that is not UTF-8, a date beyond Python's, and the like."""
    import pyarrow

    def value(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except (ValueError, OverflowError, pyarrow.ArrowInvalid):
            return None

    try:
        # Times without Python's limits, and without Pandas and time zones, which are not everywhere the same.
        if pyarrow.types.is_timestamp(column.type) and column.type.tz is not None:
            texts = column.cast(pyarrow.timestamp(column.type.unit)).cast(pyarrow.string()).to_pylist()
            return [text and f"{text}Z" for text in texts]
        if pyarrow.types.is_temporal(column.type):
            column = column.cast(pyarrow.string())
        return list(column.to_pylist())
    except (ValueError, OverflowError, pyarrow.ArrowInvalid):
        return [value(scalar) for scalar in column]


def _holding(schema: Any) -> list[str]:
    return [field.name for field in schema if _holds_bytes(field.type)]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _text(key: Any) -> str | None:
    """Return a key as text, None for one that names nothing."""
    try:
        text = key.decode() if isinstance(key, bytes) else "" if key is None else str(key)
    except UnicodeDecodeError:
        return None
    return text if text.strip("/.") and "\0" not in text else None


def _plain(value: Any) -> Any:
    """Return a value as JSON's types: mappings without bytes, None for bytes elsewhere, text for what JSON has not."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
