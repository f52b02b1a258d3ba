"""Numbers in sentences."""

from __future__ import annotations

import pytest

from dove_fast.words import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (4096, "4,096 tokens"), (-1, "-1 tokens")]
)
def test_counted(number, text):
    assert counted(number, "token") == text
