"""How the GPU kernels divide the codewords where there are too few rows to fill the device."""

from __future__ import annotations

import torch

from dove_fast.ops.launch import num_processors

__all__ = ["range_size"]

# A range has so many tiles or more, so that the merge stays small.
MIN_TILES = 4


def range_size(blocks: int, num_words: int, tile: int, device: torch.device) -> int:
    """Return how many codewords, whole tiles, a program searches where `blocks` programs hold the rows.

    There are two programs a multiprocessor or more where the codebook is large enough.
    """
    ranges = max(1, min(-(-2 * num_processors(device) // blocks), num_words // (MIN_TILES * tile)))
    return -(-num_words // (ranges * tile)) * tile
