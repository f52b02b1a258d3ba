"""WebDataset shards: what belongs together, the texts and boxes of each region, and what is left out and why."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from dove_fast.data import Picture, Sample, Samples, WebDataset, decode_image

ABOX = [1, 2, 5, 8]


def encoded(width: int = 20, height: int = 10, suffix: str = "png", orientation: int = 1, colour: int = 0) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 0)).save(file, Image.registered_extensions()[f".{suffix}"], exif=exif)
    return file.getvalue()


PNG = encoded()


def member(name: str, size: int, **fields) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    for field, value in fields.items():
        setattr(header, field, value)
    return header


def link(name: str) -> tarfile.TarInfo:
    return member(name, 0, type=tarfile.LNKTYPE, linkname="good.png")


def write(path, *files, format: int = tarfile.GNU_FORMAT):
    """Write (name, content) pairs; content is bytes, or what becomes JSON, or a header of its own."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            archive.addfile(member(name, len(data)), io.BytesIO(data))
    return path


def read(tmp_path, *files, **options) -> WebDataset:
    return WebDataset(write(tmp_path / "s.tar", *files, **options))


def texts(samples: Samples) -> list[str]:
    return [samples[index].text for index in range(len(samples))]


def keys(samples: Samples) -> list[str]:
    return [samples[index].picture.key for index in range(len(samples))]


def test_a_sample_has_its_picture_text_boxes_and_frame(tmp_path):
    samples: Samples = read(
        tmp_path,
        ("a.png", PNG),
        ("a.json", {"text": "a red\n bird ", "boxes": [ABOX, [0, 0, 2.5, 3]], "width": 40, "height": 30.5}),
        ("b.png", b"not looked at"),
        ("b.json", {"text": "all of it"}),
    )
    path = str(tmp_path / "s.tar")
    assert samples[0] == Sample(
        Picture("s/a", path, (512, len(PNG))), "a red bird", ((1, 2, 5, 8), (0, 0, 2.5, 3)), (40, 30.5)
    )
    assert samples[1].text == "all of it" and samples[1].boxes == ()
    assert len(samples) == 2 and samples.left_out == {}


def test_the_pictures_bytes_are_those_of_the_archive(tmp_path):
    pictures = [encoded(colour=colour) for colour in (1, 2, 3)]
    files = [(f"{number}.png", content) for number, content in enumerate(pictures)]
    samples = read(tmp_path, *files)
    for index in (2, 0, 1):
        assert samples[index].picture.encoded() == pictures[index]
        assert decode_image(samples[index].picture.encoded()).image.getpixel((0, 0)) == (index + 1, 0, 0)


def test_each_region_is_a_sample_of_the_same_picture(tmp_path):
    regions = [{"text": "one", "boxes": [ABOX]}, {"text": "whole", "boxes": []}, {"text": "two", "boxes": [ABOX] * 2}]
    samples = read(tmp_path, ("a.json", {"regions": regions, "text": "not read"}), ("a.png", PNG), ("b.png", PNG))
    assert texts(samples) == ["one", "whole", "two", ""]
    assert [samples[index].boxes for index in range(4)] == [(tuple(ABOX),), (), (tuple(ABOX),), ()]
    assert samples[0].picture == samples[1].picture == samples[2].picture != samples[3].picture
    assert samples[0].frame == (20, 10) and samples[3].frame == (1, 1)


def test_boxes_are_clipped_to_the_frame(tmp_path):
    samples = read(tmp_path, ("a.png", PNG), ("a.json", {"text": "x", "boxes": [[-5, -1, 300, 9], [3, 4, 5, 11]]}))
    assert samples[0].boxes == ((0, 0, 20, 9), (3, 4, 5, 10))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_without_width_and_height_the_frame_is_the_upright_pictures_size(tmp_path, suffix, orientation):
    content = encoded(30, 10, suffix, orientation)
    samples = read(tmp_path, (f"a.{suffix}", content), ("a.json", {"text": "x", "boxes": [[0, 0, 9, 9]]}))
    decoded = decode_image(samples[0].picture.encoded())
    assert samples[0].frame == (decoded.width, decoded.height) == ((10, 30) if orientation > 4 else (30, 10))


