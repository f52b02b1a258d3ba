"""The Parquet side of a shard: its records, and in the file's metadata what the unit came to."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dove_fast.atomic import replacing
from dove_fast.errors import StoreError
from dove_fast.store.layout import ERRORS_NAME, METADATA_KEY

if TYPE_CHECKING:
    import pyarrow

__all__ = ["InputError", "RecordRow", "Unit", "read_errors", "read_table", "read_unit", "write_records"]


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


def write_records(path: Path, rows: Sequence[RecordRow], unit: Unit) -> None:
    """Write a unit's records, by temporary file and rename; the same rows and unit give the same bytes."""
    import pyarrow
    import pyarrow.parquet

    metadata = {METADATA_KEY: json.dumps(asdict(unit), ensure_ascii=False)}
    schema = pyarrow.schema(
        [
            ("key", pyarrow.string()),
            ("source", pyarrow.string()),
            ("length", pyarrow.int32()),
            ("width", pyarrow.int32()),
            ("height", pyarrow.int32()),
            ("eos_probability", pyarrow.float32()),
            ("extra", pyarrow.string()),
            ("shard", pyarrow.int32()),
            ("row", pyarrow.int32()),
        ],
        metadata=metadata,
    )
    columns = {
        "key": [row.key for row in rows],
        "source": [row.source for row in rows],
        "length": [row.length for row in rows],
        "width": [row.width for row in rows],
        "height": [row.height for row in rows],
        "eos_probability": [row.eos_probability for row in rows],
        "extra": [None if row.extra is None else json.dumps(row.extra, ensure_ascii=False) for row in rows],
        "shard": [unit.shard] * len(rows),
        "row": list(range(len(rows))),
    }
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
        return [InputError(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {_first_line(error)}") from error


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
        raise StoreError(f"{path} is damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> Any:
    return (str(error).splitlines() or [type(error).__name__])[0]
