"""What each kind of INPUT stands for, what is refused, and what units and identities depend on."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from made_pictures import make_pictures
from made_shards import write_tar

from dove_fast.data import EncodedImage, SourceOptions, open_source
from dove_fast.data.sources import FileSource, expand_ranges


def tars(folder: Path, *names: str) -> Path:
    """Write shards of one sample each, whose key is the shard's name without dots."""
    for name in names:
        write_tar(folder / f"{name}.tar", [(f"{Path(name).name.replace('.', '_')}.png", b"png")])
    return folder


def parquets(folder: Path, *names: str, rows: int = 3) -> Path:
    for name in names:
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"image": [b"%d" % row for row in range(rows)]}), path)
    return folder


def kind(source) -> str:
    return source.to_dict()["kind"]


def keys(source) -> list[str]:
    return [item.key for unit in range(source.units) for item in source.read(unit)]


def listing(path: Path, *lines: object) -> Path:
    path.write_bytes(b"\n".join(os.fsencode(str(line)) for line in lines) + b"\n")
    return path


def test_a_folder_of_images(tmp_path):
    source = open_source(make_pictures(tmp_path / "p"), SourceOptions(shard_size=4))
    assert isinstance(source, FileSource) and source.to_dict() == {"kind": "files"}
    assert (source.units, source.inputs, source.shard_size, source.unique_keys) == (3, 10, 4, True)
    assert [source.size_of(unit) for unit in range(3)] == [4, 4, 2]
    assert keys(source) == list(source.keys()) == sorted(keys(source))
    first = next(iter(source.read(0)))
    assert first == EncodedImage("00.jpg", str(tmp_path / "p/00.jpg"), str(tmp_path / "p/00.jpg"))


def test_a_list_of_images_and_one_image(tmp_path):
    photos = make_pictures(tmp_path / "p")
    source = open_source(listing(tmp_path / "list.txt", "# these", "p/deep/01.png", "", photos / "00.jpg"))
    assert (kind(source), keys(source)) == ("files", ["p/deep/01.png", "p/00.jpg"])
    assert [item.content for item in source.read(0)] == [str(photos / "deep/01.png"), str(photos / "00.jpg")]
    source = open_source(photos / "00.jpg")
    assert (kind(source), source.units, keys(source)) == ("files", 1, ["00.jpg"])


def test_a_folder_of_tars_or_of_parquet_files(tmp_path):
    source = open_source(tars(tmp_path / "t", "b", "a", "deep/c", ".hidden", ".git/d"))
    assert (kind(source), source.units, keys(source)) == ("webdataset", 3, ["a", "b", "c"])
    assert (source.inputs, source.shard_size, source.keys(), source.size_of(0)) == (None, None, None, None)
    assert not source.unique_keys
    (tmp_path / "t/notes.txt").write_text("not a shard")
    (tmp_path / "t/UPPER.TAR").write_bytes((tmp_path / "t/a.tar").read_bytes())
    assert open_source(tmp_path / "t").units == 4
    names = [f"{number:02}" for number in (7, 3, 19, 0, 11, 5, 2, 18, 1, 9)]
    assert keys(open_source(tars(tmp_path / "many", *names))) == sorted(names)
    source = open_source(parquets(tmp_path / "p", "b", "deep/a"), SourceOptions(shard_size=2))
    assert (kind(source), source.units, source.inputs, source.shard_size) == ("parquet", 4, 6, 2)
    assert keys(source) == ["b/0", "b/1", "b/2", "a/0", "a/1", "a/2"]


def test_a_folder_that_holds_several_kinds_is_refused(tmp_path):
    both = parquets(tars(tmp_path / "both", "a"), "b")
    with pytest.raises(ValueError, match=r"both holds both \.tar and \.parquet files; name one kind, as '.*both/\*\.t"):
        open_source(both)
    assert keys(open_source(both / "*.tar")) == ["a"]
    for make, name in ((tars, "tar"), (parquets, "parquet")):
        folder = make(make_pictures(tmp_path / name, 2), "a")
        with pytest.raises(ValueError, match=rf"{name} holds images and \.{name} files; name the shards by a pattern"):
            open_source(folder)
    # Hidden ones are not there.
    assert kind(open_source(tars(make_pictures(tmp_path / "h", 2), ".a", ".b/a"))) == "files"


def test_a_folder_of_neither(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        open_source(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such input: .*nowhere"):
        open_source(tmp_path / "nowhere")
    for name in ("nowhere.tar", "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match=rf"no such input: .*{name}$"):
            open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", ["x"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{000..2}", ["000", "001", "002"]),
        ("a{0..1}b{1..2}c", ["a0b1c", "a0b2c", "a1b1c", "a1b2c"]),
        ("{5..5}", ["5"]),
        ("{a..c}{1..}{..2}{}", ["{a..c}{1..}{..2}{}"]),
    ],
)
def test_ranges(text, expected):
    assert list(expand_ranges(text)) == expected