def test_a_txt_is_the_text_of_the_whole_picture_only_where_the_json_has_none(tmp_path):
    txt = ("a.txt", "\ufeffthe  txt\n".encode())
    whole = {"caption": "else", "text": None, "boxes": None, "regions": []}
    for description, expected in (({}, "the txt"), (whole, "the txt"), ({"text": "the json"}, "the json")):
        assert texts(read(tmp_path, txt, ("a.png", PNG), ("a.json", description))) == [expected]
    assert texts(read(tmp_path, ("a.png", PNG), txt)) == ["the txt"]
    samples = read(tmp_path, txt, ("a.png", PNG), ("a.json", {"boxes": [ABOX]}))
    assert len(samples) == 0 and samples.left_out == {"a box without text": 1}


def test_files_belong_together_up_to_the_first_dot_of_the_base_name(tmp_path):
    samples = read(
        tmp_path,
        ("v1.0/x.JPG", PNG),
        ("v1.0/x.seg.png", PNG),
        ("v1.0/x.cls", b"3"),
        ("v1.0/README", b"no dot"),
        ("v1.0/._x.jpg", PNG),
        ("v1.0/sub", member("v1.0/sub", 0, type=tarfile.DIRTYPE)),
        ("v1.0/x.JSON", {"text": "here"}),
        ("v1.0/y.png", PNG),
    )
    assert keys(samples) == ["s/v1.0/x", "s/v1.0/y"] and texts(samples) == ["here", ""]
    assert samples.left_out == {}


def test_files_of_one_name_that_are_apart_do_not_belong_together(tmp_path):
    samples = read(tmp_path, ("a.png", PNG), ("b.png", PNG), ("a.json", {"text": "late"}))
    assert texts(samples) == ["", ""] and samples.left_out == {"no picture file": 1}
    write(tmp_path / "1.tar", ("a.png", PNG))
    write(tmp_path / "2.tar", ("a.json", {"text": "another shard's"}))
    samples = WebDataset([tmp_path / "1.tar", tmp_path / "2.tar"])
    assert texts(samples) == [""] and samples.left_out == {"no picture file": 1}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_in_any_script(tmp_path, format):
    names = ["folder/" * 30 + "x" * 150, "猫" * 60, "short"]
    pictures = [encoded(colour=colour) for colour in (1, 2, 3)]
    files = [(f"{name}.png", content) for name, content in zip(names, pictures, strict=True)]
    samples = read(tmp_path, *files, format=format)
    assert keys(samples) == [f"s/{name}" for name in names]
    assert [samples[index].picture.encoded() for index in range(3)] == pictures


