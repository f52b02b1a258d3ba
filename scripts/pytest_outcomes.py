"""A pytest plugin that writes each test's outcome when it is known, a JSON line each, to the file OUTCOMES names.

A run that is stopped, or that dies, leaves those it had.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Write a call, or what went wrong before or after it."""
    if report.when == "call" or not report.passed:
        _write(report, "errors" if report.failed and report.when != "call" else report.outcome)


def pytest_collectreport(report: Any) -> None:
    """Write a file that cannot be collected."""
    if report.failed:
        _write(report, "errors")


def _write(report: Any, outcome: str) -> None:
    # xdist's workers hand their reports to the process that started them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    reason = report.longrepr[2] if outcome == "skipped" and isinstance(report.longrepr, tuple) else ""
    line = {"test": report.nodeid, "outcome": outcome, "reason": reason.removeprefix("Skipped: ")}
    with Path(os.environ["OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
