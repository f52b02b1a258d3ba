"""A set of keys against Python's, with what it says of the first that comes again, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dove_fast.store.keys import KeySet


def first_repeated(known: set[str], keys: list[str]) -> str | None:
    """Add keys to a plain set, and return the first that was there."""
    found = None
    for key in keys:
        if key in known and found is None:
            found = key
        known.add(key)
    return found


def kept(keys: KeySet) -> int:
    return sum(array.nbytes for array in keys._sorted)


KEYS = st.one_of(st.integers(0, 60).map(str), st.text(st.characters(exclude_categories=["Cs"]), max_size=3))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(KEYS, max_size=12), max_size=12))
def test_it_is_a_set(calls):
    keys, known = KeySet(), set()
    for call in calls:
        assert keys.add(call) == first_repeated(known, call)
        # Eight bytes a key that differs, however often it came.
        assert kept(keys) == 8 * len(known)


@pytest.mark.parametrize("sizes", [[1] * 300, [200, 1, 1, 1, 50, 3], [1, 2, 4, 8, 16, 32], [0, 5, 0, 0, 7, 0]])
def test_keys_are_found_wherever_they_are_kept(sizes):
    keys, number = KeySet(), 0
    for size in sizes:
        assert keys.add([f"key-{index}" for index in range(number, number + size)]) is None
        number += size
    assert kept(keys) == 8 * number
    for index in range(number):
        assert keys.add([f"new-{index}", f"key-{index}", f"also-{index}"]) == f"key-{index}"
    assert kept(keys) == 8 * 3 * number


def test_the_first_one_that_repeats_is_told():
    keys = KeySet()
    assert keys.add(["a", "b", "c"]) is None
    assert keys.add(["d", "c", "d", "a"]) == "c"
    assert keys.add(["e", "e", "a"]) == "e"
    assert keys.add(["f", "g", "f"]) == "f"
    assert keys.add(["a"]) == "a" and keys.add(["d"]) == "d" and keys.add(["g"]) == "g"
    assert keys.add(["h"]) is None


def test_nothing_added():
    keys = KeySet()
    assert keys.add([]) is None and keys.add(()) is None
    assert kept(keys) == 0
    assert keys.add([""]) is None and keys.add([]) is None and keys.add([""]) == ""


def test_few_arrays_in_eight_bytes_a_key():
    keys = KeySet()
    for start in range(0, 100_000, 1000):
        assert keys.add([str(number) for number in range(start, start + 1000)]) is None
        assert all(array.dtype == np.uint64 and (np.diff(array) > 0).all() for array in keys._sorted)
        # A search looks at each of them.
        assert len(keys._sorted) <= 8
    assert kept(keys) == 800_000
    assert keys.add(["99999", "0"]) == "99999"


def test_keys_that_begin_or_end_alike_differ():
    keys = KeySet()
    assert keys.add([f"{'x' * length}{ending}" for length in range(1, 300) for ending in ("", "\0", "y")]) is None
    assert keys.add(["X", "\u00fc", "u\u0308", "a/b", "a//b", "./a/b"]) is None