def test_a_name_that_is_not_utf8_has_a_printable_key(tmp_path):
    assert keys(read(tmp_path, ("caf\udce9.png", PNG))) == ["s/caf\\xe9"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.json", {"text": "x"})], "no picture file"),
        ([("a.png", link("a.png")), ("a.txt", b"x")], "a link in the archive, which is not followed"),
        ([("a.png", link("a.png"))], "a link in the archive, which is not followed"),
        ([("a.png", PNG), ("a.txt", link("a.txt"))], "a link in the archive, which is not followed"),
        # Beside the reader's own files.
        ([("a.npy", link("a.npy"))], "no picture file"),
        ([("a.png", PNG), ("a.jpg", PNG)], "more than one picture file"),
        ([("a.png", PNG), ("a.json", {}), ("a.json", {})], "more than one json file"),
        ([("a.png", PNG), ("a.txt", b"x"), ("a.txt", b"y")], "more than one txt file"),
        ([("a.png", PNG), ("a.txt", b"caf\xe9")], "malformed entry"),
        ([("a.png", b"\x89PNG"), ("a.json", {"text": "x", "boxes": [ABOX]})], "a picture whose size cannot be read"),
        ([("a.png", b""), ("a.json", {"text": "x", "boxes": [ABOX]})], "a picture whose size cannot be read"),
    ],
)
def test_files_that_are_left_out(tmp_path, files, reason):
    samples = read(tmp_path, *files, ("good.png", PNG))
    assert samples.left_out == {reason: 1} and keys(samples) == ["s/good"]


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (b"", "malformed entry"),
        (b'{"text": "x"', "malformed entry"),
        (b'{"text": "caf\xe9"}', "malformed entry"),
        (b"[" * 100_000, "malformed entry"),
        (["x"], "malformed entry"),
        ("x", "malformed entry"),
        ({"text": 3}, "malformed entry"),
        ({"text": "x", "boxes": {"0": ABOX}}, "malformed entry"),
        ({"regions": {"text": "x"}}, "malformed entry"),
        ({"regions": ["x"]}, "malformed entry"),
        ({"text": "x", "boxes": [ABOX], "width": 20}, "malformed entry"),
        ({"text": "x", "boxes": [ABOX], "width": 20, "height": 0}, "malformed entry"),
        ({"text": "x", "boxes": [ABOX], "width": 20, "height": "10"}, "malformed entry"),
        ({"text": "x", "boxes": ABOX}, "a box that is not four finite numbers"),
        ({"text": "x", "boxes": [[1, 2, 3]]}, "a box that is not four finite numbers"),
        ({"text": "x", "boxes": [[1, 2, 3, "4"]]}, "a box that is not four finite numbers"),
        ({"text": "x", "boxes": [[False, 0, 3, True]]}, "a box that is not four finite numbers"),
        ({"text": "x", "boxes": [[1, 2, 3, float("nan")]]}, "a box that is not four finite numbers"),
        ({"text": "x", "boxes": [[1, 2, 3, float("inf")]]}, "a box that is not four finite numbers"),
        ({"text": "x", "boxes": [[1, 2, 3, 10**400]]}, "a box that is not four finite numbers"),
        ({"text": "x", "boxes": [[1, 2, 1, 4]]}, "a box of no area"),
        ({"text": "x", "boxes": [ABOX, [1, 4, 3, 2]]}, "a box of no area"),
        ({"text": "x", "boxes": [[20, 2, 30, 4]]}, "a box outside the picture"),
        ({"text": "x", "boxes": [[1, -4, 3, 0]]}, "a box outside the picture"),
        ({"boxes": [ABOX]}, "a box without text"),
        ({"text": " \n", "boxes": [ABOX]}, "a box without text"),
        ({"regions": [{}]}, "a region without text and boxes"),
    ],
)
def test_descriptions_that_are_left_out(tmp_path, description, reason):
    samples = read(tmp_path, ("a.png", PNG), ("a.json", description), ("good.png", PNG))
    assert samples.left_out == {reason: 1} and keys(samples) == ["s/good"]


def test_a_bad_region_does_not_cost_the_others(tmp_path):
    regions = [{"text": "a", "boxes": [[3, 3, 3, 4]]}, {"text": "b", "boxes": [ABOX]}, 5, {"text": "c"}]
    samples = read(tmp_path, ("a.png", PNG), ("a.json", {"regions": regions}))
    assert texts(samples) == ["b", "c"] and samples[0].boxes == (tuple(ABOX),) and samples[1].boxes == ()
    assert samples.left_out == {"a box of no area": 1, "malformed entry": 1}


def test_shards_come_as_paths_ranges_and_folders(tmp_path):
    for name in ("t-08", "t-09", "t-10", "t-11", "more/b", "more/deep/a", "more/.hidden", "more/.git/x", "odd{1..2}"):
        path = tmp_path / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, ("a.png", PNG))
    (tmp_path / "more/notes.txt").write_text("no shard")
    folder, ranges = str(tmp_path / "more"), f"{tmp_path}/t-{{08..10}}.tar"
    assert keys(WebDataset(ranges)) == ["t-08/a", "t-09/a", "t-10/a"]
    assert keys(WebDataset(f"{tmp_path}/t-{{1..1}}{{0..1}}.tar")) == ["t-10/a", "t-11/a"]
    assert keys(WebDataset(folder)) == ["b/a", "a/a"]
    assert keys(WebDataset([tmp_path / "t-11.tar", folder, ranges])) == [
        "t-11/a",
        "b/a",
        "a/a",
        "t-08/a",
        "t-09/a",
        "t-10/a",
    ]
    assert keys(WebDataset(tmp_path / "odd{1..2}.tar")) == ["odd{1..2}/a"]


def test_shards_that_are_not_there(tmp_path):
    write(tmp_path / "t-0.tar", ("a.png", PNG))
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*t-1\.tar"):
        WebDataset(f"{tmp_path}/t-{{0..1}}.tar")
    with pytest.raises(ValueError, match=r"must not run backwards, got \{2\.\.1\} in .*t-\{2\.\.1\}"):
        WebDataset(f"{tmp_path}/t-{{2..1}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no shards in .*empty: no file below it ends in \.tar"):
        WebDataset(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least one shard, got none"):
        WebDataset([])


@pytest.mark.parametrize(
    ("name", "compress"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)]
)
def test_a_compressed_shard_is_refused_with_the_way_out(tmp_path, name, compress):
    path = write(tmp_path / "s.tar", ("a.png", PNG))
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"shard .*s\.tar is compressed with {name}.*unpack it to a plain \.tar"):
        WebDataset(path)


