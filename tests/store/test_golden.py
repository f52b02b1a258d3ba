"""The stores in format-2-int8 and format-2-float16 are never written again: what a user has today is read for ever.

A reader that fails here is wrong, not the stores. They hold all that format 2 has; format 1 is there for its export.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from made_stores import image, ragged
from made_stores import settings as store_settings

from dove_fast import DOVEConfig, TokenStore
from dove_fast.jobs import export
from dove_fast.jobs.export import FORMATS
from dove_fast.store.layout import StoreSettings
from dove_fast.store.records import InputError, RecordRow, read_errors
from dove_fast.store.verify import Damage, verify
from dove_fast.store.writer import StoreWriter

HERE = Path(__file__).parent
FORMAT_1, INT8, FLOAT16 = "format-1", "format-2-int8", "format-2-float16"
FORMAT_2 = [INT8, FLOAT16]
WIDTH = 3
DTYPES = {FORMAT_1: np.float32, INT8: np.float32, FLOAT16: np.float16}

ROWS = [
    RecordRow("a/b.c.jpg", "in/0.tar", 3, 640, 480, 0.75, {"txt": "grüße „🦆“", "boxes": [[1, 2.5], []], "none": None}),
    RecordRow("猫", "in/0.tar", 1, 1, 65536, 0.0),
    RecordRow("../z", "in/2.tar", 2, 333, 1000, 0.5, {}),
]
CODES = [[0, 1, 256, 65535], [32768, 32767, 2, 1], [9, 9, 9, 9]]
TOKENS = [
    [[1.0, -0.375, 0.25], [0.0, 0.0, 0.0], [65504.0, -300.0, 2**-24]],
    [[-0.0078125, 0.001953125, 0.0]],
    [[3.0, 2.0, -1.0], [-5.0, 0.625, 4.5]],
]
# The same as int8 holds them: a scale and the steps of each token.
STEPS = [
    [(0.00787401572, [127, -48, 32]), (0.0, [0, 0, 0]), (515.779541, [127, -1, 0])],
    [(6.15157478e-05, [-127, 32, 0])],
    [(0.0236220472, [127, 85, -42]), (0.0393700786, [-127, 16, 114])],
]
ERRORS = [
    InputError("0", "in/1.tar", "truncated"),
    InputError("a b.png", "in/1.tar", "Größe 0 🦆"),
    InputError("x", "in/2.tar", "twice"),
]
# By index; the second unit has no images.
UNITS = [([0, 1], []), ([], [0, 1]), ([2], [2])]


def write_golden(directory: Path, name: str) -> None:
    """Write a store as those that lie here were written, but for .lock, which they lack."""
    config = dataclasses.replace(DOVEConfig.tiny(), image_size=16)
    settings = store_settings(6, config=config.to_dict(), width=WIDTH, dtype="float16", shard_size=2)
    if name == INT8:
        source = {"kind": "webdataset", "prefix_keys": False}
        settings = dataclasses.replace(
            settings, dtype="int8", codes=True, source=source, shard_size=None, inputs=None, max_length=4
        )
    writer = StoreWriter(directory, settings, {"torch": "test"})
    writer.begin()
    for unit, (images, errors) in enumerate(UNITS):
        with writer.shard(unit) as shard:
            for index in images:
                codes = torch.tensor([CODES[index]]) if settings.codes else None
                shard.append(ragged([torch.tensor(TOKENS[index]).half()]), [ROWS[index]], codes)
            for index in errors:
                shard.set_aside(ERRORS[index])
    writer.finish()
    writer.close()


def expected(name: str) -> list[tuple[dict, np.ndarray, list[int] | None]]:
    """Return every image's record, tokens and codes."""
    if name == FORMAT_1:
        made = [image(index, "bfloat16", 6) for index in (0, 2, 3, 4)]
        return [(vars(row), values.float().numpy(), None) for values, row in made]
    if name == FLOAT16:
        return [(vars(row), np.float16(tokens), None) for row, tokens in zip(ROWS, TOKENS, strict=True)]
    kept = [np.stack([np.float32(scale) * np.float32(steps) for scale, steps in tokens]) for tokens in STEPS]
    return [(vars(row), tokens, codes) for row, tokens, codes in zip(ROWS, kept, CODES, strict=True)]


def check_same(found: np.ndarray, tokens: np.ndarray) -> None:
    assert (found.dtype, found.shape, found.tobytes()) == (tokens.dtype, tokens.shape, tokens.tobytes())


def check_reads(store: TokenStore, name: str) -> None:
    for index, (row, tokens, codes) in enumerate(expected(name)):
        record = store[index]
        assert {field: getattr(record, field) for field in row} == row
        check_same(record.tokens.numpy(), tokens)
        check_same(store.ragged([index]).values.numpy(), tokens)
        assert (None if record.codes is None else record.codes.tolist()) == codes
        assert codes is None or store.codes(index).tolist() == codes


def test_format_1():
    store = TokenStore(HERE / FORMAT_1)
    assert store.manifest["format_version"] == 1
    assert isinstance(store.config, DOVEConfig)
    assert store.keys == ["k0", "k2", "k3", "k4"]
    for record, index in zip(store, [0, 2, 3, 4], strict=True):
        values, row = image(index, "bfloat16", 6)
        assert torch.equal(record.tokens, values)
        for name in ("key", "source", "length", "width", "height", "eos_probability"):
            assert getattr(record, name) == getattr(row, name)
    assert store.ragged([3, 0]).host_lengths == (4, 1)


