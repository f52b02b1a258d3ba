"""Writing a store unit by unit, so that a run that was stopped anywhere goes on where it was."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dove_fast.atomic import is_temporary, make_directory, remove_temporaries, replacing
from dove_fast.config import DOVEConfig
from dove_fast.errors import StoreError
from dove_fast.store.claims import Claims
from dove_fast.store.layout import (
    ERRORS_NAME,
    FORMAT_VERSION,
    LOCK_NAME,
    MANIFEST_NAME,
    StoreSettings,
    hash_file,
    read_manifest,
    records_path,
    settings_differences,
    settings_id,
    tokens_path,
    write_manifest,
)
from dove_fast.store.records import InputError, Unit, read_table, read_unit, write_records
from dove_fast.store.replaced import set_back, settle
from dove_fast.store.shard import ShardWriter

__all__ = ["StoreWriter"]

# How many settings an error message compares.
MAX_SETTINGS_NAMED = 5
# Between tries to be the first job, where that one died.
ENTER_SECONDS = 0.05


class StoreWriter:
    """A store that is being written: which units are done, and writers for the others.

    Making one only reads: `StoreError` if `directory` holds another store or anything else. `begin` makes the store or
    joins those that write it, `shard` writes one unit, `finish` the end, `close` leaves; each of these raises `OSError`
    if the disk does. Between `claim` and `release` a unit is this writer's alone.
    `environment` says what ran (versions, device); it is kept in the manifest and decides nothing.

    `records`, `tokens`, `error_count`: images, their tokens and what was set aside in the units that are done. `kept`,
    after `finish`: the units that were done again and have fewer images than before, which are in `REPLACED_NAME`.
    """

    def __init__(self, directory: Path, settings: StoreSettings, environment: Mapping[str, Any]) -> None:
        """Find out what is there."""
        self.directory = directory
        self.settings = settings
        self._plain = settings.to_dict()
        self._store = settings_id(self._plain)
        self._environment = dict(environment)
        self._environments: list[dict[str, Any]] = []
        self._units: dict[int, Unit] = {}
        # In order, and without a look at all units for each.
        self._missing = dict.fromkeys(range(settings.units))
        self.records = self.tokens = self.error_count = 0
        self.kept: list[int] = []
        self._claims: Claims | None = None
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
        if all(is_temporary(name) or name == LOCK_NAME for name in names):
            return False
        raise StoreError(f"{self.directory} is not empty and is no token store; choose another output")

    def _read(self) -> None:
        manifest = read_manifest(self.directory)
        if manifest["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{self.directory} was written in format {manifest['format_version']}, which this version reads but "
                f"does not write (it writes {FORMAT_VERSION}); choose another output"
            )
        differences = settings_differences(manifest["settings"], self._plain)
        if differences:
            old, new = manifest["settings"], self._plain
            if all(item.startswith(("inputs", "units")) for item in differences):
                raise StoreError(
                    f"{self.directory} was made from other inputs ({_amount(old)}, now {_amount(new)}); "
                    "choose another output"
                )
            if all(item.startswith("fingerprint") for item in differences):
                raise StoreError(
                    f"{self.directory} was made with another checkpoint (fingerprint {old['fingerprint'][:15]}.., now "
                    f"{new['fingerprint'][:15]}..); choose another output, or the checkpoint that it was made with"
                )
            more = len(differences) - MAX_SETTINGS_NAMED
            # By the names of the options.
            differences = [re.sub("^dtype:", "token dtype:", item) for item in differences]
            shown = "; ".join(differences[:MAX_SETTINGS_NAMED]) + (f"; and {more} more" if more > 0 else "")
            raise StoreError(f"{self.directory} was made with other settings ({shown}); choose another output")
        self._environments = manifest["environments"]
        self.refresh()
        self.complete = manifest["complete"] and not self.missing

    def refresh(self, units: Collection[int] | None = None) -> None:
        """Find the units that others have finished, all or some of them."""
        for index in self.missing if units is None else units:
            self.is_done(index)

    def _add(self, index: int, unit: Unit) -> None:
        self._units[index] = unit
        del self._missing[index]
        self.records += unit.records
        self.tokens += unit.tokens
        self.error_count += len(unit.errors)

    def _set_back(self, units: Collection[int]) -> None:
        for index in units:
            set_back(self.directory, index)
            unit = self._units.pop(index, None)
            if unit is not None:
                self.records -= unit.records
                self.tokens -= unit.tokens
                self.error_count -= len(unit.errors)
        self._missing = {index: None for index in range(self.settings.units) if index not in self._units}

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
        return list(self._missing)

    @property
    def units_done(self) -> int:
        """How many units are done."""
        return len(self._units)

    @property
    def units_with_errors(self) -> list[int]:
        """The units that are done and set inputs aside, in order."""
        return sorted(index for index, unit in self._units.items() if unit.errors)

    def is_done(self, index: int) -> bool:
        """Tell whether a unit is done, by whomever."""
        if index not in self._units:
            unit = self._done(index)
            if unit is not None:
                self._add(index, unit)
        return index in self._units

    @property
    def errors(self) -> list[InputError]:
        """The inputs that were set aside by the units that are done, in input order."""
        return [error for _, unit in sorted(self._units.items()) for error in unit.errors]

    @property
    def quantization_error(self) -> float | None:
        """`||int8 - tokens|| / ||tokens||` over the units that are done; None where tokens are kept as they are."""
        norm = sum(unit.squared_norm for unit in self._units.values())
        error = sum(unit.squared_error for unit in self._units.values())
        return math.sqrt(error / norm) if norm else None

    def begin(self, *, join: bool = False, again: Collection[int] | None = None) -> None:
        """Make the directory and its manifest, and remove what a killed run left behind; or join who is at work there.

        `again`: units that are done once more, also of a complete store; what they were is kept until `finish`.
        Raises `StoreError` if another job is at work and `join` is false, or there is something to do `again`.
        """
        make_directory(self.directory)
        self._claims = claims = self._entered(join)
        with claims.manifest():
            if self._exists():
                # What another job did between the making of this writer and its lock.
                self._read()
            if again is not None:
                if not claims.alone:
                    raise StoreError(f"{self.directory} is being written by another job; wait for it to do units again")
                self.complete = False
            if self.complete:
                return
            if claims.alone:
                remove_temporaries(self.directory)
            # Before the folders: a directory without a manifest that holds anything is not ours to write into. And
            # before units are set back: nobody takes a store for whole that lacks them.
            self._write_manifest(complete=False)
        if claims.alone:
            for path in (self.directory / "tokens", self.directory / "records"):
                make_directory(path)
                remove_temporaries(path)
            self._set_back(again or ())
            claims.share()

    def _entered(self, join: bool) -> Claims:
        while True:
            claims = Claims(self.directory, join=join)
            made = all((self.directory / name).exists() for name in (MANIFEST_NAME, "tokens", "records"))
            if claims.alone or made:
                return claims
            # The first job died before it had made the store: somebody else is the first one now.
            claims.close()
            time.sleep(ENTER_SECONDS)

    def claim(self, index: int) -> bool:
        """Take unit `index`; false if it is done, or another job's at the moment."""
        claims = self._at_work()
        if not claims.claim(index):
            return False
        if self.is_done(index):
            claims.release(index)
            return False
        return True

    def release(self, index: int) -> None:
        """Give a unit back that `claim` took, done or not."""
        self._at_work().release(index)

    def close(self) -> None:
        """Leave the store to others."""
        if self._claims is not None:
            self._claims.close()
            self._claims = None

    def _at_work(self) -> Claims:
        if self._claims is None:
            raise RuntimeError("begin comes first")
        return self._claims

    @contextlib.contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Give a writer for unit `index`; at the end of the block the unit is done, or dropped if the block raised."""
        with replacing(tokens_path(self.directory, index)) as file:
            writer = ShardWriter(
                file,
                index,
                store=self._store,
                width=self.settings.width,
                dtype=self.settings.dtype,
                codes=self._codes,
            )
            yield writer
            unit = writer.finish()
        write_records(records_path(self.directory, index), writer.rows, unit)
        self._add(index, unit)

    @property
    def _codes(self) -> int | None:
        config = DOVEConfig.from_dict(self.settings.config)
        return config.num_features if self.settings.codes else None

    def done_column(self, name: str, *, but: Set[int] = frozenset()) -> Iterator[tuple[int, list[Any]]]:
        """Yield each unit that is done, but for some, with one of its records' columns, by `RECORD_COLUMNS`' name.

        Raises `StoreError` for damaged records.
        """
        for index in sorted(self._units.keys() - but):
            yield index, read_table(records_path(self.directory, index), [name]).column(name).to_pylist()

    def write_errors(self, pending: Sequence[InputError] = ()) -> None:
        """Bring errors.jsonl up to date with the units that are done, and what a unit in hand set aside."""
        path = self.directory / ERRORS_NAME
        errors = [*self.errors, *pending]
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
        # All units are done, so nobody has one in hand: this is what jobs left that were killed beside others.
        for folder in ("tokens", "records"):
            remove_temporaries(self.directory / folder)
        self.write_errors()
        self.kept = settle(self.directory, self._units)
        with self._at_work().manifest():
            self._environments = read_manifest(self.directory)["environments"]
            self._write_manifest(complete=True)
        self.complete = True

    def _write_manifest(self, *, complete: bool) -> None:
        if self._environment not in self._environments:
            self._environments.append(self._environment)
        content: dict[str, Any] = {
            "complete": complete,
            "settings": self._plain,
            "environments": self._environments,
        }
        if complete:
            content["totals"] = {"records": self.records, "tokens": self.tokens, "errors": self.error_count}
            if self.quantization_error is not None:
                content["totals"]["quantization_error"] = self.quantization_error
            content["shards"] = [
                {
                    "tokens_file": tokens_path(Path(), index).as_posix(),
                    "records_file": records_path(Path(), index).as_posix(),
                    "first": sum_before,
                    "records": self._units[index].records,
                    "tokens": self._units[index].tokens,
                    "tokens_bytes": self._units[index].tokens_bytes,
                    "tokens_sha256": self._units[index].tokens_sha256,
                    "records_sha256": hash_file(records_path(self.directory, index)),
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


def _amount(settings: Mapping[str, Any]) -> str:
    return f"{settings['units']} shards" if settings["inputs"] is None else str(settings["inputs"])
