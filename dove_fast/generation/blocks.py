"""The generator on ragged rows with a cache: the prefix of new rows, then blocks of steps of the rows that are alive.

Shape suffixes: R rows, P prefix positions and S steps of all rows of a call, one row behind the other; d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dove_fast.generation.cache import GeneratorCache
from dove_fast.generation.steps import StepTables
from dove_fast.models.derived import Derived
from dove_fast.models.gpt_neox import Attention, GPTNeoX, Layer, add_and_normalise, rotate
from dove_fast.ops import prefix_attention

__all__ = ["Positions", "advance", "last_keys_and_values", "prefill"]


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
    def of(
        cls,
        slots: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        *,
        prefixes: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
    ) -> Positions:
        """Build from what the host knows, with one upload: counts[r] positions of row r.

        They are the row's first ones, or, with `prefixes` and `steps`, those from step steps[r] on, which comes behind
        prefixes[r] positions.
        """
        count, slot = np.asarray(counts, dtype=np.int64), np.asarray(slots, dtype=np.int64)
        prefix, step = (
            np.zeros_like(count) if given is None else np.asarray(given, dtype=np.int64) for given in (prefixes, steps)
        )
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(count)])
        total, rows = int(offsets[-1]), len(count)
        entry_steps = np.arange(total) + np.repeat(step - offsets[:-1], count)
        entries = [np.repeat(slot, count), entry_steps + np.repeat(prefix, count), entry_steps]
        # Each of these starts at a multiple of 16 bytes, whatever R is: kernels are compiled for that.
        by_row = [np.pad(part, (0, -len(part) % 4)) for part in (slot, prefix + step, step, offsets)]
        uploaded = torch.from_numpy(np.concatenate([*entries, *by_row])).to(device, non_blocking=True)
        by_entry = uploaded[: 3 * total].view(3, total)
        small, padded = uploaded[3 * total :].to(torch.int32), len(by_row[0])
        return cls(
            cu_seqlens=small[3 * padded : 3 * padded + rows + 1],
            slots=small[:rows],
            starts=small[padded : padded + rows],
            steps=small[2 * padded : 2 * padded + rows],
            entry_slots=by_entry[0],
            entry_positions=by_entry[1],
            entry_steps=by_entry[2],
            max_seqlen=int(count.max(initial=0)),
        )


def _attend(attention: Attention, qkv: Tensor, cache: GeneratorCache, layer: int, positions: Positions) -> Tensor:
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
    out: Tensor = attention.dense(attended.flatten(1))
    return out


def _keys_and_values(weight: Tensor, *bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor | None]:
    rows = weight.view(num_heads, 3, -1, weight.shape[1])[:, 1:].reshape(-1, weight.shape[1])
    return rows, bias[0].view(num_heads, 3, -1)[:, 1:].reshape(-1) if bias else None


def last_keys_and_values() -> Derived:
    """Return what keeps the rows of the last layer's projection that give keys and values."""
    return Derived(_keys_and_values)


def prefill(
    generator: GPTNeoX, embeddings: Tensor, positions: Positions, cache: GeneratorCache, kept_projection: Derived
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
        qkv = layer.attention.query_key_value(for_attention)
        addends = (layer.mlp(for_mlp), _attend(layer.attention, qkv, cache, index, positions))
    last = layers[-1]
    _, for_attention, _ = add_and_normalise(x, addends, last.input_layernorm)
    projection, num_heads = last.attention.query_key_value, last.attention.num_heads
    if type(projection) is torch.nn.Linear:
        sources = (projection.weight,) if projection.bias is None else (projection.weight, projection.bias)
        weight, bias = kept_projection(*sources, num_heads=num_heads)
        both = torch.nn.functional.linear(for_attention, weight, bias)
        k, v = both.view(both.shape[0], num_heads, 2, -1).unbind(2)
    else:
        # Somebody's adapter or quantised layer: what it computes is its own affair.
        _, k, v = projection(for_attention).view(len(for_attention), num_heads, 3, -1).unbind(2)
    at = (positions.entry_slots, slice(None), positions.entry_positions)
    turn = positions.entry_positions
    cache.keys[-1][at] = rotate(k, cache.cos[turn][:, None], cache.sin[turn][:, None])
    cache.values[-1][at] = v


def advance(generator: GPTNeoX, tables: StepTables, positions: Positions, cache: GeneratorCache) -> Tensor:
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
            qkv, mlp = layer.attention.query_key_value(for_attention), layer.mlp(for_mlp)
        addends = (mlp, _attend(layer.attention, qkv, cache, index, positions))
    _, states, _ = add_and_normalise(x, addends, generator.final_layer_norm)
    return states
