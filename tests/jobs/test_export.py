"""Exports: every format read back with somebody else's reader, the same bytes after any stop, nothing overwritten."""

from __future__ import annotations

import json
import os
import resource
import struct
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from kill_switch import KilledError, KillSwitch, contents
from made_stores import WIDTH, image, ragged, settings, write

from dove_fast import DOVEConfig, StoreError, TokenStore
from dove_fast.cli import main
from dove_fast.failures import JobError
from dove_fast.jobs import export
from dove_fast.jobs.export import FORMATS
from dove_fast.store.layout import tokens_path
from dove_fast.store.records import RecordRow
from dove_fast.store.writer import StoreWriter

CODES = DOVEConfig.tiny().num_features
IMAGES = 8
NOTICE = ".dove-fast.json"
KEYS = ["a/b.c.jpg", "grüße/猫.png", "x", "y.tar.gz", "../z", "q q.webp", "0", "🦆"]
EXTRA = [{"label": 3}, None, {"caption": "eine Taube, „dove“"}, {"boxes": [[1, 2.5], []]}, None, {}, None, {"a": None}]
TOKEN_DTYPES = ["float32", "bfloat16", "float16", "int8"]


def make(directory, dtype: str = "float32", codes: bool = True) -> TokenStore:
    """Write a store whose records have everything that a record can have."""
    writer = StoreWriter(directory, settings(IMAGES, dtype=dtype, codes=codes), {"torch": "test"})
    writer.begin()
    for unit in writer.missing:
        with writer.shard(unit) as shard:
            for index in range(unit * 3, min(unit * 3 + 3, IMAGES)):
                values, row = image(index, "float32" if dtype == "int8" else dtype, WIDTH)
                full = RecordRow(**{**vars(row), "key": KEYS[index], "extra": EXTRA[index]})
                own = torch.Generator().manual_seed(index)
                drawn = torch.randint(0, 1 << 16, (1, CODES), generator=own) if codes else None
                shard.append(ragged([values]), [full], drawn)
    writer.finish()
    return TokenStore(directory)


@pytest.fixture
def store(tmp_path) -> TokenStore:
    return make(tmp_path / "s")


def exported(store: TokenStore, directory, format: str, shard_size: int = 3) -> list:
    """Export and return the files, without the notice."""
    export(store, directory, format, shard_size=shard_size)
    return sorted(path for path in directory.iterdir() if path.name != NOTICE)


def check_record(row: dict, tokens, codes, record) -> None:
    """Compare what a reader gave with the store's record."""
    for name in ("key", "source", "length", "width", "height", "eos_probability", "extra"):
        assert row[name] == getattr(record, name), name
    wide = np.asarray(tokens)
    assert wide.shape == (record.length, WIDTH)
    # Bit for bit: float32 holds bfloat16 exactly.
    assert np.array_equal(wide.astype(np.float32), record.tokens.float().numpy())
    if record.codes is None:
        assert codes is None
    else:
        assert np.asarray(codes).tolist() == record.codes.tolist()


