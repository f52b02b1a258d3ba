"""The token decoder on ragged tokens: the first layer computes the real ones, and a zero vector once a model.

Shape suffixes: B images of T positions each, m of them tokens; total, the tokens of all; H heads; d width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dove_fast.generation.linear import PackedLinears
from dove_fast.models.derived import Derived
from dove_fast.models.gpt_neox import Attention, GPTNeoX, Layer, add_and_normalise, rotary_table, rotate
from dove_fast.ops import prefix_attention
from dove_fast.ragged import RaggedTokens

__all__ = ["decode", "derived_zero_row"]


class ZeroRow(NamedTuple):
    """What the first layer computes of a zero vector, at any position. Source: METHOD section 3.

    qkv: (3 d,), its projection before rotary, which depends on the position; mlp: (d,), what its MLP adds.
    """

    qkv: Tensor
    mlp: Tensor


def _compute(*parameters: Tensor, layer: Layer) -> ZeroRow:
    zero = torch.zeros_like(parameters[0])[None]
    _, for_attention, for_mlp = add_and_normalise(zero, (), layer.input_layernorm, layer.post_attention_layernorm)
    return ZeroRow(layer.attention.query_key_value(for_attention)[0], layer.mlp(for_mlp)[0])


def derived_zero_row() -> Derived:
    """Return what keeps the zero vector's row until the first layer's weights change."""
    return Derived(_compute)


def _lay_out(values: Tensor, padding: Tensor, lengths: Sequence[int], positions: int) -> Tensor:
    """Return ragged values (total, c) as rows (B * T, c), `padding` (c,) behind each row's end; one pass."""
    if values.shape[0] == len(lengths) * positions:
        return values
    rows = values.split(list(lengths))
    return torch.cat(
        [
            part
            for row, length in zip(rows, lengths, strict=True)
            for part in (row, padding.expand(positions - length, -1))
        ]
    )


def _attend(attention: Attention, qkv: Tensor, attend: Callable[..., Tensor], linears: PackedLinears) -> Tensor:
    # With the size of a head, as -1 is ambiguous for no rows.
    head_dim = attention.dense.in_features // attention.num_heads
    q, k, v = qkv.view(-1, attention.num_heads, 3, head_dim).unbind(2)
    return linears(attention.dense, attend(q, k, v).flatten(1))


def _attend_all(q: Tensor, k: Tensor, v: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Attend from and to all positions of rows of T, q, k and v (B * T, H, D); cos and sin (T, rotary_dim)."""
    rows = q.shape[0] // len(cos), len(cos)
    q, k, v = (t.unflatten(0, rows).transpose(1, 2) for t in (q, k, v))
    attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    return attended.transpose(1, 2).flatten(0, 1)


def decode(
    decoder: GPTNeoX,
    tokens: RaggedTokens,
    num_tokens: int,
    kept_zero_row: Derived,
    linears: PackedLinears,
    *,
    attends_padding: bool,
) -> Tensor:
    """Run a bidirectional stack over each image's tokens and zeros up to T -> states (B, T, d).

    tokens: B rows of 1 to T = `num_tokens` tokens of width d in the stack's dtype. `attends_padding` False: the zeros
    are queries and not keys. Source: METHOD section 3.
    """
    batch, lengths, device = len(tokens), tokens.host_lengths, tokens.values.device
    cos, sin = rotary_table(torch.arange(num_tokens, device=device), decoder.config)
    attend: Callable[..., Tensor] = functools.partial(
        prefix_attention,
        cu_seqlens=torch.arange(0, (batch + 1) * num_tokens, num_tokens, dtype=torch.int32, device=device),
        max_seqlen=num_tokens,
        cos=cos,
        sin=sin,
        causal=False,
        key_lengths=None if attends_padding else tokens.cu_seqlens.diff(),
    )
    # With gradients it is computed anew, for its graph.
    grad = torch.is_grad_enabled()
    if grad and attends_padding:
        # torch's own keeps what its backward needs; that of `prefix_attention` computes the forward again.
        attend = functools.partial(_attend_all, cos=cos, sin=sin)
    first, *others = cast("Sequence[Layer]", decoder.layers)
    zero: ZeroRow = (_compute if grad else kept_zero_row)(*first.parameters(), layer=first)
    x = tokens.values
    _, for_attention, for_mlp = add_and_normalise(x, (), first.input_layernorm, first.post_attention_layernorm)
    assert for_mlp is not None
    qkv = _lay_out(linears(first.attention.query_key_value, for_attention), zero.qkv, lengths, num_tokens)
    # Added to x while there are few rows, so that their sum is laid out and not both.
    x = _lay_out(x + linears.mlp(first.mlp, for_mlp), zero.mlp.to(x.dtype), lengths, num_tokens)
    addends: tuple[Tensor, ...] = (_attend(first.attention, qkv, attend, linears),)
    for layer in others:
        x, for_attention, for_mlp = add_and_normalise(x, addends, layer.input_layernorm, layer.post_attention_layernorm)
        assert for_mlp is not None
        qkv = linears(layer.attention.query_key_value, for_attention)
        addends = (linears.mlp(layer.mlp, for_mlp), _attend(layer.attention, qkv, attend, linears))
    _, states, _ = add_and_normalise(x, addends, decoder.final_layer_norm)
    return states.view(batch, num_tokens, decoder.config.hidden_size)
