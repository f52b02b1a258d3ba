"""Parquet files as a job's input: which columns are what, units across row groups, extras, and damage."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import uuid
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dove_fast.data import EncodedImage, SourceOptions, Unusable, open_source, parquet


def write(path: Path, columns, **options) -> Path:
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path, **options)
    return path


def read(path, **options) -> list[EncodedImage | Unusable]:
    source = open_source(path, SourceOptions(**options))
    return [item for unit in range(source.units) for item in source.read(unit)]


def extra(tmp_path: Path, **columns) -> dict[str, object] | None:
    (item,) = read(write(tmp_path / "x.parquet", {"image": [b"x"], **columns}))
    assert isinstance(item, EncodedImage)
    if item.extra is not None:
        # As the records keep it.
        assert json.loads(json.dumps(item.extra, ensure_ascii=False, allow_nan=False)) == item.extra
    return item.extra


def reasons(items) -> list[tuple[str, str | None]]:
    return [(item.key, item.reason if isinstance(item, Unusable) else None) for item in items]


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_a_column_of_bytes(tmp_path, kind):
    images = pyarrow.array([b"one", b"two", b"three"], kind)
    path = write(tmp_path / "a.b.parquet", {"label": [1, 2, 3], "image": images, "text": ["x", None, ""]})
    source = open_source(path)
    assert source.to_dict() == {"kind": "parquet", "image_column": "image", "key_column": None}
    assert (source.units, source.inputs, source.size_of(0), source.unique_keys) == (1, 3, 3, True)
    assert list(source.keys()) == ["a.b/0", "a.b/1", "a.b/2"]
    assert list(source.read(0)) == [
        EncodedImage("a.b/0", str(path), b"one", {"label": 1, "text": "x"}),
        EncodedImage("a.b/1", str(path), b"two", {"label": 2}),
        EncodedImage("a.b/2", str(path), b"three", {"label": 3, "text": ""}),
    ]


def test_as_hugging_face_datasets_writes_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"one", "path": "1.png"}, {"bytes": b"two", "path": None}, None], "label": [0, 1, 1]},
        features=features,
    )
    data.to_parquet(tmp_path / "hf.parquet")
    items = read(tmp_path / "hf.parquet")
    assert [(item.key, getattr(item, "content", None)) for item in items] == [
        ("hf/0", b"one"),
        ("hf/1", b"two"),
        ("hf/2", None),
    ]
    assert items[1].extra == {"label": 1} and items[2].reason == "no picture"


def structs(*images: bytes | None) -> pyarrow.Array:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([{"bytes": image, "path": "p.png"} for image in images], kind)


def test_a_struct_with_bytes(tmp_path):
    path = write(tmp_path / "s.parquet", {"picture": structs(b"one", None, b""), "mask": structs(b"1", b"2", b"3")})
    assert reasons(read(path, image_column="picture")) == [("s/0", None), ("s/1", "no picture"), ("s/2", "no picture")]
    assert [item.content for item in read(path, image_column="mask")] == [b"1", b"2", b"3"]
    # The bytes of the other one are no text.
    assert read(path, image_column="picture")[0].extra == {"mask": {"path": "p.png"}}


def test_which_column_is_the_images(tmp_path):
    one, two, text = [b"1"], [b"2"], ["x"]
    for columns, expected in (
        ({"image": one, "other": two}, b"1"),
        ({"mask": two, "jpg": one, "thumb": two}, b"1"),
        ({"png": two, "image": one}, b"1"),
        ({"anything": one, "image": text}, b"1"),
    ):
        (item,) = read(write(tmp_path / "a.parquet", columns))
        assert item.content == expected
    write(tmp_path / "a.parquet", {"photo": one, "mask": two, "image": text})
    with pytest.raises(
        ValueError, match=r"surely the images \(--image-column names it\); of bytes: \['photo', 'mask'\]"
    ):
        open_source(tmp_path / "a.parquet")
    assert [item.content for item in read(tmp_path / "a.parquet", image_column="mask")] == [b"2"]
    for column in ("image", "nothing"):
        with pytest.raises(
            ValueError, match=rf"has no column '{column}' of bytes; those of bytes: \['photo', 'mask'\]"
        ):
            open_source(tmp_path / "a.parquet", SourceOptions(image_column=column))
    nested = pyarrow.array([{"bytes": {"bytes": b"1"}}])
    for columns in ({"label": [1], "text": text}, {"image": nested}, {"image": pyarrow.array([[b"1"]])}):
        write(tmp_path / "a.parquet", columns)
        with pytest.raises(ValueError, match=r"has no column that is surely the images .* of bytes: \[\]"):
            open_source(tmp_path / "a.parquet")


def test_keys_from_a_column(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "name": ["x/1.png", "caf\u00e9"], "number": [7, 8]})
    source = open_source(path, SourceOptions(key_column="name"))
    assert source.to_dict() == {"kind": "parquet", "image_column": "image", "key_column": "name"}
    assert (source.keys(), source.unique_keys, source.inputs) == (None, False, 2)
    items = list(source.read(0))
    assert [(item.key, item.extra) for item in items] == [("x/1.png", {"number": 7}), ("caf\u00e9", {"number": 8})]
    assert [item.key for item in read(path, key_column="number")] == ["7", "8"]
    for name in ("key", "__key__"):
        path = write(tmp_path / "b.parquet", {"image": [b"1"], name: ["k"]})
        assert [item.key for item in read(path)] == ["k"] and read(path)[0].extra is None
    assert [item.key for item in read(path, key_column="__key__")] == ["k"]
    with pytest.raises(ValueError, match=r"has no column 'id'; it has \['image', '__key__'\]"):
        open_source(path, SourceOptions(key_column="id"))


def test_columns_that_cannot_hold_keys(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [b"1"], "key": [["a", "b"]], "__key__": ["k"], "box": [{"x": 1}]})
    assert [item.key for item in read(path)] == ["k"]
    for column in ("image", "key", "box"):
        with pytest.raises(ValueError, match=rf"column '{column}' cannot hold keys; those that can: \['__key__'\]"):
            open_source(path, SourceOptions(key_column=column))
    # A column may be the images by name and the only one of bytes.
    path = write(tmp_path / "b.parquet", {"key": [b"1"], "label": [1]})
    assert [item.key for item in read(path)] == ["b/0"]


def bad_text(*values: bytes) -> pyarrow.Array:
    """Return a column of text that holds any bytes, as a careless writer makes it."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(values))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)


