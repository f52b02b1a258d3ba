"""Decoding: every mode becomes the RGB that a viewer shows, and what cannot be decoded gives its reason."""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from dove_fast.data import DecodeError, Loaded, ShortSideCenterCrop, decode_image, load_image
from dove_fast.data.decode import upright_size


def rgb(path) -> np.ndarray:
    decoded = decode_image(path)
    assert decoded.image.mode == "RGB"
    assert (decoded.width, decoded.height) == decoded.image.size
    return np.asarray(decoded.image)


def saved(tmp_path, image: Image.Image, name: str = "x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def reason(path) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_image(path)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert str(path) not in text
    return text


def test_rgb_comes_back_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(rgb(saved(tmp_path, Image.fromarray(pixels))), pixels)


def test_grey_is_repeated(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert np.array_equal(rgb(saved(tmp_path, Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))


def test_one_bit_is_black_and_white(tmp_path):
    bits = np.array([[True, False], [False, True]])
    expected = np.repeat(bits[..., None], 3, 2) * 255
    assert np.array_equal(rgb(saved(tmp_path, Image.fromarray(bits))), expected)


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


def test_palette(tmp_path):
    assert rgb(saved(tmp_path, palette_image())).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_a_palettes_transparent_colour_shows_the_white_background(tmp_path, name):
    path = saved(tmp_path, palette_image(), name, transparency=1)
    assert rgb(path).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_a_palette_with_alpha_per_entry(tmp_path):
    path = saved(tmp_path, palette_image(), transparency=bytes([255, 0, 51]))
    assert rgb(path).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 255]]]


def test_alpha_is_composited_over_white(tmp_path):
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    # 51/255 = 0.2: 0.2 * colour + 0.8 * 255.
    expected = [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]
    assert rgb(saved(tmp_path, Image.fromarray(pixels))).tolist() == expected


def test_grey_with_alpha(tmp_path):
    image = Image.new("LA", (3, 1))
    image.putdata([(100, 255), (100, 0), (0, 51)])
    assert rgb(saved(tmp_path, image)).tolist() == [[[100] * 3, [255] * 3, [204] * 3]]


def test_palette_with_an_alpha_plane():
    from dove_fast.data.decode import _to_rgb

    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255)).convert("PA")
    assert image.mode == "PA"
    image.putalpha(Image.frombytes("L", (2, 1), bytes([255, 0])))
    assert np.asarray(_to_rgb(image, image))[0, 1].tolist() == [255, 255, 255]


def test_rgb_with_a_transparent_colour(tmp_path):
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels), transparency=(4, 5, 6))
    assert rgb(path).tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, name):
    levels = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 254, 255]
    assert rgb(saved(tmp_path, Image.fromarray(levels), name))[0, :, 0].tolist() == expected


def test_sixteen_bit_grey_of_the_other_byte_order(tmp_path):
    header = b"P5 2 1 65535\n"
    (tmp_path / "x.pgm").write_bytes(header + np.array([257, 65535], ">u2").tobytes())
    assert rgb(tmp_path / "x.pgm")[0, :, 0].tolist() == [1, 255]


def test_sixteen_bit_grey_with_a_transparent_level(tmp_path):
    levels = np.array([[0, 257, 514]], np.uint16)
    path = saved(tmp_path, Image.fromarray(levels), transparency=257)
    assert rgb(path)[0, :, 0].tolist() == [0, 255, 2]


def test_sixteen_bit_grey_where_low_is_white(tmp_path):
    levels = np.array([[0, 65535]], np.uint16)
    path = saved(tmp_path, Image.fromarray(levels), "x.tif", tiffinfo={262: 0})
    assert rgb(path)[0, :, 0].tolist() == [255, 0]


def test_twelve_bit_grey_reaches_white(tmp_path):
    packed = bytes([0xFF, 0xF0, 0x00])  # two samples: 4095 and 0
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (279, 4, 3)]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", offset if tag == 273 else value)
        for tag, kind, value in tags
    )
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + packed
    (tmp_path / "x.tif").write_bytes(content)
    assert rgb(tmp_path / "x.tif")[0, :, 0].tolist() == [255, 0]


