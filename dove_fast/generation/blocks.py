"""The generator on ragged rows with a cache: the prefix of new rows, then blocks of steps of the rows that are alive.

Shape suffixes: R rows, P prefix positions and S steps of all rows of a call, one row behind the other; d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dove_fast.generation.cache import GeneratorCache
from dove_fast.generation.linear import PackedLinears, is_plain
from dove_fast.generation.steps import StepTables
from dove_fast.models.derived import Derived
from dove_fast.models.gpt_neox import Attention, GPTNeoX, Layer, add_and_normalise, rotate
from dove_fast.ops import prefix_attention

__all__ = ["Positions", "advance", "by_row", "last_keys_and_values", "prefill"]


@dataclass(frozen=True)
class Positions:
    """Which positions of which rows a call computes; the tensors are on the cache's device.

    cu_seqlens: (R + 1,) int32; slots, starts: (R,) int32, as `ops.prefix_attention` takes them; steps: (R,) int32, the
    step that each row starts with. For every entry: entry_slots, entry_positions, entry_steps: (total,) int64.
    """

    cu_seqlens: Tensor
    slots: Tensor
    starts: Tensor
    steps: Tensor
    entry_slots: Tensor
    entry_positions: Tensor
    entry_steps: Tensor
    max_seqlen: int

    @classmethod
    def from_rows(cls, rows: Tensor, count: int, total: int, max_seqlen: int) -> Positions:
        """Build from `by_row`'s tensor of `count` rows, where that lies: on a GPU without a read or an upload.

        They have `total` positions, none more than `max_seqlen`.
        """
        slots, prefixes, steps, offsets = rows.unbind()
        cu_seqlens = offsets[: count + 1]
        entries = torch.arange(total, device=rows.device, dtype=rows.dtype)
        row = torch.searchsorted(cu_seqlens[1:], entries, right=True)
        entry_steps = entries + (steps - offsets)[row]
        return cls(
            cu_seqlens=cu_seqlens,
            slots=slots[:count],
            starts=(prefixes + steps)[:count],
            steps=steps[:count],
            entry_slots=slots[row].long(),
            entry_positions=(entry_steps + prefixes[row]).long(),
            entry_steps=entry_steps.long(),
            max_seqlen=max_seqlen,
        )


def by_row(
    slots: Sequence[int],
    counts: Sequence[int],
    *,
    prefixes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Return (4, R + 1 or more) int32 on the host: each row's slot, prefix and step, and the offsets of the counts.

    Row r has counts[r] positions behind the prefixes[r] + steps[r] that it has already, or none. A position's step is
    its place behind prefixes[r] positions. Each of the four starts at a multiple of 16 bytes, whatever R is: kernels
    are compiled for that.
    """
    rows = len(counts)
    table = np.zeros((4, -(-(rows + 1) // 4) * 4), dtype=np.int32)
    table[0, :rows] = slots
    if prefixes is not None:
        table[1, :rows] = prefixes
    if steps is not None:
        table[2, :rows] = steps
    table[3, 1 : rows + 1] = np.cumsum(counts)
    return torch.from_numpy(table)


def _attend(
    attention: Attention, qkv: Tensor, cache: GeneratorCache, layer: int, positions: Positions, linears: PackedLinears
) -> Tensor:
    """Attend from qkv (total, 3 d) to the rows' caches and to itself, and write its keys and values there."""
    q, k, v = qkv.view(qkv.shape[0], attention.num_heads, 3, -1).unbind(2)
    attended = prefix_attention(
        q,
        k,
        v,
        positions.cu_seqlens,
        max_seqlen=positions.max_seqlen,
        cos=cache.cos,
        sin=cache.sin,
        k_cache=cache.keys[layer],
        v_cache=cache.values[layer],
        slots=positions.slots,
        starts=positions.starts,
    )
    return linears(attention.dense, attended.flatten(1))


def _keys_and_values(weight: Tensor, *bias: Tensor, num_heads: int) -> nn.Linear:
    rows = weight.view(num_heads, 3, -1, weight.shape[1])[:, 1:].reshape(-1, weight.shape[1])
    with torch.device("meta"):
        linear = nn.Linear(rows.shape[1], rows.shape[0], bias=bool(bias))
    linear.weight = nn.Parameter(rows, requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(bias[0].view(num_heads, 3, -1)[:, 1:].reshape(-1), requires_grad=False)
    return linear


def last_keys_and_values() -> Derived:
    """Return what keeps a linear layer of the rows of the last layer's projection that give keys and values."""
    return Derived(_keys_and_values)


def prefill(
    generator: GPTNeoX,
    embeddings: Tensor,
    positions: Positions,
    cache: GeneratorCache,
    kept_projection: Derived,
    linears: PackedLinears,
) -> None:
    """Fill the caches of new rows with the keys and values of their prefixes, embeddings (P, d).

    The last layer computes nothing else: its queries, attention and MLP feed nothing at these positions.
    """
    x = embeddings
    addends: tuple[Tensor, ...] = ()
    layers = [cast("Layer", layer) for layer in generator.layers]
    for index, layer in enumerate(layers[:-1]):
        x, for_attention, for_mlp = add_and_normalise(x, addends, layer.input_layernorm, layer.post_attention_layernorm)
        assert for_mlp is not None
        qkv = linears(layer.attention.query_key_value, for_attention)
        addends = (linears.mlp(layer.mlp, for_mlp), _attend(layer.attention, qkv, cache, index, positions, linears))
    last = layers[-1]
    _, for_attention, _ = add_and_normalise(x, addends, last.input_layernorm)
    projection, num_heads = last.attention.query_key_value, last.attention.num_heads
    if isinstance(projection, nn.Linear) and is_plain(projection):
        sources = (projection.weight,) if projection.bias is None else (projection.weight, projection.bias)
        both = linears(kept_projection(*sources, num_heads=num_heads), for_attention)
        k, v = both.view(both.shape[0], num_heads, 2, -1).unbind(2)
    else:
        # Somebody's adapter or quantised layer: what it computes is its own affair.
        _, k, v = projection(for_attention).view(len(for_attention), num_heads, 3, -1).unbind(2)
    at = (positions.entry_slots, slice(None), positions.entry_positions)
    turn = positions.entry_positions
    cache.keys[-1][at] = rotate(k, cache.cos[turn][:, None], cache.sin[turn][:, None])
    cache.values[-1][at] = v


def advance(
    generator: GPTNeoX, tables: StepTables, positions: Positions, cache: GeneratorCache, linears: PackedLinears
) -> Tensor:
    """Run a block of steps of rows whose earlier positions are cached -> final states (S, d)."""
    steps = positions.entry_steps
    addends: tuple[Tensor, ...] = ()
    x = tables.embeddings[steps]
    qkv, mlp = tables.qkv[steps], tables.mlp[steps]
    for index, layer in enumerate(cast("Sequence[Layer]", generator.layers)):
        if index > 0:
            x, for_attention, for_mlp = add_and_normalise(
                x, addends, layer.input_layernorm, layer.post_attention_layernorm
            )
            assert for_mlp is not None
            qkv = linears(layer.attention.query_key_value, for_attention)
            mlp = linears.mlp(layer.mlp, for_mlp)
        addends = (mlp, _attend(layer.attention, qkv, cache, index, positions, linears))
    _, states, _ = add_and_normalise(x, addends, generator.final_layer_norm)
    return states
