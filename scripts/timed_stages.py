"""Stages that run one behind the other, each within a limit of its own, with a log each and one summary.json.

What comes of a stage costs the others nothing: a command that ends late is stopped with all that it started, a stage's
own mistake is its record, and summary.json is written anew after each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = str(ROOT / "scripts")

# Seconds for everything; what ends late is killed after GRACE, which lies within its limit.
TOTAL, GRACE = 465.0, 8.0

Record = dict[str, Any]


class Ended(NamedTuple):
    """How a command ended: its exit code, negative for a signal, and whether its limit stopped it."""

    code: int
    stopped: bool


@dataclass
class Check:
    """One run: where everything is, what time there is, and what is known so far."""

    out: Path
    root: Path = ROOT
    total: float = TOTAL
    grace: float = GRACE
    summary: Record = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.total - (time.monotonic() - self.started)

    def command(self, stage: str, command: Sequence[str | Path], limit: float, **environment: str) -> Ended:
        """Run a command, its output behind the stage's log; interrupt it shortly before `limit`, and then kill it.

        An interrupted pytest still writes its results.
        """
        words = [str(word) for word in command]
        with (self.out / f"{stage}.log").open("ab") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                cwd=self.root,
                env={**self.environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stopped = False
            try:
                try:
                    process.wait(max(limit - self.grace, 0.1))
                except subprocess.TimeoutExpired:
                    stopped = True
                    os.killpg(process.pid, signal.SIGINT)
                    process.wait(self.grace)
            except subprocess.TimeoutExpired:
                pass
            finally:
                # With all that it started, which may outlive it.
                _kill(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.grace)
            return Ended(-signal.SIGKILL if process.returncode is None else process.returncode, stopped)

    def environment(self) -> dict[str, str]:
        """Return the stages' environment: this tree first, no network, kernels compiled and not interpreted."""
        found = {
            key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "DOVE_FAST_BACKEND")
        }
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.root), SCRIPTS, found.get("PYTHONPATH"))))
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        return found | offline | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def ask(self, code: str) -> Any:
        """Return what Python prints as JSON, in a process of its own; None where it fails."""
        command, environment = [sys.executable, "-c", code], self.environment()
        try:
            done = subprocess.run(command, capture_output=True, env=environment, timeout=60, cwd=self.root, check=True)
            return json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError):
            return None

    def write(self) -> None:
        """Write what is known, whole or not at all."""
        self.summary["seconds"] = round(time.monotonic() - self.started, 1)
        temporary = self.out / "summary.json.part"
        temporary.write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.out / "summary.json")


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class Stage(NamedTuple):
    """A part of the check. `run(check, limit)` returns its record, with a `status` and, where it needs one, a `note`.

    It gets `most` seconds if as many are left when every later stage has its `least`.
    """

    name: str
    run: Callable[[Check, float], Record]
    most: float
    least: float


def run_stages(check: Check, stages: Sequence[Stage]) -> int:
    """Run all stages, whatever comes of each, and return the exit code."""
    records = check.summary["stages"] = {}
    check.write()
    for index, stage in enumerate(stages):
        start = time.monotonic()
        limit = min(stage.most, check.left() - sum(later.least for later in stages[index + 1 :]))
        (check.out / f"{stage.name}.log").touch()
        if limit <= check.grace:
            record: Record = {"status": "failed", "note": "no time was left for it"}
        else:
            try:
                record = stage.run(check, limit)
            except Exception as error:  # a stage's own mistake must not cost the others
                record = {"status": "failed", "note": f"gpu_check itself: {type(error).__name__}: {error}"}
        record |= {"seconds": round(time.monotonic() - start, 1), "limit_seconds": round(limit, 1)}
        records[stage.name] = record
        check.write()
        print(f"{stage.name}: {_line(record)}", flush=True)
    failed = [name for name, record in records.items() if record["status"] == "failed"]
    passed = not failed and records.get("tests", {}).get("status") == "passed"
    check.summary["passed"] = passed
    check.write()
    return 0 if passed else 1


def _line(record: Record) -> str:
    parts = [f"{record['status']} in {record['seconds']:.0f} s"]
    if counts := record.get("counts"):
        parts.append(", ".join(f"{number} {name}" for name, number in counts.items()))
    return "; ".join([*parts, *record.get("left_out", []), *filter(None, [record.get("note")])])
