"""The first layer's rows at the step positions, which depend on the step and the weights alone."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor

from dove_fast.models.derived import Derived
from dove_fast.models.gpt_neox import GPTNeoX, Layer, add_and_normalise, step_embeddings

__all__ = ["StepTables", "step_tables"]


class StepTables(NamedTuple):
    """Row i belongs to step i. Source: METHOD section 2.

    embeddings: (T, d), what the generator reads; qkv: (T, 3 d), the first layer's projection before rotary, which
    depends on the position; mlp: (T, d), what its MLP adds.
    """

    embeddings: Tensor
    qkv: Tensor
    mlp: Tensor


def _compute(*parameters: Tensor, layer: Layer, num_steps: int) -> StepTables:
    weight = parameters[0]
    embeddings = step_embeddings(num_steps, weight.shape[0], device=weight.device, dtype=weight.dtype)
    _, for_attention, for_mlp = add_and_normalise(embeddings, (), layer.input_layernorm, layer.post_attention_layernorm)
    return StepTables(embeddings, layer.attention.query_key_value(for_attention), layer.mlp(for_mlp))


def step_tables(kept: Derived, generator: GPTNeoX, num_steps: int) -> StepTables:
    """Return the tables of a generator's first layer; `kept` is `derived_tables()`, which the caller owns."""
    layer = cast("Layer", generator.layers[0])
    tables: StepTables = kept(*layer.parameters(), layer=layer, num_steps=num_steps)
    return tables


def derived_tables() -> Derived:
    """Return what keeps the tables until the layer's weights change."""
    return Derived(_compute)
