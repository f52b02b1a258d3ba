"""Stores that earlier versions wrote are read for ever: one of each format lies beside this file."""

from __future__ import annotations

from pathlib import Path

import torch
from made_stores import image

from dove_fast import DOVEConfig, TokenStore


def test_format_1():
    store = TokenStore(Path(__file__).parent / "format-1")
    assert store.manifest["format_version"] == 1
    assert isinstance(store.config, DOVEConfig)
    assert store.keys == ["k0", "k2", "k3", "k4"]
    for record, index in zip(store, [0, 2, 3, 4], strict=True):
        values, row = image(index, "bfloat16", 6)
        assert torch.equal(record.tokens, values)
        for name in ("key", "source", "length", "width", "height", "eos_probability"):
            assert getattr(record, name) == getattr(row, name)
    assert store.ragged([3, 0]).host_lengths == (4, 1)