def test_keys_that_name_nothing(tmp_path):
    keys = [b"a", b"", b"caf\xe9", b"x\0y", b"/", b"..", b"b"]
    nothing = "its key is null, empty or no text"
    expected = [("a", None), *((f"a/{row}", nothing) for row in range(1, 6)), ("b", None)]
    for column in (bad_text(*keys), pyarrow.array(keys)):
        path = write(tmp_path / "a.parquet", {"image": [b"x"] * 7, "key": column})
        assert reasons(read(path, image_column="image")) == expected
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 2, "key": [None, "a/0"]})
    # The place that stands for the lost key is also somebody's key.
    assert reasons(read(path)) == [("a/0", nothing), ("a/0", None)]


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", "..//x", "a/../x"])
def test_keys_that_lead_out_are_set_aside(tmp_path, key):
    path = write(tmp_path / "a.parquet", {"image": [b"1"] * 3, "key": [key, "./y", "..z/a..b"]})
    assert reasons(read(path)) == [(key, "its key leads out of its folder"), ("./y", None), ("..z/a..b", None)]


def test_a_row_group_is_not_read_at_once(tmp_path, monkeypatch):
    images = [np.random.default_rng(row).bytes(50_000) for row in range(400)]
    # In pages of 16 rows, for a page is read at once.
    options = {"row_group_size": 400, "use_dictionary": False, "write_batch_size": 16}
    path = write(tmp_path / "a.parquet", {"image": images}, **options)
    taken = []
    plain = parquet._rows

    def watched(*arguments):
        pool = pyarrow.default_memory_pool()
        before = pool.bytes_allocated()
        for values in plain(*arguments):
            taken.append(pool.bytes_allocated() - before)
            yield values

    monkeypatch.setattr(parquet, "_rows", watched)
    items = read(path)
    assert [item.content for item in items] == images
    # 20 MB of pictures: two batches of 64, and a little.
    assert max(taken) < 10_000_000


