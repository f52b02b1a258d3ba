"""Neighbours of DOVE as shapes: TiTok and ALIT with their published sizes and random weights.

They are written here after the papers and the published sources, to be timed and counted. Nothing is trained: what they
give has the right shape and costs what it should, and means nothing. Given the same random weights, they were compared
with the published modules by hand: TiTok's features are equal, ALIT's after three rollouts within 5e-7 (relative).
"""

from __future__ import annotations

from neighbours.alit import ALIT, ALIT_SIZES, ALITSizes
from neighbours.titok import TITOK_SIZES, TiTok, TiTokSizes

__all__ = ["ALIT", "ALIT_SIZES", "TITOK_SIZES", "ALITSizes", "TiTok", "TiTokSizes"]