def test_ranges_and_patterns_of_shards(tmp_path):
    tars(tmp_path, "t-08", "t-09", "t-10", "t-11", "u-1")
    assert keys(open_source(f"{tmp_path}/t-{{08..10}}.tar")) == ["t-08", "t-09", "t-10"]
    assert keys(open_source(f"{tmp_path}/t-*.tar")) == ["t-08", "t-09", "t-10", "t-11"]
    assert keys(open_source(f"{tmp_path}/?-{{1..1}}[01].tar")) == ["t-10", "t-11"]
    # In the order of the ranges, sorted within each pattern.
    assert keys(open_source(f"{tmp_path}/t-{{1..1}}?.tar")) == ["t-10", "t-11"]
    with pytest.raises(ValueError, match=r"must not run backwards, got \{10\.\.8\} in .*t-\{10\.\.8\}\.tar"):
        open_source(f"{tmp_path}/t-{{10..8}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no such input: .*/t-12\.tar"):
        open_source(f"{tmp_path}/t-{{11..12}}.tar")
    for pattern in ("v-*.tar", "{0..1}*.tar", "*.parquet"):
        with pytest.raises(FileNotFoundError, match="no such input: "):
            open_source(tmp_path / pattern)


def test_names_that_look_like_ranges_and_patterns(tmp_path):
    tars(tmp_path / "odd[1]{1..2}", "a*", "b{3..4}", "c-1", "c-2")
    folder = tmp_path / "odd[1]{1..2}"
    for name, expected in (("a*", "a*"), ("b{3..4}", "b{3__4}")):
        assert keys(open_source(folder / f"{name}.tar")) == [expected]
    # The folder's name is as it is for what a list in it names.
    for line, expected in (("c-*.tar", ["c-1", "c-2"]), ("c-{1..2}.tar", ["c-1", "c-2"]), ("a*.tar", ["a*"])):
        assert keys(open_source(listing(folder / "list.txt", line))) == expected


def test_a_folder_that_is_called_like_a_shard(tmp_path):
    tars(tmp_path / "x.tar", "inside")
    assert keys(open_source(tmp_path / "x.tar")) == ["inside"]
    tars(tmp_path, "y")
    assert keys(open_source(tmp_path / "*.tar")) == ["y"]
    with pytest.raises(FileNotFoundError, match=r"no such input file: .*x\.tar"):
        open_source(listing(tmp_path / "list.txt", "y.tar", "x.tar"))


def test_a_list_of_shards(tmp_path, monkeypatch):
    tars(tmp_path / "lists/near", "a", "b-0", "b-1", "c-0", "c-1")
    tars(tmp_path / "far", "d")
    path = listing(
        tmp_path / "lists/list.txt",
        "# shards",
        "",
        "  near/b-{0..1}.tar  ",
        tmp_path / "far/d.tar",
        "near/c-*.tar",
        "#near/none.tar",
        "../lists/near/a.tar",
    )
    expected = ["b-0", "b-1", "d", "c-0", "c-1", "a"]
    assert keys(open_source(path)) == expected
    # Relative to the list, from wherever it is opened.
    monkeypatch.chdir(tmp_path / "lists")
    assert keys(open_source("list.txt")) == expected
    # With a byte-order mark, and other line ends.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert keys(open_source(path)) == expected
    with pytest.raises(FileNotFoundError, match=r"no such input: .*lists/near/none\.tar"):
        open_source(listing(path, "near/a.tar", "near/none.tar"))
    parquets(tmp_path / "p", "x")
    assert keys(open_source(listing(path, "../p/x.parquet"))) == ["x/0", "x/1", "x/2"]


def test_a_list_of_several_kinds_is_refused(tmp_path):
    parquets(tars(make_pictures(tmp_path, 2), "a"), "b")
    for lines in (("a.tar", "b.parquet"), ("b.parquet", "a.tar"), ("a.tar", "00.jpg"), ("pipe:cat a.tar", "b.parquet")):
        with pytest.raises(ValueError, match=rf"lists shards like '{lines[0]}', but also '{lines[1]}'; list one kind"):
            open_source(listing(tmp_path / "list.txt", *lines))
    for other in ("a.tar", "b.parquet"):
        with pytest.raises(ValueError, match=rf"lists images, but also '{other}'; list one kind"):
            open_source(listing(tmp_path / "list.txt", "00.jpg", "deep/01.png", other))
    # Pipes and tars are of one kind.
    source = open_source(listing(tmp_path / "list.txt", "a.tar", f"pipe:cat {tmp_path}/a.tar"))
    assert keys(source) == ["a", "a"]


