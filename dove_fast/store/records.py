"""The Parquet side of a shard: its records, and in the file's metadata what the unit came to."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dove_fast.atomic import replacing
from dove_fast.errors import StoreError, first_line
from dove_fast.store.layout import ERRORS_NAME, METADATA_KEY

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "RECORD_COLUMNS",
    "InputError",
    "RecordRow",
    "Unit",
    "read_errors",
    "read_table",
    "read_unit",
    "record_columns",
    "write_records",
]


@dataclass(frozen=True)
class RecordRow:
    """What a store keeps of one image beside its tokens; width and height are the upright original's.

    `extra`: what came with the image (labels, captions, boxes), None for nothing.
    """

    key: str
    source: str
    length: int
    width: int
    height: int
    eos_probability: float
    extra: dict[str, Any] | None = None


@dataclass(frozen=True)
class InputError:
    """An input that was set aside, and why."""

    key: str
    source: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """What a finished unit came to: counts, its safetensors file's size and SHA-256, and the inputs it set aside.

    `squared_error` and `squared_norm`: sums over all values, of what int8 lost and of what there was; 0 where tokens
    are kept as they are.
    """

    shard: int
    store: str
    records: int
    tokens: int
    tokens_bytes: int
    tokens_sha256: str
    errors: tuple[InputError, ...]
    squared_error: float = 0.0
    squared_norm: float = 0.0


# What a record tells of its image, and how Arrow calls the types. `extra` is JSON.
RECORD_COLUMNS = {
    "key": "string",
    "source": "string",
    "length": "int32",
    "width": "int32",
    "height": "int32",
    "eos_probability": "float32",
    "extra": "string",
}


class Record(Protocol):
    """What has the attributes that `RECORD_COLUMNS` names."""

    @property
    def extra(self) -> dict[str, Any] | None:
        """What came with the image."""
        ...


def record_columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Return the columns of `RECORD_COLUMNS`."""
    columns = {name: [getattr(record, name) for record in records] for name in RECORD_COLUMNS}
    columns["extra"] = [None if extra is None else json.dumps(extra, ensure_ascii=False) for extra in columns["extra"]]
    return columns


def write_records(path: Path, rows: Sequence[RecordRow], unit: Unit) -> None:
    """Write a unit's records, by temporary file and rename; the same rows and unit give the same bytes."""
    import pyarrow
    import pyarrow.parquet

    metadata = {METADATA_KEY: json.dumps(asdict(unit), ensure_ascii=False)}
    schema = pyarrow.schema(
        [*RECORD_COLUMNS.items(), ("shard", "int32"), ("row", "int32")],
        metadata=metadata,
    )
    columns = {**record_columns(rows), "shard": [unit.shard] * len(rows), "row": list(range(len(rows)))}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), buffer, write_page_checksum=True)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read_unit(path: Path) -> Unit | None:
    """Return what the unit with these records came to, None if the file is missing or damaged: the unit is not done."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
        content = json.loads(metadata[METADATA_KEY.encode()])
        errors = tuple(InputError(**error) for error in content.pop("errors"))
        return Unit(**content, errors=errors)
    except (OSError, pyarrow.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def read_errors(directory: Path) -> list[InputError]:
    """Return what a store's errors.jsonl lists; nothing where there is none. Raises `StoreError` for a damaged one."""
    path = directory / ERRORS_NAME
    try:
        # Not splitlines(), which also breaks at characters that keys may hold.
        return [InputError(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        return []
    except (OSError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {first_line(error)}") from error


def read_table(path: Path, columns: list[str] | None = None) -> pyarrow.Table:
    """Read a unit's records, all columns or those named.

    Raises `StoreError` that names the file if it is missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # No threads: a DataLoader's workers are forked, and Arrow's pool does not survive that everywhere.
        with pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            return file.read(columns, use_threads=False).combine_chunks()
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except (OSError, pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as error:
        raise StoreError(f"{path} is damaged: {first_line(error)}") from error
