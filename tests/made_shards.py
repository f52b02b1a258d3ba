"""WebDataset shards and Parquet files made of the pictures in a folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Write an uncompressed archive of these files, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def pictures(folder: Path) -> list[Path]:
    """Return the pictures below a folder, in the order of their keys."""
    return sorted(path for path in folder.rglob("*.*") if path.suffix in (".jpg", ".png"))


def write_shards(folder: Path, photos: Path, size: int = 4, *, restart: bool = False) -> list[Path]:
    """Write shards of `size` samples: picture, txt and json; numbered through, or from 0 in every shard."""
    files = pictures(photos)
    shards = []
    for first in range(0, len(files), size):
        members = []
        for index, file in enumerate(files[first : first + size]):
            number = index if restart else first + index
            members += [
                (f"{number:04d}{file.suffix}", file.read_bytes()),
                (f"{number:04d}.txt", f"picture {number}".encode()),
                (f"{number:04d}.json", json.dumps({"label": number % 3}).encode()),
            ]
        shards.append(write_tar(folder / f"train-{first // size:03d}.tar", members))
    return shards


def write_parquet(
    path: Path, photos: Path, *, row_group_size: int = 3, columns: Mapping[str, list] | None = None
) -> Path:
    """Write a Parquet file with a column `image` and others."""
    files = pictures(photos)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": [file.read_bytes() for file in files], **(columns or {})})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path