def test_thirty_two_bit_grey_in_the_range_of_sixteen_bits(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 65535]], np.int32)), "x.tif")
    assert rgb(path)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.array([[0, 70000]], np.int32), "grey values from 0 to 70000 have no defined range, expected 0 to 65535"),
        (np.array([[-1, 5]], np.int32), "grey values from -1 to 5 have no defined range, expected 0 to 65535"),
        (np.array([[0.0, 1.0]], np.float32), "floating-point samples have no defined range"),
    ],
)
def test_samples_without_a_range_are_refused(tmp_path, values, text):
    assert reason(saved(tmp_path, Image.fromarray(values), "x.tif")) == text


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_sixteen_bit_rgb(tmp_path):
    samples = np.array([0x0000, 0x8080, 0xFFFF], ">u2").tobytes()
    (tmp_path / "x.png").write_bytes(png(1, 1, 16, 2, b"\0" + samples))
    assert rgb(tmp_path / "x.png").tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_cmyk_is_not_inverted(tmp_path, name):
    # Pillow writes CMYK JPEG as Adobe does, inverted, with Adobe's marker.
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(rgb(saved(tmp_path, image, name)).astype(int) - [255, 0, 0]).max() <= 3


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue")]
    for name in ("x.gif", "x.webp", "x.png", "x.tif"):
        options = {"lossless": True} if name == "x.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert rgb(tmp_path / name)[0, 0].tolist() == [255, 0, 0], name