def test_rows_without_an_image(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [b"1", None, b"", b"4"], "key": ["a", "b", "c", "d"]})
    assert reasons(read(path)) == [("a", None), ("b", "no picture"), ("c", "no picture"), ("d", None)]


def test_keys_that_come_again_in_one_unit(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [b"1", b"2", b"3", b"4"], "key": ["a", "b", "a", "b"]})
    again = "its key comes more than once"
    assert reasons(read(path)) == [("a", None), ("b", None), ("a", again), ("b", again)]
    # In two units it is the job that has to notice.
    assert reasons(read(path, shard_size=2)) == [("a", None), ("b", None), ("a", None), ("b", None)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    row_group_size=st.integers(1, 210),
    shard_size=st.integers(1, 210),
    batch=st.sampled_from([1, 7, 64]),
    keyed=st.booleans(),
)
def test_units_are_the_plain_reading_cut_into_pieces(tmp_path_factory, rows, row_group_size, shard_size, batch, keyed):
    folder = tmp_path_factory.mktemp("units")
    expected = []
    for number, count in enumerate(rows):
        images = [b"%d-%d" % (number, row) for row in range(count)]
        keys = [f"{number}-k{row}" for row in range(count)] if keyed else [f"f{number}/{row}" for row in range(count)]
        columns = {"image": images, "row": list(range(count)), **({"key": keys} if keyed else {})}
        write(folder / f"f{number}.parquet", columns, row_group_size=row_group_size)
        expected.append([(key, image, {"row": row}) for row, (key, image) in enumerate(zip(keys, images, strict=True))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROWS", batch)
        source = open_source(folder, SourceOptions(shard_size=shard_size))
        units = [[(i.key, i.content, i.extra) for i in source.read(unit)] for unit in range(source.units)]
    pieces = [file[start : start + shard_size] for file in expected for start in range(0, len(file), shard_size)]
    assert units == pieces
    assert [source.size_of(unit) for unit in range(source.units)] == list(map(len, pieces))
    assert source.inputs == sum(rows)


def test_files_without_rows(tmp_path):
    empty = pyarrow.table({"image": pyarrow.array([], pyarrow.binary())})
    write(tmp_path / "a.parquet", empty)
    with pytest.raises(ValueError, match=r"no rows in .*a\.parquet"):
        open_source(tmp_path)
    write(tmp_path / "b.parquet", {"image": [b"1"]})
    write(tmp_path / "c.parquet", empty)
    source = open_source(tmp_path)
    assert (source.units, [item.key for item in source.read(0)]) == (1, ["b/0"])


NESTED = [{"box": [1.0, 2.5], "day": "2024-01-02"}, None]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pyarrow.array([datetime.date(2024, 2, 29)]), "2024-02-29"),
        (pyarrow.array([10**7], pyarrow.date32()), "29349-01-26"),
        (pyarrow.array([datetime.datetime(2024, 2, 29, 1, 2, 3)]), "2024-02-29 01:02:03.000000"),
        # Neither of these is a time that Python has.
        (pyarrow.array([1234567890123456789], pyarrow.timestamp("ns")), "2009-02-13 23:31:30.123456789"),
        (pyarrow.array([10**12], pyarrow.timestamp("ms", "UTC")), "2001-09-09 01:46:40.000Z"),
        (pyarrow.array([0], pyarrow.timestamp("s", "Europe/Berlin")), "1970-01-01 00:00:00.000Z"),
        (pyarrow.array([1], pyarrow.timestamp("us", "Mars/Olympus")), "1970-01-01 00:00:00.000001Z"),
        (pyarrow.array([None], pyarrow.timestamp("us", "UTC")), None),
        (pyarrow.array([3661000000001], pyarrow.time64("ns")), "01:01:01.000000001"),
        (pyarrow.array([decimal.Decimal("1.50")]), "1.50"),
        (pyarrow.array([1.5]), 1.5),
        (pyarrow.array([float("nan")]), None),
        (pyarrow.array([[1.0, float("inf")]]), [1.0, None]),
        (pyarrow.array([True]), True),
        (pyarrow.array([2**63 - 1]), 2**63 - 1),
        (pyarrow.array(["x"]).dictionary_encode(), "x"),
        (pyarrow.array([None], pyarrow.string()), None),
        (pyarrow.array([b"bytes"]), None),
        (pyarrow.array([[b"bytes", b"more"]]), [None, None]),
        (pyarrow.array([{"bytes": b"x", "size": 3}]), {"size": 3}),
        (pyarrow.array([[{"box": [1.0, 2.5], "day": datetime.date(2024, 1, 2), "mask": b"x"}, None]]), NESTED),
        (
            pyarrow.array([[("a", 1), ("b", None)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            [["a", 1], ["b", None]],
        ),
        (bad_text(b"caf\xe9"), None),
    ],
)
def test_extras(tmp_path, column, expected):
    assert extra(tmp_path, x=column, y=["y"]) == ({"y": "y"} if expected is None else {"x": expected, "y": "y"})


def test_extras_of_which_one_cannot_be_read(tmp_path):
    columns = {"image": [b"1", b"2", b"3"], "text": bad_text(b"one", b"\xff", b"three")}
    assert [item.extra for item in read(write(tmp_path / "a.parquet", columns))] == [
        {"text": "one"},
        None,
        {"text": "three"},
    ]


def test_a_uuid(tmp_path):
    if not hasattr(pyarrow, "uuid"):
        pytest.skip("this pyarrow has no such type")
    name = uuid.UUID(int=5)
    found = extra(tmp_path, x=pyarrow.array([name.bytes], pyarrow.uuid()))
    assert found == {"x": str(name)}


@pytest.mark.parametrize("data", [b"", b"PAR1", b"hello" * 1000, b"PAR1" + b"x" * 1000 + b"PAR1"])
def test_what_is_no_parquet_file(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no Parquet file: "):
        open_source(tmp_path / "a.parquet")
    write(tmp_path / "0.parquet", {"image": [b"1"]})
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no Parquet file: "):
        open_source(tmp_path)


def test_a_parquet_file_cut_off_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [b"12345"] * 20})
    whole = path.read_bytes()
    for length in (4, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or no Parquet file"):
            open_source(path)


def damaged_file(path: Path, *, group: int, keyed: bool = False) -> Path:
    """Write ten rows in groups of three, and damage the pictures' pages of one group."""
    images = [np.random.default_rng(row).bytes(400) for row in range(10)]
    columns = {"image": images, **({"key": [f"k{row}" for row in range(10)]} if keyed else {})}
    # Statistics would hold copies of pictures.
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    write(path, columns, row_group_size=3, write_page_checksum=True, **options)
    data = bytearray(path.read_bytes())
    data[data.index(images[3 * group + 1]) + 200] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("shard_size", [1, 4, 10])
@pytest.mark.parametrize("keyed", [False, True])
def test_damage_costs_its_row_group(tmp_path, shard_size, keyed):
    path = damaged_file(tmp_path / "a.parquet", group=1, keyed=keyed)
    items = read(path, shard_size=shard_size)
    assert len(items) == 10
    lost = [item for item in items if isinstance(item, Unusable)]
    assert [item.key for item in lost] == ["a/3", "a/4", "a/5"]
    assert all(item.reason.startswith("the file is damaged here: ") and "\n" not in item.reason for item in lost)
    good = [(items.index(item), item) for item in items if isinstance(item, EncodedImage)]
    assert [row for row, _ in good] == [0, 1, 2, 6, 7, 8, 9]
    assert all(item.content == np.random.default_rng(row).bytes(400) for row, item in good)
    assert [item.key for _, item in good] == [f"k{row}" if keyed else f"a/{row}" for row, _ in good]


def test_damage_of_a_file_from_elsewhere_raises(tmp_path):
    path = damaged_file(tmp_path / "a.parquet", group=1)
    source = open_source(f"file://{path}", SourceOptions(shard_size=3))
    assert [item.key for item in source.read(0)] == ["a/0", "a/1", "a/2"]
    with pytest.raises(OSError, match=r"(?i)crc|checksum|damaged"):
        list(source.read(1))


def test_a_medium_that_fails_raises(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "a.parquet", {"image": [b"1"]}))

    def fail(*_, **__):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(source.read(0))
    monkeypatch.undo()
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        list(source.read(0))


def test_damage_anywhere_is_told_or_harmless(tmp_path):
    columns = {"image": [b"x" * 50, b"y" * 70] * 20, "text": ["a", "b"] * 20, "key": [f"k{row}" for row in range(40)]}
    random = np.random.default_rng(0)
    outcomes = set()
    for compression in ("none", "snappy"):
        path = write(tmp_path / "a.parquet", columns, row_group_size=15, compression=compression)
        whole = path.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            start = random.integers(4, len(data) - 8)
            data[start : start + 4] = random.bytes(4)
            path.write_bytes(data[: len(whole)])
            try:
                items = read(path)
            except (ValueError, OSError) as error:
                outcomes.add(type(error).__name__)
                continue
            outcomes.add(any(isinstance(item, Unusable) for item in items))
    assert outcomes >= {"ValueError", True, False}


def test_every_file_must_have_the_first_ones_columns(tmp_path):
    first = write(tmp_path / "0.parquet", {"image": [b"1"], "key": ["a"]})
    for columns, missing in (
        ({"img": [b"1"], "key": ["b"]}, "'image' of bytes"),
        ({"image": ["/etc/hostname"], "key": ["b"]}, "'image' of bytes"),
        ({"image": [b"1"], "name": ["b"]}, "'key'"),
    ):
        write(tmp_path / "1.parquet", columns)
        with pytest.raises(ValueError, match=rf"1\.parquet has no column {missing}, which {first} has"):
            open_source(tmp_path)
    # Other columns, in another order, are as they are.
    write(tmp_path / "1.parquet", {"more": [2], "key": ["b"], "image": structs(b"2")})
    assert [(item.key, item.content, item.extra) for item in read(tmp_path)] == [
        ("a", b"1", None),
        ("b", b"2", {"more": 2}),
    ]


def test_files_of_one_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.parquet", {"image": [b"1"], "name": [folder]})
    with pytest.raises(ValueError, match="different names to make keys of, 'x' comes twice"):
        open_source(tmp_path)
    assert [item.key for item in read(tmp_path, key_column="name")] == ["a", "b"]


def test_a_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.parquet")
    write(tmp_path / "a.parquet", {"image": [b"1"]}).rename(path)
    (item,) = read(path)
    assert (item.key, item.source, item.content) == (r"caf\xe9/0", f"{tmp_path}/caf\\xe9.parquet", b"1")


def test_a_url_equals_the_file_and_is_closed(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    path = write(tmp_path / "a.parquet", {"image": [b"%d" % row for row in range(20)]}, row_group_size=7)
    opened = []
    plain = fsspec.core.OpenFile.open
    monkeypatch.setattr(fsspec.core.OpenFile, "open", lambda self: opened.append(plain(self)) or opened[-1])
    source, local = (open_source(name, SourceOptions(shard_size=6)) for name in (f"file://{path}", path))
    assert source.identity() == local.identity() and list(source.keys()) == list(local.keys())
    for unit in range(4):
        same = [(item.key, item.content) for item in local.read(unit)]
        assert [(item.key, item.content) for item in source.read(unit)] == same
    next(source.read(0))
    assert len(opened) == 6 and all(file.closed for file in opened)
    with pytest.raises(FileNotFoundError):
        open_source("memory://dove-fast-test/nowhere.parquet")
    with pytest.raises(ValueError, match="nosuch"):
        open_source("nosuch://host/a.parquet")


def test_what_a_url_raises_in_the_middle_is_an_oserror(tmp_path, monkeypatch):
    memory = pytest.importorskip("fsspec.implementations.memory")
    path = write(tmp_path / "a.parquet", {"image": [b"%d" % row * 1000 for row in range(20)]}, row_group_size=7)
    url = "memory://dove-fast-test/a.parquet"
    with pytest.importorskip("fsspec").open(url, "wb") as file:
        file.write(path.read_bytes())
    source = open_source(url, SourceOptions(shard_size=6))
    plain = memory.MemoryFile.read

    def fail(file, *size):
        if file.tell() < 1000:
            raise RuntimeError("503 Slow Down")
        return plain(file, *size)

    monkeypatch.setattr(memory.MemoryFile, "read", fail)
    with pytest.raises(OSError, match="reading failed: RuntimeError: 503 Slow Down"):
        list(source.read(0))
