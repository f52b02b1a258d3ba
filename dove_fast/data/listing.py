"""What a job's INPUT means: one image, a folder of images, or a text file of paths; each input gets its key here."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from dove_fast.data.formats import SUFFIXES, pillow_formats

__all__ = ["ImageInput", "list_inputs"]

# How many keys an error message spells out.
MAX_KEYS_NAMED = 5


@dataclass(frozen=True)
class ImageInput:
    """One input: `key` names it in the store and is unique there, `path` is the file to open."""

    key: str
    path: str

    @property
    def source(self) -> str:
        """The path as text that every file format can hold: bytes that are not UTF-8 are written as escapes."""
        return printable(PurePath(self.path).as_posix())


def printable(text: str) -> str:
    """Return `text` with the undecodable bytes of a file name (Python's surrogates) written as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def list_inputs(source: str | os.PathLike[str]) -> list[ImageInput]:
    """List the images that `source` stands for.

    An image file: itself, its key is its name. A folder: every file below it with a known ending, without the hidden
    ones, sorted by key; keys are POSIX paths relative to the folder. Links are followed, but not back into a folder
    that holds them. Anything else is a text file with one path a line, relative to the text file's folder; blank lines
    and those that start with # are skipped, the order is kept, and keys are POSIX paths relative to that folder.

    Raises `FileNotFoundError` for no such path; `ValueError` if it is none of these, if nothing is found, or if two
    inputs have the same key; `OSError` for a folder that cannot be read.
    """
    path = os.fspath(source)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such input: {printable(path)}")
    if os.path.isdir(path):
        inputs = sorted(_walk(path, "", ()), key=lambda item: item.key)
        if not inputs:
            raise ValueError(f"no images in {printable(path)}: no file below it has one of the endings {_endings()}")
    elif _is_image(path):
        inputs = [ImageInput(printable(os.path.basename(path)), path)]
    else:
        inputs = _read_list(path)
        if not inputs:
            raise ValueError(f"no paths in {printable(path)}: it is empty but for comments")
    repeated = [key for key, count in Counter(item.key for item in inputs).items() if count > 1]
    if repeated:
        more = f" and {len(repeated) - MAX_KEYS_NAMED} more" if len(repeated) > MAX_KEYS_NAMED else ""
        raise ValueError(f"keys must be unique, these come more than once: {_quoted(repeated[:MAX_KEYS_NAMED])}{more}")
    return inputs


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[ImageInput]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, identity))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                # A dangling link or a pipe is listed too: it is set aside with its reason, not passed over.
                yield ImageInput(printable(prefix + entry.name), entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_image(path: str) -> bool:
    if os.path.splitext(path)[1].lower() in SUFFIXES:
        return True
    if not stat.S_ISREG(os.stat(path).st_mode):
        return False
    from PIL import Image

    try:
        with Image.open(path, formats=pillow_formats()):
            return True
    except Exception:
        # Pillow's plugins raise nearly anything on a file that is not theirs; then it is read as text.
        return False


def _read_list(path: str) -> list[ImageInput]:
    content = Path(path).read_bytes()
    if b"\0" in content:
        raise ValueError(f"{printable(path)} is neither an image in a known format, nor a folder, nor a text file")
    folder = os.path.dirname(path)
    inputs = []
    # Not splitlines(), which also breaks at characters that file names may hold.
    for line in content.decode("utf-8-sig", "surrogateescape").split("\n"):
        name = line.strip()
        if name and not name.startswith("#"):
            file = os.path.join(folder, name)
            # One key a file, however the list spells its path.
            key = PurePath(os.path.relpath(file, folder or os.curdir)).as_posix()
            inputs.append(ImageInput(printable(key), file))
    return inputs


def _endings() -> str:
    return " ".join(sorted(SUFFIXES))


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))
