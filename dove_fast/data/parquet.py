"""Parquet files with a column of images as a job's input: units of rows, read a few at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dove_fast.data.listing import printable
from dove_fast.data.sources import URL, EncodedImage, SourceOptions, Unusable
from dove_fast.store.layout import hash_keys

__all__ = ["ParquetSource"]

# Names that images go by, in the order in which they are looked for.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
KEY_COLUMNS = ("key", "__key__")
# Rows in memory at a time.
ROWS = 64


class ParquetSource:
    """The rows of Parquet files, in order; a unit is `shard_size` rows of one file at most.

    Images are encoded, as bytes or, as Hugging Face's `datasets` writes them, in a struct with a field "bytes". The key
    is the key column's text, or the file's name without .parquet, a "/" and the row's number. Other columns pass
    through, but for bytes. Raises `FileNotFoundError`, and `ValueError` for files that are damaged, have other columns
    than the first, or no images.
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
        repeated = [name for name, count in Counter(map(_stem, self._files)).items() if count > 1]
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
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ValueError(f"{printable(name)} is damaged or no Parquet file: {_line(error)}") from None
        if name == self._files[0]:
            self._image = self._found_image(schema, name)
            self._key = self._found_key(schema, name)
        for column in filter(None, (self._image, self._key)):
            if column not in schema.names:
                raise ValueError(f"{printable(name)} has no column {column!r}, which {self._files[0]} has")
        return rows

    def _found_image(self, schema: Any, name: str) -> str:
        holding = [field.name for field in schema if _holds_bytes(field.type)]
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
        wanted = self._options.key_column
        if wanted is not None and wanted not in schema.names:
            raise ValueError(f"{printable(name)} has no column {wanted!r}; it has {schema.names}")
        return wanted or next((column for column in KEY_COLUMNS if column in schema.names), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the columns."""
        return {"kind": "parquet", "image_column": self._image, "key_column": self._key}

    def identity(self) -> str:
        """Return the hash of the files' names and rows, without their folders."""
        return hash_keys(f"{_stem(name)}:{rows}" for name, rows in zip(self._files, self._rows, strict=True))

    def keys(self) -> Iterable[str] | None:
        """Return every key where it follows from the row, else None: only reading tells."""
        if self._key is not None:
            return None
        return [
            f"{_stem(name)}/{row}" for name, rows in zip(self._files, self._rows, strict=True) for row in range(rows)
        ]

    def size_of(self, unit: int) -> int | None:
        """Return the rows of a unit."""
        _, first, end = self._units[unit]
        return end - first

    def read(self, unit: int) -> Iterator[EncodedImage | Unusable]:
        """Yield a unit's rows. Raises `OSError` for a file that is damaged further on."""
        import pyarrow

        number, first, end = self._units[unit]
        name = self._files[number]
        seen: set[str] = set()
        try:
            for row, values in self._between(name, first, end):
                item = self._row(name, row, values)
                if item.key in seen:
                    item = Unusable(item.key, item.source, "its key comes more than once")
                seen.add(item.key)
                yield item
        except pyarrow.ArrowException as error:
            raise OSError(f"{printable(name)} is damaged: {_line(error)}") from error

    def _between(self, name: str, first: int, end: int) -> Iterator[tuple[int, dict[str, Any]]]:
        with _opened(name) as file:
            start = 0
            groups: list[int] = []
            row = 0
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if start < end and start + count > first:
                    if not groups:
                        row = start
                    groups.append(group)
                start += count
            for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, use_threads=False):
                if row + batch.num_rows > first:
                    # Only these rows become Python's objects.
                    part = batch.slice(max(first - row, 0), end - max(first, row))
                    yield from enumerate(part.to_pylist(), max(first, row))
                row += batch.num_rows
                if row >= end:
                    return

    def _row(self, name: str, row: int, values: dict[str, Any]) -> EncodedImage | Unusable:
        source = printable(name)
        key = values.pop(self._key) if self._key is not None else f"{_stem(name)}/{row}"
        image = values.pop(self._image)
        if key is None:
            return Unusable(f"{_stem(name)}/{row}", source, "its key is null")
        if isinstance(image, dict):
            image = image.get("bytes")
        extra = {column: value for column, value in ((c, _json(v)) for c, v in values.items()) if value is not None}
        if not image:
            return Unusable(str(key), source, "no picture")
        return EncodedImage(str(key), source, image, extra or None)


def _opened(name: str) -> Any:
    import pyarrow.parquet

    if not URL.match(name):
        return pyarrow.parquet.ParquetFile(name, pre_buffer=False)
    import fsspec

    return pyarrow.parquet.ParquetFile(fsspec.open(name, "rb").open(), pre_buffer=False)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _json(value: Any) -> Any:
    """Return a value as JSON's types, None for what is no text, number, list or mapping, such as bytes."""
    if isinstance(value, bytes):
        return None
    try:
        return json.loads(json.dumps(value, default=str))
    except ValueError:
        return str(value)


def _stem(name: str) -> str:
    path = name.split("?")[0] if URL.match(name) else name
    return printable(os.path.basename(path).removesuffix(".parquet"))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