def test_a_shard_cut_off_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", ("a.png", PNG), ("b.png", PNG), ("b.json", {"text": "x"}))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = max(header.offset_data for header in archive) + 512
    for length in (0, 100, 512, 600, 1024, 1100, 1536, end - 512, end - 500, end, end + 511):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"shard .*s\.tar is damaged, not complete or no tar archive: .+; fetch"):
            WebDataset(path)
    # Padding behind the block of zeros that ends the archive says nothing.
    path.write_bytes(whole[: end + 512])
    assert len(WebDataset(path)) == 2


def test_a_damaged_header_does_not_end_the_shard_in_silence(tmp_path):
    path = write(tmp_path / "s.tar", ("a.png", PNG), ("b.png", PNG))
    content = bytearray(path.read_bytes())
    content[content.index(b"b.png")] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"neither a file's header nor the end of an archive at byte 1024"):
        WebDataset(path)


def test_a_size_that_leads_out_of_the_shard_or_backwards_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", ("a.png", PNG), ("b.png", PNG), ("c.png", PNG))
    content = path.read_bytes()
    # The last leads back to the second header, without end if it were followed.
    for size in (2**62, 10_000, -1024, -1536):
        header = bytearray(content[2048:2560])
        header[124:136] = struct.pack(">iq", -1 if size < 0 else -(2**31), size)
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(content[:2048] + header + content[2560:])
        with pytest.raises(ValueError, match=r"shard .*s\.tar is damaged"):
            WebDataset(path)


def test_a_size_beyond_any_file_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", ("a" * 120 + ".png", PNG))
    header = bytearray(path.read_bytes())
    header[124:136] = b"\x80" + b"\xff" * 11
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path.write_bytes(header)
    with pytest.raises(ValueError, match=r"shard .*s\.tar is damaged"):
        WebDataset(path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match="no tar archive"):
        WebDataset(tmp_path / "s.tar")


def test_an_archive_of_nothing_has_no_samples(tmp_path):
    samples = read(tmp_path)
    assert len(samples) == 0 and samples.left_out == {}


def test_an_index_that_is_not_there(tmp_path):
    samples = read(tmp_path, ("a.png", PNG))
    assert samples[np.int64(0)].picture.key == "s/a"
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"at least 0 and below 1, got {index}"):
            samples[index]


def test_it_goes_to_other_processes_small_and_whole(tmp_path):
    description = {"text": "a text of 20 letters", "boxes": [ABOX], "width": 20, "height": 10}
    files = [file for number in range(200) for file in ((f"{number:06}.png", b""), (f"{number:06}.json", description))]
    samples = read(tmp_path, *files)
    content = pickle.dumps(samples)
    assert len(content) / len(samples) < 80 + 6 + 20
    again = pickle.loads(content)
    assert [again[index] for index in range(200)] == [samples[index] for index in range(200)]


def test_a_scan_does_not_keep_the_headers(tmp_path):
    path = write(tmp_path / "s.tar", *((f"{number}.png", b"") for number in range(2000)))
    WebDataset(path)
    tracemalloc.start()
    WebDataset(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 200


def test_damage_anywhere_is_a_value_error_or_harmless(tmp_path):
    description = {"text": "x", "boxes": [ABOX]}
    path = write(
        tmp_path / "s.tar",
        ("a.png", PNG),
        ("a" * 120 + ".json", description),
        ("b.txt", b"x"),
        format=tarfile.PAX_FORMAT,
    )
    content = path.read_bytes()[:6144]
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 3):
            damaged[position] = random.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = WebDataset(path)
            assert all(samples[index].picture.encoded() is not None for index in range(len(samples)))


def test_reading_a_sample_opens_nothing(tmp_path):
    samples = read(tmp_path, ("a.png", PNG), ("a.json", {"text": "x", "boxes": [ABOX]}))
    (tmp_path / "s.tar").unlink()
    assert samples[0].text == "x" and samples[0].frame == (20, 10)
