"""The generator with gradients: the prefix once, then blocks of steps until every row has its tokens.

As the engine computes them, nothing is computed twice: the last layer's prefix is keys and values alone, the first
layer's steps are the same for all rows, and rows leave where they end. What a block computes behind a row's end gets no
gradient.
Shape suffixes: R rows, A of them not ended; P positions of the longest prefix, s steps done, b of a block; d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dove_fast.generation.linear import is_plain
from dove_fast.models.gpt_neox import GPTNeoX, Layer, add_and_normalise, rotary_table, rotate
from dove_fast.ops import prefix_attention, unpack

__all__ = ["ends_at", "ends_by_eos", "states_in_blocks"]

# Keys and values (A, H, P + s, D) of a layer.
KeysAndValues = tuple[Tensor, Tensor]


def states_in_blocks(
    stack: GPTNeoX,
    prefixes: Sequence[Tensor],
    steps: Tensor,
    ends: Callable[[Tensor, Sequence[int], int], Sequence[int | None]],
    *,
    block_size: int,
    recompute: bool,
) -> tuple[list[Tensor], int]:
    """Return each row's states (m, d) after the final LayerNorm, and how many positions were computed.

    prefixes: R tensors (N + L_b, d). steps: (T, d), what every row's prefix is followed by. ends: from a block's states
    (A, b, d), the rows' numbers and the first step, each row's number of tokens in this block if it ends there, else
    None; rows that reach T end by themselves. recompute: as in `training_forward`.
    """
    lengths = [len(prefix) for prefix in prefixes]
    longest, total = max(lengths), steps.shape[0]
    tables = rotary_table(torch.arange(longest + total, device=steps.device), stack.config)
    run = _Runner(stack, tables, recompute=recompute)
    caches = run.prefix(prefixes, lengths)
    starts = torch.tensor(lengths, device=steps.device)
    alive = list(range(len(prefixes)))
    pieces: list[list[Tensor]] = [[] for _ in prefixes]
    positions = sum(lengths)
    for first in range(0, total, block_size):
        block = steps[first : first + block_size]
        states, caches = run.block(block, caches, starts, longest, first)
        positions += len(alive) * len(block)
        counts = ends(states, alive, first)
        for row, state, count in zip(alive, states, counts, strict=True):
            pieces[row].append(state if count is None else state[:count])
        going = [index for index, count in enumerate(counts) if count is None]
        if not going or first + block_size >= total:
            break
        if len(going) < len(alive):
            chosen = torch.tensor(going, device=steps.device)
            caches = [(keys[chosen], values[chosen]) for keys, values in caches]
            starts, alive = starts[chosen], [alive[index] for index in going]
    return [torch.cat(row) for row in pieces], positions


class _Runner:
    """Runs prefix and blocks through the layers of one stack."""

    def __init__(self, stack: GPTNeoX, tables: tuple[Tensor, Tensor], *, recompute: bool) -> None:
        self.layers = cast("Sequence[Layer]", stack.layers)
        self.final_norm = stack.final_layer_norm
        self.cos, self.sin = tables
        self.recompute = recompute

    def _run(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | Layer) -> tuple[Tensor, ...]:
        if self.recompute:
            found: tuple[Tensor, ...] = checkpoint(function, *inputs, use_reentrant=False)
            return found
        return function(*inputs)

    def prefix(self, prefixes: Sequence[Tensor], lengths: Sequence[int]) -> list[KeysAndValues]:
        """Return every layer's turned keys and values of the prefixes, padded to the longest."""
        device, longest = self.cos.device, max(lengths)
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        # Each position's place in its row.
        total = sum(lengths)
        is_full = total == len(lengths) * longest
        row = torch.repeat_interleave(torch.tensor(lengths, device=device), output_size=total)
        places = torch.arange(total, device=device) - offsets[:-1].long()[row]

        def run(layer: Layer, for_attention: Tensor, for_mlp: Tensor) -> tuple[Tensor, ...]:
            q, k, v = _split(layer, for_attention).unbind(2)
            turned = self._turn(k, places)
            if is_full:
                # torch's own keeps what its backward needs; that of `prefix_attention` computes the forward again.
                queries, keys, values = (padded(part) for part in (self._turn(q, places), turned, v))
                attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
                attended = attended.transpose(1, 2).flatten(0, 1)
            else:
                cos, sin = self.cos[:longest], self.sin[:longest]
                attended = prefix_attention(q, k, v, offsets, max_seqlen=longest, cos=cos, sin=sin)
            return layer.mlp(for_mlp), layer.attention.dense(attended.flatten(1)), turned, v

        def only_keys(layer: Layer, for_attention: Tensor) -> tuple[Tensor, ...]:
            # Nothing reads what the last layer makes of the prefix.
            linear, heads = layer.attention.query_key_value, layer.attention.num_heads
            if not is_plain(linear):
                _, k, v = _split(layer, for_attention).unbind(2)
                return self._turn(k, places), v
            weight, bias = (
                None if full is None else full.unflatten(0, (heads, 3, -1))[:, 1:].flatten(0, 2)
                for full in (linear.weight, linear.bias)
            )
            assert weight is not None
            k, v = F.linear(for_attention, weight, bias).unflatten(-1, (heads, 2, -1)).unbind(2)
            return self._turn(k, places), v

        def padded(values: Tensor) -> Tensor:
            if is_full:
                return values.unflatten(0, (-1, longest)).transpose(1, 2)
            return unpack(values, offsets, longest).transpose(1, 2)

        x = torch.cat(list(prefixes))
        addends: tuple[Tensor, ...] = ()
        caches: list[KeysAndValues] = []
        for layer in self.layers[:-1]:
            norms = layer.input_layernorm, layer.post_attention_layernorm
            x, for_attention, for_mlp = add_and_normalise(x, addends, *norms)
            assert for_mlp is not None
            *new, keys, values = self._run(run, layer, for_attention, for_mlp)
            addends = tuple(new)
            caches.append((padded(keys), padded(values)))
        _, for_attention, _ = add_and_normalise(x, addends, self.layers[-1].input_layernorm)
        keys, values = self._run(only_keys, self.layers[-1], for_attention)
        return [*caches, (padded(keys), padded(values))]

    def block(
        self, steps: Tensor, caches: Sequence[KeysAndValues], starts: Tensor, longest: int, done: int
    ) -> tuple[Tensor, list[KeysAndValues]]:
        """Return the states (A, b, d) of steps (b, d), the same for all rows, and the caches with them.

        starts: (A,) the lengths of the rows' prefixes, of which the longest has `longest` positions. done: s.
        """
        rows, size = len(starts), len(steps)
        place = torch.arange(size, device=steps.device)
        positions = starts[:, None] + done + place
        # A row sees its prefix, the steps before, and of this block what is not behind: (A, 1, b, P + s + b).
        seen = torch.arange(longest, device=steps.device) < starts[:, None]
        mask = torch.cat(
            [
                seen[:, None].expand(-1, size, -1),
                (torch.arange(done + size, device=steps.device) <= done + place[:, None]).expand(rows, -1, -1),
            ],
            dim=2,
        )[:, None]

        def run(
            layer: Layer, for_attention: Tensor, for_mlp: Tensor, keys: Tensor, values: Tensor
        ) -> tuple[Tensor, ...]:
            # The first layer's are (b, d), of all rows.
            qkv = _split(layer, for_attention).unflatten(0, (-1, size)).expand(rows, -1, -1, -1, -1)
            q, k, v = qkv.unbind(3)
            q, k = self._turn(q, positions).transpose(1, 2), self._turn(k, positions).transpose(1, 2)
            keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v.transpose(1, 2)], dim=2)
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            added = layer.attention.dense(attended.transpose(1, 2).flatten(2).flatten(0, 1))
            return layer.mlp(for_mlp).unflatten(0, (-1, size)).expand(rows, -1, -1).flatten(0, 1), added, keys, values

        x = steps
        addends: tuple[Tensor, ...] = ()
        kept: list[KeysAndValues] = []
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            norms = layer.input_layernorm, layer.post_attention_layernorm
            x, for_attention, for_mlp = add_and_normalise(x, addends, *norms)
            assert for_mlp is not None
            *new, keys, values = self._run(run, layer, for_attention, for_mlp, *cache)
            addends = tuple(new)
            kept.append((keys, values))
            if index == 0:
                x = x.expand(rows, -1, -1).flatten(0, 1)
        _, states, _ = add_and_normalise(x, addends, self.final_norm)
        return states.unflatten(0, (rows, size)), kept

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x (*, H, D) by the rotary angles of positions (*)."""
        return rotate(x, self.cos[positions][..., None, :], self.sin[positions][..., None, :])


def _split(layer: Layer, for_attention: Tensor) -> Tensor:
    """Project (n, d) -> (n, H, 3, D)."""
    return layer.attention.query_key_value(for_attention).unflatten(-1, (layer.attention.num_heads, 3, -1))


def ends_by_eos(
    eos_logits: Callable[[Tensor], Tensor], threshold: float
) -> Callable[[Tensor, Sequence[int], int], list[int | None]]:
    """Return `ends` for rows that stop at the first step whose EOS probability is above `threshold`."""
    limit = math.log(threshold / (1 - threshold))

    @torch.no_grad()
    def ends(states: Tensor, rows: Sequence[int], first: int) -> list[int | None]:
        stops = eos_logits(states).float() > limit
        # The one read of a block: who goes on decides what the next one computes.
        found = torch.where(stops.any(dim=1), stops.to(torch.uint8).argmax(dim=1) + 1, 0).tolist()
        return [count or None for count in found]

    return ends


def ends_at(lengths: Sequence[int]) -> Callable[[Tensor, Sequence[int], int], list[int | None]]:
    """Return `ends` for rows whose numbers of tokens are given."""

    def ends(states: Tensor, rows: Sequence[int], first: int) -> list[int | None]:
        size = states.shape[1]
        return [lengths[row] - first if lengths[row] <= first + size else None for row in rows]

    return ends
