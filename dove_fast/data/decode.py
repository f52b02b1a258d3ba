"""Decoding an image, a file or its bytes, to 8-bit RGB, as people see it in a viewer."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dove_fast.data.formats import pillow_formats
from dove_fast.data.listing import printable
from dove_fast.errors import DoveError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["BACKGROUND", "DecodeError", "DecodedImage", "decode_image", "upright_size"]

# Transparent pixels are shown on white, as most viewers and browsers do.
BACKGROUND = (255, 255, 255)

EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
TIFF_BITS_PER_SAMPLE = 258
TIFF_PHOTOMETRIC = 262
TIFF_MIN_IS_WHITE = 0

# What opening or reading says of this one file: others may be permitted where it is not, and a damaged header leads to
# positions that no file has, which is EINVAL. Any other number, EIO, ESTALE or EMFILE, says nothing of the picture.
ITS_OWN = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EINVAL),
}


class DecodeError(DoveError):
    """An input cannot be decoded; the message is the reason, in one line and without the path."""


@dataclass(frozen=True)
class DecodedImage:
    """An RGB image of 8 bits a channel, turned upright, and its size before the transform."""

    image: Image.Image
    width: int
    height: int


def decode_image(source: str | os.PathLike[str] | bytes, *, least_side: int | None = None) -> DecodedImage:
    """Decode an image's first frame to RGB, 8 bits a channel.

    `source` is the path of an image file or, as bytes, the content of one. EXIF's orientation is applied (width and
    height are those of the upright image, before anything is reduced); grey, palette and CMYK become RGB; transparent
    pixels are composited over `BACKGROUND`; 16 bits are scaled to 8, not clipped. Colour profiles are not applied.
    Pillow's limits on size hold as the process has set them, and no state of Pillow is changed.

    `least_side` lets a JPEG come smaller, as its own frequencies give it at 1/2, 1/4 or 1/8, with both sides at least
    that long: a fraction of the work, for who reduces it further anyway.
    Raises `DecodeError` with the reason: no such file, no permission, truncated, corrupt, no image, too many pixels,
    samples without a defined range. Raises `OSError`, which names the path, where it is not the file's fault: its
    medium fails, or its whole folder is gone.
    """
    from PIL import Image

    with _opened(source) as file, _one_reason(), Image.open(file, formats=pillow_formats()) as image:
        full = image.size
        if least_side is not None:
            image.draft(None, (least_side, least_side))
        reduced = image.size != full
        image.load()
        orientation = _orientation(image)
        upright = _upright(image, orientation)
        width, height = upright.size
        if reduced:
            width, height = full[::-1] if orientation in SIDEWAYS else full
        return DecodedImage(_to_rgb(upright, image), width, height)


def upright_size(file: IO[bytes]) -> tuple[int, int]:
    """Return the width and height that `decode_image` would give, from the picture's header where the format allows.

    `file` is an open image file, read from where it stands; its position afterwards is undefined. TIFF, and PNG
    without an orientation before its pixels, are decoded. Raises `DecodeError` with the reason as `decode_image` does,
    and `OSError` where the medium fails; a picture whose header is whole may still be damaged further on.
    """
    from PIL import Image

    with _watched(file) as watched, _one_reason(), Image.open(watched, formats=pillow_formats()) as image:
        if image.format == "TIFF":
            # Pillow turns a TIFF upright when it loads it, and forgets the orientation then.
            image.load()
        width, height = image.size
        return (height, width) if _orientation(image) in SIDEWAYS else (width, height)


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes) -> Iterator[IO[bytes]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    path = os.fspath(source)
    try:
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DecodeError("not a regular file")
        file = io.FileIO(path)
    except OSError as error:
        folder = os.path.dirname(path)
        if isinstance(error, FileNotFoundError) and not os.path.isdir(folder or os.curdir):
            # Renamed or unmounted: all that lies in it would be lost, and none of it is at fault.
            raise FileNotFoundError(errno.ENOENT, error.strerror, printable(folder)) from None
        if error.errno not in ITS_OWN:
            raise OSError(error.errno, error.strerror, printable(path)) from None
        missing = isinstance(error, FileNotFoundError)
        raise DecodeError("the file does not exist" if missing else error.strerror) from None
    except ValueError:
        # A zero byte, from a list of paths.
        raise DecodeError("no file can have this name") from None
    with file, _watched(file, path) as watched:
        yield watched


class _Watched(io.RawIOBase):
    """A file to read, which remembers how its medium failed: Pillow takes that for damage, or passes over it.

    It has no descriptor, so that nobody reads it unseen: not libtiff, and no map in memory, where failing is a signal.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            # Without a number it is no system's error.
            if error.errno is not None and error.errno not in ITS_OWN:
                self.failure = error
            raise
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _watched(file: IO[bytes], path: str | None = None) -> Iterator[IO[bytes]]:
    watched = _Watched(file)
    try:
        yield io.BufferedReader(watched)
    except DecodeError:
        if watched.failure is None:
            raise
    if watched.failure is not None:
        error = watched.failure
        raise OSError(error.errno, error.strerror, path and printable(path)) from error


@contextmanager
def _one_reason() -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("not an image in a known format, or damaged at its start") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"too many pixels: {_one_line(error)}") from None
    except MemoryError:
        raise DecodeError("not enough memory to decode it") from None
    except OSError as error:
        raise DecodeError(error.strerror or _one_line(error)) from None
    except Exception as error:
        # Pillow's plugins raise nearly anything on damaged files: SyntaxError, struct.error, ZeroDivisionError, ..
        raise DecodeError(f"damaged: {type(error).__name__}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        # Damaged EXIF data says nothing about the picture, which may well be whole.
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image: Image.Image, original: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image, original)
    if image.mode == "F":
        raise DecodeError("floating-point samples have no defined range")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    # Which would copy one that is.
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image, original: Image.Image) -> Image.Image:
    from PIL import Image

    grey = np.asarray(image).astype(np.int64)
    limit = 65535
    tags = getattr(original, "tag_v2", {})
    if image.mode != "I" and tags:
        limit = 2 ** int(tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0]) - 1
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > limit:
        raise DecodeError(f"grey values from {low} to {high} have no defined range, expected 0 to {limit}")
    if image.mode != "I" and tags.get(TIFF_PHOTOMETRIC) == TIFF_MIN_IS_WHITE:
        # Pillow inverts such images of 8 bits, not those of 16.
        grey = limit - grey
    transparent = image.info.get("transparency")
    narrow = ((grey * 255 + limit // 2) // limit).astype(np.uint8)
    rgb = np.repeat(narrow[:, :, None], 3, axis=2)
    if isinstance(transparent, int):
        rgb[grey == transparent] = BACKGROUND
    return Image.fromarray(rgb)