def read_tar(path) -> dict[str, dict[str, bytes]]:
    """Return samples as WebDataset groups them: by what stands before the first dot."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            name, _, ending = member.name.partition(".")
            samples.setdefault(name, {})[ending] = tar.extractfile(member).read()
    return samples


def read_npy(content: bytes, path) -> np.ndarray:
    path.write_bytes(content)
    return np.load(path, allow_pickle=False)


@pytest.mark.parametrize("codes", [True, False], ids=["codes", "no-codes"])
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_webdataset(tmp_path, dtype, codes):
    store = make(tmp_path / "s", dtype, codes)
    files = exported(store, tmp_path / "out", "webdataset")
    assert [path.name for path in files] == ["000000.tar", "000001.tar", "000002.tar"]
    samples = {name: sample for path in files for name, sample in read_tar(path).items()}
    assert [len(read_tar(path)) for path in files] == [3, 3, 2]
    assert list(samples) == [f"{index:09d}" for index in range(IMAGES)]
    for sample, record in zip(samples.values(), store, strict=True):
        assert sorted(sample) == (["codes.npy", "json", "npy"] if codes else ["json", "npy"])
        tokens = read_npy(sample["npy"], tmp_path / "x.npy")
        assert tokens.dtype == (np.float16 if dtype == "float16" else np.float32)
        drawn = read_npy(sample["codes.npy"], tmp_path / "x.npy") if codes else None
        assert drawn is None or drawn.dtype == np.uint16
        check_record(json.loads(sample["json"]), tokens, drawn, record)


def read_rows(format: str, path) -> pyarrow.Table:
    if format == "parquet":
        return pyarrow.parquet.read_table(path)
    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all()


@pytest.mark.parametrize("codes", [True, False], ids=["codes", "no-codes"])
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_tables(tmp_path, format, dtype, codes):
    store = make(tmp_path / "s", dtype, codes)
    files = exported(store, tmp_path / "out", format)
    assert [path.name for path in files] == [f"{number:06d}.{format}" for number in range(3)]
    tables = [read_rows(format, path) for path in files]
    assert [table.num_rows for table in tables] == [3, 3, 2]
    types = tables[0].schema
    value = pyarrow.float16() if dtype == "float16" else pyarrow.float32()
    assert types.field("tokens").type.value_type.equals(pyarrow.list_(value, WIDTH))
    assert ("codes" in types.names) == codes
    assert not codes or types.field("codes").type.value_type == pyarrow.uint16()
    assert (types.field("length").type, types.field("eos_probability").type) == (pyarrow.int32(), pyarrow.float32())
    rows = [row for table in tables for row in table.to_pylist()]
    for row, record in zip(rows, store, strict=True):
        row["extra"] = None if row["extra"] is None else json.loads(row["extra"])
        check_record(row, row["tokens"], row.get("codes"), record)


@pytest.mark.parametrize("name", ["BATCH_VALUES", "BATCH_IMAGES"])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_tables_are_written_in_small_parts(tmp_path, store, monkeypatch, format, name):
    whole = read_rows(format, exported(store, tmp_path / "whole", format, 1024)[0])
    monkeypatch.setattr(f"dove_fast.store.exporters.table.{name}", 1)
    path = exported(store, tmp_path / "parts", format, 1024)[0]
    if format == "parquet":
        assert pyarrow.parquet.ParquetFile(path).num_row_groups == IMAGES
    else:
        assert len(list(pyarrow.ipc.open_stream(path.read_bytes()))) == IMAGES
    assert read_rows(format, path).equals(whole)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_parquet_loads_with_datasets(tmp_path, datasets, dtype):
    store = make(tmp_path / "s", dtype)
    files = [str(path) for path in exported(store, tmp_path / "out", "parquet")]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for row, record in zip(rows, store, strict=True):
        check_record(
            {**row, "extra": None if row["extra"] is None else json.loads(row["extra"])},
            row["tokens"],
            row["codes"],
            record,
        )


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_arrow_is_mapped_by_datasets(tmp_path, datasets, dtype):
    store = make(tmp_path / "s", dtype)
    files = exported(store, tmp_path / "out", "arrow")
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in files])
    assert rows["key"][:] == store.keys
    for row, record in zip(rows.with_format("numpy"), store, strict=True):
        assert np.array_equal(np.stack(row["tokens"]).astype(np.float32), record.tokens.float().numpy())
        assert row["codes"].tolist() == record.codes.tolist()


def test_webdataset_streams_with_datasets(tmp_path, datasets):
    store = TokenStore(write(tmp_path / "s"))
    files = [str(path) for path in exported(store, tmp_path / "out", "webdataset")]
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for row, record in zip(rows, store, strict=True):
        check_record(row["json"], row["npy"], None, record)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_megatron(tmp_path, dtype):
    store = make(tmp_path / "s", dtype)
    report = export(store, tmp_path / "out", "megatron")
    assert (report.images, report.tokens, report.files) == (IMAGES, IMAGES * CODES, 2)
    index, data = (tmp_path / "out/tokens.idx").read_bytes(), (tmp_path / "out/tokens.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, 8, IMAGES, IMAGES + 1)
    sizes = struct.unpack_from(f"<{IMAGES}i", index, 34)
    pointers = struct.unpack_from(f"<{IMAGES}q", index, 34 + 4 * IMAGES)
    documents = struct.unpack_from(f"<{IMAGES + 1}q", index, 34 + 12 * IMAGES)
    assert len(index) == 34 + 12 * IMAGES + 8 * (IMAGES + 1)
    assert documents == tuple(range(IMAGES + 1))
    assert len(data) == 2 * sum(sizes)
    for size, pointer, record in zip(sizes, pointers, store, strict=True):
        assert list(struct.unpack_from(f"<{size}H", data, pointer)) == record.codes.tolist()


def test_megatron_without_codes_is_refused(tmp_path):
    store = make(tmp_path / "s", codes=False)
    with pytest.raises(ValueError, match=r"has no codes, and megatron takes .* dove-fast tokenize --codes"):
        export(store, tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_store_gives_the_same_bytes(tmp_path, store, format):
    export(store, tmp_path / "a", format, shard_size=3)
    export(TokenStore(make(tmp_path / "again").directory), tmp_path / "b", format, shard_size=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_any_step_it_resumes_to_the_same_bytes(tmp_path, store, format, after):
    export(store, tmp_path / "whole", format, shard_size=3)
    whole = contents(tmp_path / "whole")
    at = 0
    killed = True
    while killed:
        at += 1
        with pytest.MonkeyPatch.context() as patch:
            KillSwitch(at, after).arm(patch)
            try:
                export(store, tmp_path / f"o{at}", format, shard_size=3)
                killed = False
            except KilledError:
                pass
        if (tmp_path / f"o{at}").exists():
            visible = {name: data for name, data in contents(tmp_path / f"o{at}").items() if not name.endswith(".tmp")}
            assert visible.items() <= whole.items(), f"killed at step {at}"
        export(store, tmp_path / f"o{at}", format, shard_size=3)
        assert contents(tmp_path / f"o{at}") == whole, f"killed at step {at}"
    # Of every file two syncs and a rename.
    assert at > 3 * len(whole)


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_run_writes_what_is_missing(tmp_path, store, format):
    files = exported(store, tmp_path / "out", format)
    before = contents(tmp_path / "out")
    inodes = {path: path.stat().st_ino for path in files}
    assert export(store, tmp_path / "out", format, shard_size=3).files == 0
    files[0].unlink()
    # As a failing disk may leave it, or a copy that was cut off.
    files[-1].write_bytes(files[-1].read_bytes()[:-9])
    seen = []
    report = export(store, tmp_path / "out", format, shard_size=3, on_progress=seen.append)
    assert report.files == 2
    assert (seen[-1].done, seen[-1].total, seen[-1].images) == (IMAGES, IMAGES, report.images)
    assert report.images == (IMAGES if format == "megatron" else 5)
    assert contents(tmp_path / "out") == before
    assert all(path.stat().st_ino == inodes[path] for path in files[1:-1])


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "megatron"])
def test_what_the_report_counts(tmp_path, store, format):
    seen = []
    report = export(store, tmp_path / "out", format, shard_size=3, on_progress=seen.append)
    assert (report.images, report.tokens, report.files) == (IMAGES, int(store.lengths.sum()), 3)
    assert [progress.done for progress in seen] == [3, 6, 8]


def test_an_empty_store(tmp_path):
    store = TokenStore(write(tmp_path / "s", 3, frozenset({0, 1, 2})))
    assert export(store, tmp_path / "out", "parquet").files == 0
    assert list(contents(tmp_path / "out")) == [NOTICE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "csv"}, "format must be one of webdataset, parquet, arrow, megatron, got 'csv'"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, store, changes, message):
    with pytest.raises(ValueError, match=message):
        export(store, tmp_path / "out", **{"format": "parquet", **changes})
    assert not (tmp_path / "out").exists()


def test_other_files_are_left_alone(tmp_path, store):
    before = contents(store.directory)
    with pytest.raises(ValueError, match="is not empty and holds no export of a store; choose another output"):
        export(store, store.directory, "parquet")
    assert contents(store.directory) == before
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="exists and is not a directory; choose another output"):
        export(store, tmp_path / "out", "parquet")


@pytest.mark.parametrize("change", ["store", "tokens", "format", "shard size", "pictures"])
def test_an_export_of_something_else_is_left_alone(tmp_path, store, change):
    if change == "tokens":
        store = TokenStore(write(tmp_path / "one"))
    export(store, tmp_path / "out", "parquet", shard_size=3)
    if change == "store":
        store = make(tmp_path / "other", "float16")
    elif change == "tokens":
        # The same settings, but an image was set aside.
        store = TokenStore(write(tmp_path / "other", bad=frozenset({1})))
    elif change == "pictures":
        (tmp_path / "out" / NOTICE).write_text('{"pictures_of": "0", "length": null, "max_length": null}')
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds what was made of another store, or in another format or shard size"):
        export(
            store,
            tmp_path / "out",
            "arrow" if change == "format" else "parquet",
            shard_size=2 if change == "shard size" else 3,
        )
    assert contents(tmp_path / "out") == before


def test_megatron_has_no_shard_size(tmp_path, store):
    export(store, tmp_path / "out", "megatron", shard_size=3)
    assert export(store, tmp_path / "out", "megatron", shard_size=2).files == 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_stops_the_job(tmp_path, format):
    # Enough for the notice; every export is larger.
    store = make(tmp_path / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(JobError, match=r"^File too large; run the same command again to go on$"):
            export(store, tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(contents(tmp_path / "out")) == [NOTICE]
    assert export(store, tmp_path / "out", format).images == IMAGES


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_store_is_named(tmp_path, store, format):
    path = tokens_path(store.directory, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"00001\.safetensors is damaged"):
        export(store, tmp_path / "out", format, shard_size=3)
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


@pytest.mark.parametrize("format", FORMATS)
def test_the_command(tmp_path, store, capsys, format):
    arguments = ["export", str(store.directory), str(tmp_path / "cli"), "--format", format, "--shard-size", "3"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    what = f"2 files, 8 images, {IMAGES * CODES} codes" if format == "megatron" else "3 files, 8 images, "
    assert what in out
    assert err == ""
    export(store, tmp_path / "out", format, shard_size=3)
    assert contents(tmp_path / "cli") == contents(tmp_path / "out")
    assert main(arguments) == 0
    assert "all files of 8 images were there already, nothing was written" in capsys.readouterr().out


def test_exit_codes(tmp_path, store, capsys, monkeypatch):
    def failed(*arguments: str) -> tuple[int, str]:
        code = main(["export", *arguments])
        return code, capsys.readouterr().err

    name, out = str(store.directory), str(tmp_path / "out")
    assert main(["export", "--help"]) == 0
    assert "exit codes: 0 done;" in capsys.readouterr().out
    assert failed(name, out)[0] == 2
    assert failed(name, out, "--format", "csv")[0] == 2
    assert failed(name, out, "--format", "arrow", "--shard-size", "0")[0] == 2
    code, err = failed(str(tmp_path / "none"), out, "--format", "arrow")
    assert code == 2 and err.startswith("dove-fast: no token store at ")
    code, err = failed(str(make(tmp_path / "plain", codes=False).directory), out, "--format", "megatron")
    assert code == 2 and "dove-fast tokenize --codes" in err
    code, err = failed(name, name, "--format", "arrow")
    assert code == 2 and "choose another output" in err

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    code, err = failed(name, out, "--format", "arrow")
    assert (code, err) == (130, "dove-fast: interrupted; whole files are kept, run the same command again to go on\n")


def test_the_command_knows_every_format(capsys):
    assert main(["export", "--help"]) == 0
    assert "{" + ",".join(FORMATS) + "}" in capsys.readouterr().out
