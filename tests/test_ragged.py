"""RaggedTokens: round trips, views, invariants, and no synchronisation on a GPU."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dove_fast import RaggedTokens

WIDTH = 3
row_lengths = st.lists(st.integers(0, 6), max_size=7)


def make_rows(lengths: list[int], device: str = "cpu") -> list[Tensor]:
    values = torch.arange(sum(lengths) * WIDTH, dtype=torch.float32, device=device).view(-1, WIDTH)
    return list(values.split(lengths)) if lengths else []


def make(lengths: list[int], device: str = "cpu") -> RaggedTokens:
    values = torch.arange(sum(lengths) * WIDTH, dtype=torch.float32, device=device).view(-1, WIDTH)
    cu_seqlens = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)
    return RaggedTokens(values, cu_seqlens, max(lengths, default=0))


def assert_rows(tokens: RaggedTokens, rows: list[Tensor]) -> None:
    """The content is these rows, and the invariants hold: the checking constructor takes all its parts."""
    assert len(tokens) == len(rows)
    for mine, row in zip(tokens, rows, strict=True):
        assert torch.equal(mine, row)
    again = RaggedTokens(tokens.values, tokens.cu_seqlens, tokens.max_seqlen)
    assert again.host_lengths == tokens.host_lengths
    assert tokens.lengths.tolist() == list(tokens.host_lengths) == [len(row) for row in rows]
    assert tokens.lengths.dtype == torch.int64
    assert tokens.lengths.device == tokens.values.device


@settings(max_examples=60, deadline=None)
@given(lengths=row_lengths, extra=st.integers(0, 3))
def test_padded_round_trip(lengths, extra):
    tokens = make(lengths)
    assert_rows(tokens, make_rows(lengths))
    padded, back = tokens.to_padded()
    assert padded.shape == (len(lengths), max(lengths, default=0), WIDTH)
    assert_rows(RaggedTokens.from_padded(padded, back), make_rows(lengths))
    padded, back = tokens.to_padded(tokens.max_seqlen + extra)
    assert padded.shape == (len(lengths), max(lengths, default=0) + extra, WIDTH)
    for row, length, original in zip(padded, lengths, make_rows(lengths), strict=True):
        assert torch.equal(row[:length], original)
        assert row[length:].eq(0).all()
    assert_rows(RaggedTokens.from_padded(padded, back.tolist()), make_rows(lengths))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), lengths=row_lengths)
def test_slices(data, lengths):
    index = data.draw(st.slices(len(lengths)))
    tokens = make(lengths)[index]
    assert_rows(tokens, make_rows(lengths)[index])
    assert tokens.values.shape[1] == WIDTH
    assert_rows(tokens[::-1], make_rows(lengths)[index][::-1])


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(row_lengths, min_size=1, max_size=4))
def test_cat(parts):
    tokens = RaggedTokens.cat([make(lengths) for lengths in parts])
    assert_rows(tokens, [row for lengths in parts for row in make_rows(lengths)])
    start = 0
    for lengths in parts:
        assert_rows(tokens[start : start + len(lengths)], make_rows(lengths))
        start += len(lengths)


@settings(max_examples=40, deadline=None)
@given(lengths=row_lengths)
def test_nested_round_trip(lengths):
    nested = make(lengths).to_nested()
    assert nested.layout == torch.jagged
    assert nested.is_nested
    assert [row.shape[0] for row in nested.unbind()] == lengths
    assert_rows(RaggedTokens.from_nested(nested), make_rows(lengths))


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_from_rows(lengths):
    assert_rows(RaggedTokens.from_rows(make_rows(lengths)), make_rows(lengths))


def test_from_rows_refuses_rows_that_differ():
    row = torch.zeros(2, 3)
    for rows, error, message in (
        ([], ValueError, "from_rows needs at least one row, got none"),
        ([row, [1.0]], TypeError, "a row must be a tensor, got list"),
        ([row, row[0]], ValueError, r"a row must have shape \(m, d\), got \(3,\)"),
        ([row, torch.zeros(2, 4)], ValueError, "from_rows needs one width, got 3 and 4"),
        ([row, row.double()], TypeError, r"from_rows needs one dtype, got torch\.float32 and torch\.float64"),
    ):
        with pytest.raises(error, match=message):
            RaggedTokens.from_rows(rows)


def test_nested_with_holes():
    values = torch.arange(30.0).view(10, 3)
    offsets, lengths = torch.tensor([0, 4, 4, 10]), torch.tensor([2, 0, 5])
    nested = torch.nested.nested_tensor_from_jagged(values, offsets=offsets, lengths=lengths)
    assert_rows(RaggedTokens.from_nested(nested), [values[:2], values[:0], values[4:9]])
    narrowed = torch.nested.narrow(values.view(2, 5, 3), 1, torch.tensor([1, 0]), torch.tensor([3, 4]), torch.jagged)
    assert_rows(RaggedTokens.from_nested(narrowed), [values[1:4], values[5:9]])


def test_from_nested_refuses_other_layouts():
    rows = [torch.ones(2, 3), torch.ones(1, 3)]
    with pytest.raises(TypeError, match=r"nested tensor of layout torch.jagged, got layout torch.strided"):
        RaggedTokens.from_nested(torch.ones(2, 3))
    with pytest.raises(TypeError, match="got list"):
        RaggedTokens.from_nested(rows)
    jagged = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"nested must have shape \(B, j, d\) with ragged j"):
        RaggedTokens.from_nested(jagged.transpose(1, 2))
    with pytest.raises(ValueError, match=r"nested must have shape \(B, j, d\)"):
        RaggedTokens.from_nested(jagged.unsqueeze(-1))


def test_rows_and_slices_are_views():
    tokens = make([2, 0, 3])
    tokens[2][0, 0] = -1
    tokens[1:][1][1, 1] = -2
    assert tokens.values[2, 0] == -1
    assert tokens.values[3, 1] == -2
    assert torch.equal(tokens[-1], tokens[2])
    assert torch.equal(tokens[-3], tokens[0])
    for index in (3, -4):
        with pytest.raises(IndexError):
            tokens[index]
    with pytest.raises(TypeError):
        tokens["0"]


def test_gradients_flow():
    values = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

    def ways(values: Tensor) -> list[Tensor]:
        tokens = RaggedTokens(values, cu_seqlens, 3)
        padded, lengths = tokens.to_padded(4)
        again = RaggedTokens.from_padded(padded * 2, lengths)
        nested = RaggedTokens.from_nested(tokens.to_nested() * 3)
        joined = RaggedTokens.cat([tokens[1:], tokens[::-2]]).values
        return [padded, again.values, nested.values, joined, tokens[2], *tokens]

    for index in range(len(ways(values))):
        assert torch.autograd.gradcheck(lambda v, i=index: ways(v)[i], values)


def test_to():
    tokens = make([2, 1])
    half = tokens.to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16
    assert half.cu_seqlens.dtype == torch.int32
    assert_rows(half, [row.bfloat16() for row in make_rows([2, 1])])
    assert tokens.to(dtype=torch.float64).values.dtype == torch.float64
    meta = tokens.to("meta", torch.float16)
    assert (meta.values.device.type, meta.cu_seqlens.device.type, meta.values.dtype) == ("meta", "meta", torch.float16)
    assert meta.host_lengths == (2, 1)
    assert tokens.to("cpu") is tokens
    assert tokens.to(device=torch.device("cpu"), dtype=torch.float32) is tokens


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(copied):
    tokens = make([2, 0, 1])
    assert_rows(copied(tokens), make_rows([2, 0, 1]))
    assert copied(tokens).max_seqlen == 2


def test_saves_with_torch():
    buffer = io.BytesIO()
    torch.save(make([1, 2]), buffer)
    buffer.seek(0)
    assert_rows(torch.load(buffer, weights_only=False), make_rows([1, 2]))


def _identity(batch: list[RaggedTokens]) -> RaggedTokens:
    return RaggedTokens.cat(batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(workers):
    tokens = make([2, 0, 1, 3])
    items = [tokens[row : row + 1] for row in range(4)]
    loader = torch.utils.data.DataLoader(items, batch_size=4, collate_fn=_identity, num_workers=workers)
    (batch,) = loader
    assert_rows(batch, make_rows([2, 0, 1, 3]))


def test_frozen_short_and_compared_by_identity():
    tokens = make([2, 1])
    with pytest.raises(AttributeError):
        tokens.values = tokens.values
    assert repr(tokens) == "RaggedTokens(2 rows, values (3, 3) float32 on cpu, max_seqlen 2, lengths [2, 1])"
    assert len(repr(make([1] * 1000))) < 150
    assert tokens != make([2, 1])
    assert tokens in {tokens}


VALUES = torch.zeros(4, WIDTH)
OFFSETS = torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], OFFSETS, 3), TypeError, "values must be a tensor, got list"),
        ((torch.zeros(4), OFFSETS, 3), ValueError, r"values must have shape \(total, d\), got \(4,\)"),
        ((VALUES, [0, 1, 4], 3), TypeError, "cu_seqlens must be a tensor, got list"),
        ((VALUES, OFFSETS.long(), 3), TypeError, "cu_seqlens must be int32, got torch.int64"),
        ((VALUES, OFFSETS[:0], 3), ValueError, r"cu_seqlens must have shape \(B \+ 1,\), got \(0,\)"),
        ((VALUES, OFFSETS[None], 3), ValueError, r"cu_seqlens must have shape \(B \+ 1,\), got \(1, 3\)"),
        ((VALUES, OFFSETS.to("meta"), 3), ValueError, "cu_seqlens must be on cpu like values, got meta"),
        ((VALUES, OFFSETS + 1, 3), ValueError, "cu_seqlens must start with 0, got 1"),
        ((VALUES, OFFSETS[[0, 2, 1, 2]], 4), ValueError, "must not decrease, got 4 and then 1 in row 1"),
        ((VALUES[:3], OFFSETS, 3), ValueError, "must end with the 3 entries of values, got 4"),
        ((VALUES, OFFSETS, 4), ValueError, "max_seqlen must be the longest row's length 3, got 4"),
        ((VALUES, OFFSETS, 2), ValueError, "max_seqlen must be the longest row's length 3, got 2"),
        ((VALUES, OFFSETS, 3.0), TypeError, "max_seqlen must be an int, got float"),
        ((VALUES[:0], OFFSETS[:1], 1), ValueError, "max_seqlen must be the longest row's length 0, got 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_constructor_checks(arguments, error, message):
    with pytest.raises(error, match=message):
        RaggedTokens(*arguments)


def test_wrong_use():
    tokens = make([2, 3])
    with pytest.raises(ValueError, match="length must be at least the longest row's 3, got 2"):
        tokens.to_padded(2)
    with pytest.raises(ValueError, match=r"padded must have shape \(B, L, d\), got \(2, 3\)"):
        RaggedTokens.from_padded(torch.zeros(2, 3), [1, 1])
    with pytest.raises(ValueError, match="lengths must be between 0 and 3, got 4 in row 1"):
        RaggedTokens.from_padded(torch.zeros(2, 3, 4), [1, 4])
    with pytest.raises(ValueError, match="cat needs at least one RaggedTokens, got none"):
        RaggedTokens.cat([])
    with pytest.raises(TypeError, match="cat takes RaggedTokens, got Tensor"):
        RaggedTokens.cat([tokens, tokens.values])
    with pytest.raises(TypeError, match=r"cat needs one dtype, got torch.float32 and torch.float64"):
        RaggedTokens.cat([tokens, tokens.to(torch.float64)])
    with pytest.raises(ValueError, match="cat needs one device, got cpu and meta"):
        RaggedTokens.cat([tokens, tokens.to("meta")])
    with pytest.raises(ValueError, match="cat needs one width, got 3 and 5"):
        RaggedTokens.cat([tokens, RaggedTokens.from_padded(torch.zeros(1, 1, 5), [1])])


@pytest.mark.gpu
def test_gpu_never_synchronises():
    tokens = make([2, 0, 3], "cuda")
    padded, _ = tokens.to_padded()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [
            RaggedTokens.from_padded(padded, [2, 0, 3]),
            RaggedTokens.cat([tokens, tokens]),
            tokens[1:],
            tokens[::2],
            tokens.to(torch.bfloat16),
        ]
        for item in (*made, tokens):
            _ = item[0], item.lengths, item.to_padded(5), item.to_nested(), repr(item), list(item)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for item in made:
        assert item.cu_seqlens.device.type == "cuda"
        assert_rows(item, list(item))


@pytest.mark.gpu
def test_gpu_moves():
    tokens = make([2, 0, 3])
    pinned = tokens.pin_memory()
    assert pinned.values.is_pinned()
    assert pinned.cu_seqlens.is_pinned()
    moved = pinned.to("cuda", non_blocking=True)
    assert_rows(moved, make_rows([2, 0, 3], "cuda"))
    assert_rows(moved.to("cpu"), make_rows([2, 0, 3]))