def test_a_list_of_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.tar")
    (tmp_path / name).write_bytes((tars(tmp_path, "a") / "a.tar").read_bytes())
    source = open_source(listing(tmp_path / "list.txt", "a.tar", name), SourceOptions(prefix_keys=True))
    assert keys(source) == ["a/a", r"caf\xe9/a"]
    assert {item.source for item in source.read(1)} == {f"{tmp_path}/caf\\xe9.tar"}
    assert len(source.identity()) == 64


def test_pipes_and_urls(tmp_path):
    tars(tmp_path, "a-1", "a-2")
    source = open_source(f"pipe:cat {tmp_path}/a-{{1..2}}.tar")
    assert (kind(source), source.units, keys(source)) == ("webdataset", 2, ["a-1", "a-2"])
    # A URL is opened when it is read, not before.
    for url in (
        "https://nowhere.invalid/{00..04}.tar?key=x.y",
        "s3://bucket/{00..04}.tar",
        "FILE:///x/{00..04}.TAR",
        "simplecache::s3://bucket/{00..04}.tar",
    ):
        source = open_source(url)
        assert (kind(source), source.units) == ("webdataset", 5)
    for url in (f"file://{tmp_path}/a-2.tar", f"simplecache::file://{tmp_path}/a-2.tar"):
        assert keys(open_source(url)) == ["a-2"]
    assert keys(open_source(listing(tmp_path / "list.txt", f"file://{tmp_path}/a-{{1..2}}.tar"))) == ["a-1", "a-2"]
    parquets(tmp_path, "p")
    source = open_source(f"file://{tmp_path}/p.parquet")
    assert (kind(source), source.inputs, keys(source)) == ("parquet", 3, ["p/0", "p/1", "p/2"])


def test_options_that_do_not_belong_are_refused(tmp_path):
    photos = make_pictures(tmp_path / "photos", 2)
    shards, table = tars(tmp_path / "t", "a"), parquets(tmp_path / "p", "a")
    for source in (photos, table):
        with pytest.raises(ValueError, match=r"^prefix_keys is for WebDataset shards, which the input has none of$"):
            open_source(source, SourceOptions(prefix_keys=True))
    for source in (photos, shards, "pipe:true"):
        for options in ({"image_column": "x"}, {"key_column": "x"}):
            name = next(iter(options))
            with pytest.raises(ValueError, match=rf"^{name} is for Parquet files, which the input has none of$"):
                open_source(source, SourceOptions(**options))
    with pytest.raises(ValueError, match=r"^image_column and key_column are for Parquet files"):
        open_source(photos, SourceOptions(image_column="x", key_column="y"))
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        SourceOptions(shard_size=0)


@pytest.mark.parametrize("shard_size", [1, 3, 10, 11])
def test_units_depend_on_the_input_and_the_shard_size_alone(tmp_path, shard_size):
    options = SourceOptions(shard_size=shard_size)
    one, two = (open_source(make_pictures(tmp_path / name), options) for name in ("a", "b"))
    units = [[item.key for item in one.read(unit)] for unit in range(one.units)]
    assert units == [[item.key for item in two.read(unit)] for unit in range(two.units)]
    assert [len(unit) for unit in units] == [one.size_of(unit) for unit in range(one.units)]
    assert all(len(unit) == shard_size for unit in units[:-1]) and 1 <= len(units[-1]) <= shard_size
    assert list(itertools.chain(*units)) == list(one.keys())
    # Read in any order, and again.
    assert [[item.key for item in one.read(unit)] for unit in reversed(range(one.units))] == units[::-1]


def test_the_identity_is_that_of_keys_not_of_folders(tmp_path):
    def identities(folder: Path) -> list[str]:
        make_pictures(folder / "photos", 4)
        tars(folder / "t", "a", "b")
        parquets(folder / "p", "a", "b")
        return [open_source(folder / name).identity() for name in ("photos", "t", "p")]

    one, two = identities(tmp_path / "one"), identities(tmp_path / "two/deep")
    assert one == two and len(set(one)) == 3
    assert all(len(identity) == 64 for identity in one)
    # Neither the shard size nor the order of the file system is in it.
    assert open_source(tmp_path / "one/photos", SourceOptions(shard_size=1)).identity() == one[0]
    (tmp_path / "one/photos/00.jpg").rename(tmp_path / "one/photos/0.jpg")
    (tmp_path / "one/t/a.tar").rename(tmp_path / "one/t/c.tar")
    parquets(tmp_path / "one/p", "b", rows=4)
    for before, name in zip(one, ("photos", "t", "p"), strict=True):
        assert open_source(tmp_path / "one" / name).identity() != before
    # Order counts.
    path, lines = tmp_path / "two/list.txt", ("deep/t/a.tar", "deep/t/b.tar")
    assert open_source(listing(path, *lines)).identity() == two[1]
    assert open_source(listing(path, *lines[::-1])).identity() != two[1]
