"""What a store may keep beside plain tokens: int8 with scales, codes, and what came with an image."""

from __future__ import annotations

import dataclasses

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stores import WIDTH, image, ragged
from made_stores import settings as store_settings

from dove_fast import DOVEConfig, TokenStore
from dove_fast.store.shard import quantize_tokens
from dove_fast.store.writer import StoreWriter

N = DOVEConfig.tiny().num_features


def written(directory, *, codes=None, extra=None, **changes):
    """Write a store of one unit with three images."""
    writer = StoreWriter(directory, store_settings(3, codes=codes is not None, **changes), {})
    writer.begin()
    rows, records = zip(*(image(index, "float32", WIDTH) for index in range(3)), strict=True)
    with writer.shard(0) as shard:
        shard.append(ragged(list(rows)), [dataclasses.replace(row, extra=extra) for row in records], codes)
    writer.finish()
    return TokenStore(directory), rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 40), st.floats(1e-30, 1e30), st.integers(0, 2**31))
def test_int8_is_within_half_a_step(tokens, width, scale, seed):
    values = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * scale
    small, scales = quantize_tokens(values)
    assert small.dtype == torch.int8
    assert scales.shape == (tokens,)
    # Half a step, and what fp32 rounds.
    assert bool(((small * scales[:, None] - values).abs() <= scales[:, None] * 0.5001).all())
    if tokens:
        assert bool((small.abs().amax(dim=1) == 127).all())


def test_int8_of_zeros_is_zeros():
    small, scales = quantize_tokens(torch.zeros(2, 3))
    assert torch.equal(small * scales[:, None], torch.zeros(2, 3))


def test_an_int8_store(tmp_path):
    store, rows = written(tmp_path / "s", dtype="int8")
    expected = [torch.mul(small, scales[:, None]) for small, scales in map(quantize_tokens, rows)]
    for record, values in zip(store, expected, strict=True):
        assert record.tokens.dtype == torch.float32
        assert torch.equal(record.tokens, values)
    assert torch.equal(store.ragged([2, 0]).values, torch.cat([expected[2], expected[0]]))
    assert store.ragged([]).values.dtype == store.dtype == torch.float32
    exact, kept = torch.cat(rows).double(), torch.cat(expected).double()
    error = float((kept - exact).norm() / exact.norm())
    assert store.manifest["totals"]["quantization_error"] == pytest.approx(error, rel=1e-6)
    assert 0 < error < 0.01
    tensors = safetensors.torch.load_file(tmp_path / "s/tokens/00000.safetensors")
    assert tensors["values"].dtype == torch.int8


def test_codes_of_sixteen_bits(tmp_path):
    codes = torch.arange(3 * N).reshape(3, N) * 7 % 65536
    codes[0, 0] = 65535
    store, rows = written(tmp_path / "s", codes=codes)
    assert store.has_codes
    for index, record in enumerate(store):
        assert record.codes.dtype == torch.int64
        assert torch.equal(record.codes, codes[index])
        assert torch.equal(record.tokens, rows[index])
    plain, _ = written(tmp_path / "plain")
    assert torch.equal(store.codes(-1), codes[2])
    assert not plain.has_codes
    with pytest.raises(ValueError, match="has no codes; dove-fast tokenize --codes"):
        plain.codes(0)
    assert plain[0].codes is None


def test_codes_have_to_be_there_where_they_are_kept(tmp_path):
    values, row = image(0, "float32", WIDTH)
    for name, kept, codes, text in (
        ("a", False, torch.zeros(2, N, dtype=torch.int64), rf"codes must be None, got \(2, {N}\)"),
        ("b", True, None, rf"codes must be \(1, {N}\), got None"),
    ):
        writer = StoreWriter(tmp_path / name, store_settings(3, codes=kept), {})
        writer.begin()
        with pytest.raises(ValueError, match=text), writer.shard(0) as shard:
            shard.append(ragged([values]), [row], codes)


def test_what_came_with_an_image(tmp_path):
    extra = {"txt": "ein Übel", "json": {"boxes": [[1, 2.5, 3, 4]], "none": None}, "cls": 5}
    store, _ = written(tmp_path / "s", extra=extra)
    assert store[1].extra == extra
    plain, _ = written(tmp_path / "plain")
    assert plain[1].extra is None
