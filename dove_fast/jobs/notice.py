"""A note beside files that a job writes: what they were made from, so that nobody's other files are taken for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dove_fast.atomic import is_temporary

__all__ = ["NOTICE_NAME", "check_output"]

NOTICE_NAME = ".dove-fast.json"


def check_output(target: Path, notice: dict[str, Any], *, holds_none: str, holds_other: str) -> None:
    """Raise `ValueError` unless `target` is absent, empty, or an earlier run's output with the same notice.

    `holds_none`, `holds_other`: what is wrong with a folder without a notice, and with one that has another.
    """
    try:
        names = [name for name in os.listdir(target) if not is_temporary(name)]
    except FileNotFoundError:
        return
    if not names:
        return
    try:
        earlier = json.loads((target / NOTICE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{target} is not empty and holds {holds_none}; choose another output") from None
    if earlier != notice:
        raise ValueError(f"{target} holds {holds_other}; choose another output")
