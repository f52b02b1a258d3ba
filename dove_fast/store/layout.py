"""The token store on disk, format 2: names, the manifest, and the settings that decide its contents.

    manifest.json              settings, environments, and, once complete, the shards with counts and checksums
    tokens/00000.safetensors   values (total, d); cu_seqlens int32 (n + 1,); keys uint8, key_offsets int64 (n + 1,);
                               scales fp32 (total,) where values are int8; codes uint16 (n, N) where they were asked for
    records/00000.parquet      key, source, length, width, height, eos_probability, extra (JSON), shard, row
    errors.jsonl               one {"key", "source", "reason"} a line, when there are any
    .lock                      empty; who holds which lock on it is the operating system's to know

Shard i holds what came of unit i of the input, in input order, and depends on nothing but the unit and the settings.
Its records are written after its tokens, and carry its errors: their presence means that the unit is done. errors.jsonl
and the manifest's shard list follow from the records. Format 1 has no `extra`, scales, codes and checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dove_fast.atomic import replacing
from dove_fast.errors import StoreError

__all__ = [
    "DTYPES",
    "ERRORS_NAME",
    "FORMAT_VERSION",
    "LOCK_NAME",
    "MANIFEST_NAME",
    "METADATA_KEY",
    "TOKEN_DTYPES",
    "StoreSettings",
    "flat_settings",
    "hash_file",
    "read_manifest",
    "records_path",
    "settings_differences",
    "settings_id",
    "tokens_path",
    "write_manifest",
]

FORMAT = "dove_fast token store"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
ERRORS_NAME = "errors.jsonl"
LOCK_NAME = ".lock"
# The one metadata entry of a safetensors shard and of a Parquet table; its value is JSON.
METADATA_KEY = "dove_fast"

# What a model computes in, and what tokens are kept in: int8 with one scale a token.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKEN_DTYPES = {**DTYPES, "int8": torch.int8}
# Settings that format 1 does not have.
SINCE_FORMAT_2 = {"source", "units", "codes"}


@dataclass(frozen=True)
class StoreSettings:
    """Everything that decides a store's contents. Versions, device and batch size are not among it.

    Inputs are known by their keys: a picture that changes under its key while a job is stopped is not noticed.

    `source`: what kind of input, and how it is read. `dtype`: the tokens', a key of `TOKEN_DTYPES`. `codes`: the
    VQGAN's codes are kept too. `units`: how many; `shard_size`: inputs a unit at most, None where the input's own
    shards are the units. `inputs` counts the inputs, None where that is known at the end only;
    `inputs_sha256` is over what identifies them in order (`dove_fast.data.sources.hash_keys`).
    """

    config: dict[str, Any]
    fingerprint: str
    transform: dict[str, Any]
    source: dict[str, Any]
    dtype: str
    width: int
    codes: bool
    length: int | None
    max_length: int | None
    eos_threshold: float | None
    queries_sha256: str | None
    shard_size: int | None
    units: int
    inputs: int | None
    inputs_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON's types."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def tokens_path(directory: Path, index: int) -> Path:
    """Return the safetensors file of shard `index`."""
    return directory / "tokens" / f"{index:05d}.safetensors"


def records_path(directory: Path, index: int) -> Path:
    """Return the Parquet file of shard `index`."""
    return directory / "records" / f"{index:05d}.parquet"


def hash_file(path: Path) -> str:
    """Return the SHA-256, in hexadecimal, of a file's bytes. Raises `OSError`."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def settings_id(settings: Mapping[str, Any]) -> str:
    """Return a short name of the settings, which ties each shard to its store."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def settings_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one "name: old, now new" for each setting that differs; names inside the config are dotted."""
    before, after = dict(flat_settings(old)), dict(flat_settings(new))
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {before.get(name, 'absent')!r}, now {after.get(name, 'absent')!r}"
        for name in names
        if before.get(name, "absent") != after.get(name, "absent")
    ]


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings by name; those in a mapping of their own as `mapping.name`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest, by temporary file and rename; `content` is what follows the format's name and version."""
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    with replacing(directory / MANIFEST_NAME) as file:
        # A path that is no UTF-8 has surrogates, which become JSON's escapes of the same form.
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        file.write(text.encode(errors="backslashreplace") + b"\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check a store's manifest.

    Raises `FileNotFoundError` for no such directory; `StoreError` for one without a manifest, for a damaged manifest,
    and for the format of a later version.
    """
    if not directory.exists():
        raise FileNotFoundError(f"no token store at {directory.absolute()}")
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{directory} is not a token store: it has no {MANIFEST_NAME}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path} is not the manifest of a token store")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise StoreError(f"{path}: format_version must be a positive int, got {version!r}")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format_version {version}, this version of dove_fast reads up to {FORMAT_VERSION}; "
            "install a later version"
        )
    _check_shape(path, manifest)
    return manifest


def _check_shape(path: Path, manifest: dict[str, Any]) -> None:
    for name, kind in (("settings", dict), ("environments", list), ("complete", bool)):
        if not isinstance(manifest.get(name), kind):
            raise StoreError(f"{path}: {name} must be a {kind.__name__}, got {manifest.get(name)!r}")
    expected = set(StoreSettings.__dataclass_fields__)
    if manifest["format_version"] < 2:
        expected -= SINCE_FORMAT_2
    missing = sorted(expected - manifest["settings"].keys())
    if missing:
        raise StoreError(f"{path}: settings lack {', '.join(missing)}")
    if manifest["complete"] and not (
        isinstance(manifest.get("shards"), list) and isinstance(manifest.get("totals"), dict)
    ):
        raise StoreError(f"{path}: a complete store must list its shards and totals")
    if manifest["complete"]:
        for name in ("records", "tokens", "errors"):
            if not isinstance(manifest["totals"].get(name), int):
                raise StoreError(f"{path}: totals.{name} must be an int, got {manifest['totals'].get(name)!r}")
