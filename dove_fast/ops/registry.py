"""Which implementation of an op runs: an explicit choice is honoured or refused, "auto" says why it chose."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dove_fast.errors import BackendError
from dove_fast.ops.arguments import dtype_name
from dove_fast.ops.launch import interpreted

__all__ = [
    "BACKENDS",
    "Choice",
    "Implementation",
    "available_backends",
    "check_backend",
    "choose",
    "default_backend",
    "implementation",
    "register",
]

ENVIRONMENT = "DOVE_FAST_BACKEND"

# The device type that a backend's tensors live on; None: any.
_DEVICE_TYPE: dict[str, str | None] = {"reference": None, "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}

BACKENDS = tuple(_DEVICE_TYPE)
_VALID = ", ".join(map(repr, ("auto", *BACKENDS)))


def _nothing_missing() -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One op on one backend.

    `function` has the signature of the op's reference. `missing` returns None, or one sentence on what this
    installation lacks to run it (asked once a process, without touching a device). `dtypes` lists what the function
    takes; None is every dtype.
    """

    function: Callable[..., Any]
    missing: Callable[[], str | None] = _nothing_missing
    dtypes: frozenset[torch.dtype] | None = None


class Choice(NamedTuple):
    """The backend that a call runs on, and the reason in one line."""

    backend: str
    reason: str


_OPS: dict[str, dict[str, Implementation]] = {}


def register(op: str, /, **implementations: Implementation) -> None:
    """Register an op's implementations by backend name, in the order in which "auto" prefers them."""
    unknown = sorted(set(implementations) - set(BACKENDS))
    if unknown:
        raise ValueError(f"{op}: unknown backends {unknown}; valid: {', '.join(BACKENDS)}")
    _OPS[op] = implementations
    _choose.cache_clear()


def check_backend(op: str, backend: object) -> None:
    """Raise `TypeError` where `backend` is neither None nor a string: torch refuses such a call without its reason."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{op}: backend must be None or one of {_VALID}, got {backend!r} ({type(backend).__name__})")


def default_backend() -> tuple[str, bool]:
    """Return the backend of calls that name none, and whether the environment's `DOVE_FAST_BACKEND` sets it."""
    name = os.environ.get(ENVIRONMENT)
    return name or "auto", bool(name)


def choose(op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Choice:
    """Return the backend that `op` runs on for tensors of this device and dtype, and why.

    `backend` is a name of `BACKENDS`, "auto", or None for the environment's `DOVE_FAST_BACKEND`, else "auto".
    "auto" takes the first implementation that works and says what it passed over. Raises `BackendError`
    when a named backend cannot run the call: the message has the reason and what works instead; `TypeError` when
    `backend` is no string.
    """
    check_backend(op, backend)
    if backend is None:
        return _choose(op, device.type, dtype, *default_backend())
    return _choose(op, device.type, dtype, backend, False)


@functools.lru_cache(maxsize=1024)
def _choose(op: str, device_type: str, dtype: torch.dtype, backend: str, from_environment: bool) -> Choice:
    origin = f" (from {ENVIRONMENT})" if from_environment and backend != "auto" else ""
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"{op}: unknown backend {backend!r}{origin}; valid: {_VALID}")
    implementations = _OPS[op]
    refusals = {name: _refusal(op, name, device_type, dtype) for name in implementations}
    working = [name for name, refusal in refusals.items() if refusal is None]
    # Triton's interpreter takes CPU tensors where it is asked for by name: it is for tests, and slow.
    automatic = [name for name in working if _DEVICE_TYPE[name] in (None, device_type)]
    if backend != "auto":
        if backend not in implementations:
            refusal = f"{op} has no {backend!r} implementation{origin}"
        elif refusals[backend] is not None:
            refusal = f"{op}: backend {backend!r}{origin} {refusals[backend]}"
        else:
            return Choice(backend, f"asked for{origin}")
        raise BackendError(f"{refusal}; available for {device_type} tensors: {', '.join(working) or 'none'}")
    if not automatic:
        raise BackendError(f"{op}: no backend works: " + "; ".join(f"{k!r} {v}" for k, v in refusals.items()))
    passed = [f"{k!r} {v}" for k, v in refusals.items() if v is not None and _DEVICE_TYPE[k] == device_type]
    reason = f"auto, for {device_type} tensors"
    return Choice(automatic[0], f"{reason}; passed over: {'; '.join(passed)}" if passed else reason)


def _refusal(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run a call with such tensors, as a predicate of the backend; None when it can."""
    needed = _DEVICE_TYPE[backend]
    if needed is not None and needed != device_type and not (backend == "triton" and interpreted()):
        place = {"cpu": "on the CPU", "cuda": "on a CUDA device"}[needed]
        return f"needs tensors {place}, got {device_type}"
    entry = _OPS[op][backend]
    if entry.dtypes is not None and dtype not in entry.dtypes:
        return f"takes {', '.join(sorted(map(dtype_name, entry.dtypes)))}, got {dtype_name(dtype)}"
    missing = entry.missing()
    return None if missing is None else f"cannot run: {missing}"


def implementation(op: str, backend: str | None, tensor: torch.Tensor) -> Callable[..., Any]:
    """Return the function that runs `op` on `tensor`'s device and dtype. Raises `BackendError` as `choose` does."""
    name = choose(op, tensor.device, tensor.dtype, backend).backend
    return _OPS[op][name].function


def available_backends() -> dict[str, list[str]]:
    """Return, for every op, the backends that work on this machine, in the order in which "auto" prefers them."""
    absent = None if torch.cuda.is_available() else "cuda"
    return {
        op: [
            name
            for name, entry in implementations.items()
            if (_DEVICE_TYPE[name] != absent or absent is None) and entry.missing() is None
        ]
        for op, implementations in _OPS.items()
    }
