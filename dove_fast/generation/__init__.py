"""The engine: a cache, blocks of steps chosen by a schedule, EOS, and new rows in the places of those that ended."""

from dove_fast.generation.engine import Generation
from dove_fast.generation.schedule import CostModel, LengthHistogram
from dove_fast.generation.stream import StreamItem, TokenStream

__all__ = ["CostModel", "Generation", "LengthHistogram", "StreamItem", "TokenStream"]