# What each EXIF orientation says of the stored picture: the operation that makes it upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "x.webp" else {}
    path = saved(tmp_path, Image.fromarray(pixels), name, exif=exif, **options)
    assert np.array_equal(rgb(path), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_the_upright_size_is_the_decoded_one(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.new("RGB", (7, 4)), name, exif=exif)
    decoded = decode_image(path)
    with open(path, "rb") as file:
        assert upright_size(file) == (decoded.width, decoded.height)


def test_the_upright_size_needs_no_more_than_the_header(tmp_path):
    content = saved(tmp_path, Image.new("RGB", (300, 200)), "x.jpg").read_bytes()
    assert upright_size(io.BytesIO(content[: len(content) // 2])) == (300, 200)
    with pytest.raises(DecodeError, match="not an image in a known format, or damaged at its start"):
        upright_size(io.BytesIO(content[:2]))


def test_orientation_and_transparency_together(tmp_path):
    pixels = np.zeros((1, 2, 4), np.uint8)
    pixels[0, 0] = [10, 20, 30, 255]
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = rgb(saved(tmp_path, Image.fromarray(pixels), exif=exif))
    assert decoded.tolist() == [[[10, 20, 30]], [[255, 255, 255]]]


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    path = saved(tmp_path, image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rgb(path).shape == (2, 4, 3)


def noise(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.bmp", "x.gif"])
def test_truncated_files_have_a_reason_and_no_grey_half(tmp_path, name):
    path = saved(tmp_path, noise(), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert reason(path)


def test_reasons(tmp_path):
    assert reason(tmp_path / "gone.jpg") == "the file does not exist"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path / "folder.jpg") == "not a regular file"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    unknown = "not an image in a known format, or damaged at its start"
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert reason(tmp_path / "empty.jpg") == unknown
    (tmp_path / "text.jpg").write_text("hello")
    assert reason(tmp_path / "text.jpg") == unknown
    # A format that Pillow reads by starting another program.
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert reason(tmp_path / "script.jpg") == unknown


def test_what_the_system_says_of_this_file_alone_is_a_reason(tmp_path, monkeypatch):
    saved(tmp_path, noise(), "x.png")
    assert reason(tmp_path / "x.png/y.png") == "Not a directory"
    assert reason(tmp_path / ("x" * 300)) == "File name too long"
    os.symlink("loop.png", tmp_path / "loop.png")
    assert reason(tmp_path / "loop.png").startswith("Too many levels of symbolic links")
    os.symlink(tmp_path / "gone/x.png", tmp_path / "dangling.png")
    assert reason(tmp_path / "dangling.png") == "the file does not exist"
    assert reason(f"{tmp_path}/x\0.png") == "no file can have this name"

    # Root may read anything, so the refusal is made.
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(io, "FileIO", refuse)
    assert reason(tmp_path / "x.png") == "Permission denied"


def test_a_file_without_its_folder_is_no_pictures_fault(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    with pytest.raises(FileNotFoundError) as raised:
        load_image(f"{folder}/x.png", ShortSideCenterCrop(8))
    assert raised.value.filename == str(folder)
    folder.mkdir()
    assert load_image(f"{folder}/x.png", ShortSideCenterCrop(8)) == "the file does not exist"
    # Without a folder in its name.
    monkeypatch.chdir(folder)
    assert reason("x.png") == "the file does not exist"


# Reading its first bytes fails, as on a medium that is damaged.
FAILING = "/proc/self/mem"


@pytest.mark.skipif(not os.path.isfile(FAILING), reason="needs a file of Linux that cannot be read")
def test_a_medium_that_fails_is_no_pictures_fault(tmp_path):
    link = tmp_path / os.fsdecode(b"caf\xe9.png")
    link.symlink_to(FAILING)
    with pytest.raises(OSError, match="Input/output error") as raised:
        load_image(str(link), ShortSideCenterCrop(8))
    # As text that can be written anywhere.
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, f"{tmp_path}/caf\\xe9.png")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.EIO])
def test_what_the_system_says_of_any_file_is_no_pictures_fault(tmp_path, monkeypatch, code):
    path = saved(tmp_path, noise())

    def fail(path):
        raise OSError(code, os.strerror(code), path)

    for module, name in ((os, "stat"), (io, "FileIO")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(OSError, match=os.strerror(code)) as raised:
                decode_image(path)
        assert (raised.value.errno, raised.value.filename) == (code, str(path))


class FailingOnce(io.BytesIO):
    """A file of which one reading fails, the first for 0, and those behind it do not."""

    def __init__(self, content: bytes, number: int, code: int = errno.EIO) -> None:
        super().__init__(content)
        self.left, self.code = number, code

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left == -1:
            raise OSError(self.code, os.strerror(self.code))
        return super().read(size)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((f"x.{suffix}", {}) for suffix in ("jpg", "png", "webp", "bmp", "gif", "jp2", "tga")),
        *(("x.tif", {"compression": kind}) for kind in (None, "tiff_lzw", "jpeg")),
    ],
)
def test_a_medium_that_fails_anywhere_is_told_from_damage(tmp_path, monkeypatch, name, options):
    path = saved(tmp_path, noise(120), name, **options)
    content = path.read_bytes()
    # As often as it is read when all goes well.
    whole = FailingOnce(content, 1000)
    monkeypatch.setattr(io, "FileIO", lambda _: whole)
    assert isinstance(load_image(str(path), ShortSideCenterCrop(8)), Loaded)
    assert whole.left < 1000
    for number in range(1000 - whole.left):
        monkeypatch.setattr(io, "FileIO", lambda _, number=number: FailingOnce(content, number))
        with pytest.raises(OSError, match="Input/output error") as raised:
            load_image(str(path), ShortSideCenterCrop(8))
        assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(path))


def test_a_position_that_no_file_has_is_damage(tmp_path, monkeypatch):
    path = saved(tmp_path, noise())
    monkeypatch.setattr(io, "FileIO", lambda _: FailingOnce(path.read_bytes(), 1, errno.EINVAL))
    assert reason(path) == "Invalid argument"


def test_the_upright_size_tells_a_medium_that_fails_from_damage(tmp_path):
    content = saved(tmp_path, noise(), "x.jpg").read_bytes()
    with pytest.raises(OSError, match="Input/output error"):
        upright_size(FailingOnce(content, 0))


def test_bytes_are_decoded_like_the_file_that_holds_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("x.jpg", "x.png", "x.tif", "x.webp"):
        path = saved(tmp_path, noise(24).crop((0, 0, 24, 10)), name, exif=exif)
        assert np.array_equal(rgb(path.read_bytes()), rgb(path)), name


def test_bytes_have_the_files_reasons(tmp_path):
    unknown = "not an image in a known format, or damaged at its start"
    assert reason(b"") == unknown
    # Not the name of a file.
    path = saved(tmp_path, noise(), "x.png")
    assert reason(os.fsencode(path)) == unknown
    path.write_bytes(path.read_bytes()[:5000])
    assert reason(path.read_bytes()) == reason(path)
    assert reason(png(60000, 60000, 8, 2, bytes(1000))).startswith("too many pixels")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60000, 60000, 8, 2, bytes(1000)))
    assert reason(tmp_path / "bomb.png").startswith("too many pixels: Image size (3600000000 pixels) exceeds limit")


def test_damage_anywhere_is_a_reason_or_a_picture_but_no_other_exception(tmp_path):
    random = np.random.default_rng(3)
    for name in ("x.jpg", "x.png", "x.tif", "x.webp", "x.gif", "x.bmp", "x.tga"):
        content = bytearray(saved(tmp_path, noise(24), name).read_bytes())
        for _ in range(60):
            damaged = bytearray(content)
            for position in random.integers(0, min(len(content), 400), 4):
                damaged[position] = random.integers(0, 256)
            (tmp_path / name).write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = load_image(str(tmp_path / name), ShortSideCenterCrop(8))
            assert isinstance(loaded, str) or loaded.pixels.shape == (3, 8, 8)


def test_pillows_settings_are_left_alone(tmp_path):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    rgb(saved(tmp_path, noise()))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
