"""Other libraries' checkpoints: what of a diffusers `VQModel` and a transformers GPT-NeoX maps to ours, and how.

A configuration field that would change the mathematics in a way that is not implemented is refused by its name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dove_fast.config import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES, GPTNeoXConfig, VQGANConfig

__all__ = [
    "EMBEDDING_KEY",
    "gpt_neox_config",
    "gpt_neox_tensors",
    "image_range",
    "vqgan_config",
    "vqgan_tensors",
    "without_embedding",
]

EMBEDDING_KEY = "embed_in.weight"

# diffusers' own defaults, for fields that an older config.json does not spell out.
VQ_DEFAULTS: dict[str, Any] = {
    "down_block_types": (DOWN_BLOCK_TYPES[0],),
    "up_block_types": (UP_BLOCK_TYPES[0],),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
# Fields with a single supported value (or several names of it).
VQ_REQUIRED: dict[str, tuple[Any, ...]] = {
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
}
# Fields that do not change what is computed here.
VQ_IGNORED = {"sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast", "image_range", "vq_embed_dim"}

# Attention weights of diffusers before 0.17, with their present names.
VQ_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(VQ_OLD_ATTENTION)})\.(weight|bias)")

NEOX_REQUIRED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt_neox",),
    "hidden_act": ("gelu",),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "use_parallel_residual": (True,),
    "rope_scaling": (None,),
}
# Buffers of older files, recomputed here, and the language model's head, which DOVE has no use for.
_NEOX_IGNORED_KEY = re.compile(
    r"(layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq"
    r"|embed_out\.weight|lm_head\.weight)"
)


def _refuse_unsupported(data: Mapping[str, Any], required: Mapping[str, tuple[Any, ...]]) -> None:
    for name, supported in required.items():
        if name in data and data[name] not in supported:
            raise ValueError(f"{name}={data[name]!r} is not supported, only {' or '.join(map(repr, supported))}")


def vqgan_config(data: Mapping[str, Any]) -> VQGANConfig:
    """Convert a diffusers `VQModel` configuration; raise `ValueError` that names an unsupported field."""
    class_name = data.get("_class_name", "VQModel")
    if class_name != "VQModel":
        raise ValueError(f"_class_name={class_name!r} is not supported, only 'VQModel'")
    _refuse_unsupported(data, VQ_REQUIRED)
    known = {*VQ_DEFAULTS, *VQ_REQUIRED, *VQ_IGNORED}
    unknown = sorted(name for name in data if name not in known and not name.startswith("_"))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not a field of the VQModel configurations that are supported")
    values = {name: data.get(name, default) for name, default in VQ_DEFAULTS.items()}
    vq_embed_dim = data.get("vq_embed_dim")
    return VQGANConfig(**values, vq_embed_dim=values["latent_channels"] if vq_embed_dim is None else vq_embed_dim)


def image_range(data: Mapping[str, Any]) -> tuple[float, float]:
    """Return the pixel range that a `VQModel` configuration says it was trained on, or [0, 1].

    Raises `ValueError` for anything but an increasing pair of numbers.
    """
    value = data.get("image_range", (0.0, 1.0))
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        raise ValueError(f"image_range must be a pair of numbers, got {value!r}") from None
    if not low < high:
        raise ValueError(f"image_range must be increasing, got {value!r}")
    return low, high


def vqgan_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a `VQModel`'s tensors under their present names."""
    return {_OLD_ATTENTION_KEY.sub(_present_name, name): tensor for name, tensor in tensors.items()}


def _present_name(match: re.Match[str]) -> str:
    return f"{match[1]}.{VQ_OLD_ATTENTION[match[2]]}.{match[3]}"


def gpt_neox_config(data: Mapping[str, Any]) -> GPTNeoXConfig:
    """Convert a transformers GPT-NeoX configuration; raise `ValueError` that names an unsupported field.

    Reads both forms of the rotary settings: `rotary_pct` and `rotary_emb_base`, and newer files' `rope_parameters`.
    """
    _refuse_unsupported(data, NEOX_REQUIRED)
    rope = data.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}")
    _refuse_unsupported(rope, {"rope_type": ("default",)})
    values = {
        "rotary_pct": rope.get("partial_rotary_factor", data.get("rotary_pct", 0.25)),
        "rotary_emb_base": rope.get("rope_theta", data.get("rotary_emb_base", 10000.0)),
    }
    for item in dataclasses.fields(GPTNeoXConfig):
        if item.name in data and item.name not in values:
            values[item.name] = data[item.name]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if name not in values:
            raise ValueError(f"{name} is missing")
    return GPTNeoXConfig(**values)


def without_embedding(config: GPTNeoXConfig) -> GPTNeoXConfig:
    """Return the configuration of the same stack without its token embedding."""
    return dataclasses.replace(config, vocab_size=0)


def gpt_neox_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a `GPTNeoXModel` or `GPTNeoXForCausalLM` under `GPTNeoXModel`'s names.

    Known buffers of older files and the language model's head are left out.
    """
    named = {name.removeprefix("gpt_neox."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not _NEOX_IGNORED_KEY.fullmatch(name)}
