"""The GPT-NeoX stack, causal or bidirectional, in readable torch; names are those of transformers' `GPTNeoXModel`.

Shape suffixes: B rows, S positions, H heads, D channels a head, d = H * D.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dove_fast.config import GPTNeoXConfig
from dove_fast.ops import layer_norm_pair

__all__ = ["GPTNeoX", "rotary_table", "rotate", "step_embeddings"]


def step_embeddings(num_steps: int, hidden_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the sinusoidal encodings t_0 .. t_{num_steps-1}, (num_steps, hidden_size).

    `t_i[2j] = sin(i / 10000^(2j/d))`, `t_i[2j+1] = cos(...)`, computed in fp64. Source: METHOD section 2.
    """
    # On the CPU, so that every device starts from the same fp64 values.
    steps = torch.arange(num_steps, dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size)
    angles = steps[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(device=device, dtype=dtype)


def rotary_table(positions: Tensor, config: GPTNeoXConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (S, rotary_dim) fp32, for integer positions (S,).

    Always fp32, as transformers keeps it, whatever the model's dtype. Source: METHOD section 2.
    """
    channels = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device)
    inverse_frequencies = 1.0 / (config.rotary_emb_base ** (channels / config.rotary_dim))
    angles = positions.to(torch.float32)[:, None] * inverse_frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first rotary_dim channels of x (B, H, S, D) by cos and sin (S, rotary_dim), half against half."""
    rotary_dim = cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    # cos and sin are fp32: half-precision channels are turned in fp32 and rounded once.
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), passed], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; one fused projection, interleaved by head (H, 3, D)."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, causal: bool, key_mask: Tensor | None = None) -> Tensor:
        """(B, S, d) -> (B, S, d); `key_mask` (B, S) bool is True where a position may be attended to."""
        batch, length, width = x.shape
        qkv = self.query_key_value(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask, is_causal=causal
        )
        out: Tensor = self.dense(attended.transpose(1, 2).reshape(batch, length, width))
        return out


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, d) -> (B, S, d)."""
        out: Tensor = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))
        return out


class Layer(nn.Module):
    """One parallel-residual layer: attention and MLP both read the layer's input, and both are added to it.

    Its norms and the sum are the stack's: the sum of one layer and the norms of the next are one pass.
    """

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self,
        for_attention: Tensor,
        for_mlp: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        causal: bool,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what is added to the layer's input x (B, S, d), first to last, for its two norms (B, S, d) of x."""
        attended = self.attention(for_attention, cos, sin, causal=causal, key_mask=key_mask)
        return self.mlp(for_mlp), attended


def add_and_normalise(
    x: Tensor, addends: tuple[Tensor, ...], first: nn.LayerNorm, second: nn.LayerNorm | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x with the addends, and its norms; None for a second one that is not given."""
    return layer_norm_pair(
        x,
        first.weight,
        first.bias,
        None if second is None else second.weight,
        None if second is None else second.bias,
        # Under autocast x may be wider than what the layers give.
        addends=[addend.to(x.dtype) for addend in addends],
        eps=first.eps,
    )


class GPTNeoX(nn.Module):
    """A stack of parallel-residual layers and a final LayerNorm, causal or bidirectional.

    `state_dict` keys are those of transformers' `GPTNeoXModel`; `embed_in` exists where `config.vocab_size` is not 0.
    """

    def __init__(self, config: GPTNeoXConfig, *, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size) if config.vocab_size else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, inputs_embeds: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Run all layers over inputs (B, S, d) -> states after the final LayerNorm (B, S, d).

        Positions count from 0 without gaps. `key_mask` (B, S) bool, bidirectional stacks only: True where a position
        may be attended to. Padding behind a row's end needs no mask in a causal stack: nothing before it can see it.
        """
        if key_mask is not None and self.causal:
            raise ValueError("key_mask is for bidirectional stacks, got one for a causal stack")
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        cos, sin = rotary_table(positions, self.config)
        x = inputs_embeds
        addends: tuple[Tensor, ...] = ()
        for layer in cast("Iterable[Layer]", self.layers):
            x, for_attention, for_mlp = add_and_normalise(
                x, addends, layer.input_layernorm, layer.post_attention_layernorm
            )
            addends = layer(for_attention, for_mlp, cos, sin, causal=self.causal, key_mask=key_mask)
        _, states, _ = add_and_normalise(x, addends, self.final_layer_norm)
        return states
