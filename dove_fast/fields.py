"""What the fields of a configuration's dataclass must be, by their types."""

from __future__ import annotations

import math
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["check_fields"]


def check_fields(section: Any, prefix: str) -> None:
    """Check the type of every field of a dataclass; what is a number must be finite and not negative.

    `prefix` stands before a field's name in the errors, `TypeError` or `ValueError`.
    """
    for key, kind in get_type_hints(type(section)).items():
        value: Any = getattr(section, key)
        if kind in (int, float):
            allowed = (int,) if kind is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise TypeError(f"{prefix}{key} must be {'an int' if kind is int else 'a number'}, got {value!r}")
            try:
                is_sound = math.isfinite(value) and value >= 0
            except OverflowError:
                is_sound = False
            if not is_sound:
                raise ValueError(f"{prefix}{key} must be finite and not negative, got {value}")
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            if not isinstance(value, tuple) or not all(isinstance(element, item) for element in value):
                raise TypeError(f"{prefix}{key} must be a tuple of {item.__name__}, got {value!r}")
        elif not isinstance(value, kind):
            wanted = {bool: "true or false", str: "a string"}.get(kind, f"a {kind.__name__}")
            raise TypeError(f"{prefix}{key} must be {wanted}, got {value!r}")
