"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str) -> str:
    """Put a count into words, with a noun whose plural ends in s: 1 token, 8 tokens, 4,096 images."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
