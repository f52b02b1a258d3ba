"""The fast operators. Each has a plain torch reference, and a `backend` argument that is honoured or refused."""

from dove_fast.ops.eos_scan import eos_scan
from dove_fast.ops.group_norm_silu import group_norm_silu
from dove_fast.ops.layer_norm_pair import layer_norm_pair
from dove_fast.ops.pack import pack, unpack
from dove_fast.ops.prefix_attention import prefix_attention
from dove_fast.ops.vq_lookup import codebook_squares, vq_lookup

__all__ = [
    "codebook_squares",
    "eos_scan",
    "group_norm_silu",
    "layer_norm_pair",
    "pack",
    "prefix_attention",
    "unpack",
    "vq_lookup",
]
