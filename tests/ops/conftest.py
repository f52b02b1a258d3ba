"""What every test of an op needs."""

from __future__ import annotations

import pytest
from interpreter import silent_arithmetic, uniform_products

from dove_fast.ops import launch


@pytest.fixture(autouse=True)
def arithmetic_as_on_a_gpu(request, monkeypatch):
    callspec = getattr(request.node, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend == "triton" and launch.interpreted() and launch.why_no_triton() is None:
        uniform_products(monkeypatch)
        silent_arithmetic(monkeypatch)
