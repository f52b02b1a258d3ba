"""The image formats that are read, by Pillow's names and by the file names' endings."""

from __future__ import annotations

import functools

__all__ = ["FORMATS", "SUFFIXES", "pillow_formats"]

# An allow-list: some of Pillow's formats start other programs (EPS) or are no pictures (PDF, MPEG, HDF5).
FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
)

# fmt: off
SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx",
    ".mpo", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on


@functools.cache
def pillow_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow can read, once all its plugins are loaded."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
