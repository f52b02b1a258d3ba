"""Tensors that follow from parameters alone: computed once and kept until the parameters change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Derived"]


class Derived:
    """Keeps `compute(*sources, **context)`, one tensor or a tuple of them without gradients, until a source changes.

    A change is another tensor, storage, device, dtype or autocast, a step of any `torch.optim` optimiser where a source
    needs gradients, or a write that torch counts: `load_state_dict`, `to` and any in-place operation are. A write
    through `source.data` is not: call `refresh()`.
    The context is handed on and not compared: it must follow from the sources.
    Nothing is kept while torch.compile or a CUDA graph records the call, or where a source is an inference tensor, as
    torch counts no writes there. Copies and pickles start empty.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute
        # Replaced as a whole, so that threads see a key with its own value.
        self._kept: tuple[tuple[Any, ...], Any] | None = None

    def __call__(self, *sources: Tensor, **context: Any) -> Any:
        """Return the value for these sources, computed now where it is not kept."""
        if torch.compiler.is_compiling() or any(source.is_inference() for source in sources) or _capturing(sources):
            return self._compute(*(source.detach() for source in sources), **context)
        key = (*map(_state, sources), _autocast(sources))
        kept = self._kept
        if kept is not None and kept[0] == key:
            return kept[1]
        # Usable in a later training forward, even where the first call is in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            value = self._compute(*sources, **context)
        self._kept = key, value
        return value

    def refresh(self) -> None:
        """Drop what is kept: the next call computes it again."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_compute": self._compute, "_kept": None}


class _OptimizerSteps:
    """Counts the steps of all optimisers in the process, once something asks.

    torch does not count the writes of its fused ones: after a step of `AdamW(fused=True)` a parameter's version is the
    one from before.
    """

    def __init__(self) -> None:
        self._done = 0
        self._handle: Any = None
        self._lock = threading.Lock()

    def count(self) -> int:
        """Return how many there were; from the first call on they are counted."""
        with self._lock:
            if self._handle is None:
                self._handle = register_optimizer_step_post_hook(self._add)
        return self._done

    def _add(self, *_: Any) -> None:
        with self._lock:
            self._done += 1


_OPTIMIZER_STEPS = _OptimizerSteps()


class _Same:
    """A tensor in a key: equal to itself alone, and kept alive, so that no other one can take its place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor


def _state(source: Tensor) -> tuple[Any, ...]:
    # A value computed on one stream may not be there yet for another.
    stream = torch.cuda.current_stream(source.device).cuda_stream if source.is_cuda else None
    steps = _OPTIMIZER_STEPS.count() if source.requires_grad else None
    return _Same(source), source.data_ptr(), source._version, source.device, source.dtype, stream, steps


def _autocast(sources: tuple[Tensor, ...]) -> torch.dtype | None:
    device_type = sources[0].device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _capturing(sources: tuple[Tensor, ...]) -> bool:
    return any(source.is_cuda for source in sources) and torch.cuda.is_current_stream_capturing()
