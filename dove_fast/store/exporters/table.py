"""A store as tables, one row an image: Parquet files, or Arrow files in the streaming format.

    the columns of a store's records (`RECORD_COLUMNS`); extra is null where there is none
    tokens   list of fixed-size lists: (length, d) float32 or float16
    codes    list of uint16, (N,), where the store has them

The streaming format is what `datasets.Dataset.from_file` maps into memory; the other one, Arrow's IPC file, it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from dove_fast.store.exporters import ExportFile, OnImage, code_array, ends_with, shards, token_array
from dove_fast.store.reader import TokenRecord, TokenStore
from dove_fast.store.records import RECORD_COLUMNS, record_columns

if TYPE_CHECKING:
    import pyarrow

__all__ = ["arrow_files", "parquet_files"]

# What is gathered before it is written, so that memory does not grow with the file: values of tokens and codes
# (16 MiB in fp32), and images. A batch is a Parquet row group too.
BATCH_VALUES = 1 << 22
BATCH_IMAGES = 1024
PARQUET_END = b"PAR1"
# The streaming format's end: a marker and a length of 0.
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


def parquet_files(store: TokenStore, shard_size: int) -> Iterator[ExportFile]:
    """Yield the Parquet files of a store, `shard_size` images each."""
    for name, rows in shards(len(store), shard_size):
        write = partial(_write_parquet, store, rows)
        yield ExportFile(f"{name}.parquet", rows, write, partial(ends_with, end=PARQUET_END))


def arrow_files(store: TokenStore, shard_size: int) -> Iterator[ExportFile]:
    """Yield the Arrow files of a store, in the streaming format, `shard_size` images each."""
    for name, rows in shards(len(store), shard_size):
        write = partial(_write_arrow, store, rows)
        yield ExportFile(f"{name}.arrow", rows, write, partial(ends_with, end=ARROW_END))


def _write_parquet(store: TokenStore, rows: range, file: BinaryIO, on_image: OnImage) -> None:
    import pyarrow.parquet

    # Tokens do not repeat, a dictionary of them would be built for nothing.
    dictionaries = ["source", *(["codes.list.element"] if store.has_codes else [])]
    schema = _schema(store)
    with pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=dictionaries, write_page_checksum=True) as writer:
        for batch in _batches(store, rows, schema, on_image):
            writer.write_batch(batch)


def _write_arrow(store: TokenStore, rows: range, file: BinaryIO, on_image: OnImage) -> None:
    import pyarrow

    schema = _schema(store)
    with pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in _batches(store, rows, schema, on_image):
            writer.write_batch(batch)


def _schema(store: TokenStore) -> pyarrow.Schema:
    import pyarrow

    value = pyarrow.float16() if store.dtype == torch.float16 else pyarrow.float32()
    fields = [
        *RECORD_COLUMNS.items(),
        ("tokens", pyarrow.list_(pyarrow.list_(value, int(store.manifest["settings"]["width"])))),
    ]
    if store.has_codes:
        fields.append(("codes", pyarrow.list_(pyarrow.uint16())))
    return pyarrow.schema(fields)


def _batches(
    store: TokenStore, rows: range, schema: pyarrow.Schema, on_image: OnImage
) -> Iterator[pyarrow.RecordBatch]:
    records: list[TokenRecord] = []
    values = 0
    for row in rows:
        record = store[row]
        records.append(record)
        values += record.tokens.numel() + (0 if record.codes is None else record.codes.numel())
        if values >= BATCH_VALUES or len(records) == BATCH_IMAGES or row == rows[-1]:
            yield _batch(records, schema)
            for written in records:
                on_image(written.length)
            records, values = [], 0


def _batch(records: list[TokenRecord], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    import pyarrow

    columns = [pyarrow.array(values, schema.field(name).type) for name, values in record_columns(records).items()]
    each = schema.field("tokens").type.value_type
    values = pyarrow.array(np.concatenate([token_array(record).reshape(-1) for record in records]))
    tokens = pyarrow.FixedSizeListArray.from_arrays(values, each.list_size)
    columns.append(_list_array(tokens, [record.length for record in records]))
    if "codes" in schema.names:
        codes = [code_array(record.key, record.codes) for record in records]
        columns.append(_list_array(pyarrow.array(np.concatenate(codes)), [len(row) for row in codes]))
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def _list_array(values: pyarrow.Array, lengths: list[int]) -> pyarrow.ListArray:
    import pyarrow

    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values)
