"""Writing a store unit by unit, so that a run that was stopped anywhere goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dove_fast.atomic import is_temporary, make_directory, remove_temporaries, replacing
from dove_fast.errors import StoreError
from dove_fast.store.layout import (
    ERRORS_NAME,
    MANIFEST_NAME,
    StoreSettings,
    read_manifest,
    records_path,
    settings_differences,
    settings_id,
    tokens_path,
    write_manifest,
)
from dove_fast.store.records import InputError, Unit, read_unit, write_records
from dove_fast.store.shard import ShardWriter

__all__ = ["StoreWriter"]

# How many settings an error message compares.
MAX_SETTINGS_NAMED = 5


class StoreWriter:
    """A store that is being written: which units are done, and writers for the others.

    Making one only reads: `StoreError` if `directory` holds another store or anything else. `begin` writes the
    manifest, `shard` one unit, `finish` the end; each of these raises `OSError` if the disk does.
    `environment` says what ran (versions, device); it is kept in the manifest and decides nothing.
    """

    def __init__(self, directory: Path, settings: StoreSettings, environment: Mapping[str, Any]) -> None:
        """Find out what is there."""
        self.directory = directory
        self.settings = settings
        self._plain = settings.to_dict()
        self._store = settings_id(self._plain)
        self._environments = [dict(environment)]
        self._units: dict[int, Unit] = {}
        self.complete = False
        if self._exists():
            self._read()

    def _exists(self) -> bool:
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            raise StoreError(f"{self.directory} exists and is not a directory; choose another output") from None
        if MANIFEST_NAME in names:
            return True
        # A run that was killed while it wrote its manifest leaves this much, and may go on.
        if all(is_temporary(name) for name in names):
            return False
        raise StoreError(f"{self.directory} is not empty and is no token store; choose another output")

    def _read(self) -> None:
        manifest = read_manifest(self.directory)
        differences = settings_differences(manifest["settings"], self._plain)
        if differences:
            old, new = manifest["settings"], self._plain
            if all(item.startswith("inputs") for item in differences):
                raise StoreError(
                    f"{self.directory} was made from other inputs ({old['inputs']}, now {new['inputs']}); "
                    "choose another output"
                )
            if all(item.startswith("fingerprint") for item in differences):
                raise StoreError(
                    f"{self.directory} was made with another checkpoint (fingerprint {old['fingerprint'][:15]}.., now "
                    f"{new['fingerprint'][:15]}..); choose another output, or the checkpoint that it was made with"
                )
            more = len(differences) - MAX_SETTINGS_NAMED
            shown = "; ".join(differences[:MAX_SETTINGS_NAMED]) + (f"; and {more} more" if more > 0 else "")
            raise StoreError(f"{self.directory} was made with other settings ({shown}); choose another output")
        earlier = manifest["environments"]
        self._environments = [*earlier, *(item for item in self._environments if item not in earlier)]
        for index in range(self.settings.units):
            unit = self._done(index)
            if unit is not None:
                self._units[index] = unit
        self.complete = manifest["complete"] and not self.missing

    def _done(self, index: int) -> Unit | None:
        unit = read_unit(records_path(self.directory, index))
        if unit is None or (unit.shard, unit.store) != (index, self._store):
            return None
        try:
            size = os.stat(tokens_path(self.directory, index)).st_size
        except FileNotFoundError:
            return None
        return unit if size == unit.tokens_bytes else None

    @property
    def missing(self) -> list[int]:
        """The units that are not done, in order."""
        return [index for index in range(self.settings.units) if index not in self._units]

    @property
    def errors(self) -> list[InputError]:
        """The inputs that were set aside by the units that are done, in input order."""
        return [error for _, unit in sorted(self._units.items()) for error in unit.errors]

    @property
    def records(self) -> int:
        """Images in the units that are done."""
        return sum(unit.records for unit in self._units.values())

    @property
    def tokens(self) -> int:
        """Tokens in the units that are done."""
        return sum(unit.tokens for unit in self._units.values())

    def begin(self) -> None:
        """Make the directory and its manifest, and remove what a killed run left behind."""
        make_directory(self.directory)
        remove_temporaries(self.directory)
        # Before the folders: a directory without a manifest that holds anything is not ours to write into.
        self._write_manifest(complete=False)
        for path in (self.directory / "tokens", self.directory / "records"):
            make_directory(path)
            remove_temporaries(path)

    @contextlib.contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Give a writer for unit `index`; at the end of the block the unit is done, or dropped if the block raised."""
        with replacing(tokens_path(self.directory, index)) as file:
            writer = ShardWriter(file, index, store=self._store, width=self.settings.width, dtype=self.settings.dtype)
            yield writer
            unit = writer.finish()
        write_records(records_path(self.directory, index), writer.rows, unit)
        self._units[index] = unit

    def write_errors(self) -> None:
        """Bring errors.jsonl up to date with the units that are done."""
        path = self.directory / ERRORS_NAME
        errors = self.errors
        if errors:
            with replacing(path) as file:
                for error in errors:
                    file.write(json.dumps(asdict(error), ensure_ascii=False).encode() + b"\n")
        else:
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write errors.jsonl, then the manifest that says complete. Every unit must be done."""
        if self.missing:
            raise StoreError(f"{self.directory} cannot be completed: units {self.missing} are not done")
        self.write_errors()
        self._write_manifest(complete=True)
        self.complete = True

    def _write_manifest(self, *, complete: bool) -> None:
        content: dict[str, Any] = {
            "complete": complete,
            "settings": self._plain,
            "environments": self._environments,
        }
        if complete:
            content["totals"] = {"records": self.records, "tokens": self.tokens, "errors": len(self.errors)}
            content["shards"] = [
                {
                    "tokens_file": tokens_path(Path(), index).as_posix(),
                    "records_file": records_path(Path(), index).as_posix(),
                    "first": sum_before,
                    "records": self._units[index].records,
                    "tokens": self._units[index].tokens,
                }
                for index, sum_before in enumerate(self._firsts())
            ]
        write_manifest(self.directory, content)

    def _firsts(self) -> list[int]:
        firsts, total = [], 0
        for index in range(self.settings.units):
            firsts.append(total)
            total += self._units[index].records
        return firsts
