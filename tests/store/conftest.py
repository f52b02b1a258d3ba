"""A small store for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_stores import write


@pytest.fixture
def store(tmp_path) -> Path:
    """A complete store of eight images in three shards."""
    return write(tmp_path / "store")