@pytest.mark.parametrize("name", FORMAT_2)
def test_every_image_is_read(name):
    store = TokenStore(HERE / name)
    assert store.manifest["format_version"] == 2
    assert store.manifest["totals"]["records"] == len(store) == 3
    assert (store.keys, store.lengths.tolist()) == (["a/b.c.jpg", "猫", "../z"], [3, 1, 2])
    assert (store.has_codes, store.config.num_features) == (name == INT8, 4)
    check_reads(store, name)
    assert store.ragged([2, 0]).host_lengths == (2, 3)
    assert sorted(record.key for record in store.shuffled(0)) == sorted(store.keys)
    assert read_errors(store.directory) == ERRORS


def test_what_int8_lost_is_told():
    exact = np.concatenate(TOKENS)
    lost = np.concatenate([tokens for _, tokens, _ in expected(INT8)]) - exact
    told = TokenStore(HERE / INT8).manifest["totals"]["quantization_error"]
    assert told == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(exact), rel=1e-6)


@pytest.mark.parametrize("name", FORMAT_2)
def test_what_is_written_today_reads_the_same(tmp_path, name):
    write_golden(tmp_path / "s", name)
    store = TokenStore(tmp_path / "s")
    check_reads(store, name)
    assert read_errors(store.directory) == ERRORS


@pytest.mark.parametrize("name", FORMAT_2)
def test_a_job_finds_nothing_to_do(name):
    settings = StoreSettings(**TokenStore(HERE / name).manifest["settings"])
    writer = StoreWriter(HERE / name, settings, {})
    assert writer.complete
    assert (writer.missing, writer.records, writer.tokens, writer.errors) == ([], 3, 6, ERRORS)


@pytest.mark.parametrize("name", FORMAT_2)
def test_it_is_whole(name):
    assert verify(HERE / name) == (3, [])


@pytest.mark.parametrize("unit", range(3))
@pytest.mark.parametrize("file", ["tokens/{:05d}.safetensors", "records/{:05d}.parquet"], ids=["tokens", "records"])
@pytest.mark.parametrize("name", FORMAT_2)
def test_a_damaged_byte_is_found(tmp_path, name, file, unit):
    store = shutil.copytree(HERE / name, tmp_path / "s")
    path = store / file.format(unit)
    good = path.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert verify(store) == (3, [Damage(unit, file.format(unit), "its bytes are not those that were written")])


@pytest.mark.parametrize("name", FORMAT_2)
def test_a_damaged_list_of_errors_is_found(tmp_path, name):
    path = shutil.copytree(HERE / name, tmp_path / "s") / "errors.jsonl"
    path.write_bytes(path.read_bytes().replace(b"twice", b"thrice"))
    assert verify(path.parent) == (3, [Damage(None, "errors.jsonl", "is not what the units say")])


def check_exported(row: dict, tokens: np.ndarray, codes: list[int] | None, wanted: tuple) -> None:
    fields, values, numbers = wanted
    assert {name: row[name] for name in fields} == fields
    check_same(tokens, values)
    assert codes == numbers


@pytest.mark.parametrize("name", [FORMAT_1, *FORMAT_2])
def test_webdataset(tmp_path, name):
    assert export(TokenStore(HERE / name), tmp_path / "out", "webdataset", shard_size=2).files == 2
    members = {}
    for path in sorted(tmp_path.glob("out/*.tar")):
        with tarfile.open(path) as tar:
            members.update({member.name: tar.extractfile(member).read() for member in tar})
    images = expected(name)
    assert len(members) == len(images) * (3 if name == INT8 else 2)
    for index, wanted in enumerate(images):
        row = json.loads(members[f"{index:09d}.json"])
        tokens = np.load(io.BytesIO(members[f"{index:09d}.npy"]))
        codes = np.load(io.BytesIO(members[f"{index:09d}.codes.npy"])).tolist() if name == INT8 else None
        check_exported(row, tokens, codes, wanted)


@pytest.mark.parametrize("format", ["parquet", "arrow"])
@pytest.mark.parametrize("name", [FORMAT_1, *FORMAT_2])
def test_tables(tmp_path, name, format):
    assert export(TokenStore(HERE / name), tmp_path / "out", format, shard_size=2).files == 2
    files = sorted(tmp_path.glob(f"out/*.{format}"))
    if format == "parquet":
        tables = [pyarrow.parquet.read_table(path) for path in files]
    else:
        tables = [pyarrow.ipc.open_stream(path.read_bytes()).read_all() for path in files]
    table = pyarrow.concat_tables(tables)
    assert table.schema.field("tokens").type.value_type.value_type == pyarrow.from_numpy_dtype(DTYPES[name])
    for row, wanted in zip(table.to_pylist(), expected(name), strict=True):
        row["extra"] = None if row["extra"] is None else json.loads(row["extra"])
        check_exported(row, np.array(row["tokens"], DTYPES[name]), row.get("codes"), wanted)


def test_megatron(tmp_path):
    export(TokenStore(HERE / INT8), tmp_path, "megatron")
    assert (tmp_path / "tokens.bin").read_bytes() == np.array(CODES, "<u2").tobytes()
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 4)
    rest = struct.pack("<3i3q4q", 4, 4, 4, 0, 8, 16, 0, 1, 2, 3)
    assert (tmp_path / "tokens.idx").read_bytes() == header + rest


@pytest.mark.parametrize("name", [FORMAT_1, FLOAT16])
def test_megatron_without_codes_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="has no codes, and megatron takes integers only"):
        export(TokenStore(HERE / name), tmp_path / "out", "megatron")


def test_every_export_is_tried_here():
    assert set(FORMATS) == {"webdataset", "parquet", "arrow", "megatron"}
