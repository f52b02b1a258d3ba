"""Work on a GPU that is recorded once for a shape, as a CUDA graph, and replayed: one launch instead of a hundred."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from dove_fast.ops import registry

__all__ = ["RECORDERS", "Graphs", "bucket", "spare_places"]

Function = Callable[..., Tensor]
Replay = Callable[[], Tensor]

# torch records one graph at a time in a process.
_RECORDING = threading.Lock()


def _step(rows: int) -> int:
    step = 1
    while rows > 8 * step:
        step *= 2
    return step


def bucket(rows: int) -> int:
    """Return the least of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, .. that holds so many rows.

    Four sizes for every power of two: at most a quarter is computed in vain, and a batch that shrinks needs few graphs.
    """
    return -(-rows // _step(rows)) * _step(rows)


def spare_places(rows: int) -> int:
    """Return how many rows are at most missing to a bucket, for any number of rows up to this."""
    return _step(rows) - 1


def _record_cuda(function: Function, given: tuple[Tensor, ...], pool: Any) -> Replay:
    """Record `function(*given)`, and return what runs it again on what those tensors hold then."""
    device = given[0].device
    graph = torch.cuda.CUDAGraph()
    # The stream is on the tensors' device, whichever is current. What this thread uses for the first time, such as
    # cuBLAS' and cuDNN's handles, is made before the recording, in which it could not be.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function(*given)
    # Other threads may allocate meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function(*given)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# What records on a device type, and what makes the memory that its recordings share.
RECORDERS: dict[str, tuple[Callable[..., Replay], Callable[[], Any]]] = {
    "cuda": (_record_cuda, torch.cuda.graph_pool_handle)
}


class Graphs:
    """Keeps recorded functions of tensors, by key. Not for several threads at once, nor for several streams.

    A key says what decides which kernels run beside the tensors' shapes, dtypes and strides, and beside torch's
    switches for precision: options. What a function reads and writes beside its tensors has to stay where it is.
    The first call with a key runs as it is, which compiles kernels; the second is recorded. Where that fails, as when
    another thread waits for the device meanwhile, there is a warning, the call runs as it is, and the next one tries
    again. A function may run several times: it has to write the same each time.
    `most` are kept, those that were used last; they share their memory. `recorded`, `replayed` count.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, tuple[tuple[Tensor, ...], Replay] | None] = OrderedDict()
        self._pool: Any = None
        self.recorded = 0
        self.replayed = 0

    def __call__(self, key: Hashable, function: Function, *given: Tensor) -> Tensor:
        """Return `function(*given)`: a tensor that the next call may overwrite."""
        key = (key, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in given), *_switches())
        if key not in self._kept:
            self._keep(key, None)
            return function(*given)
        kept = self._kept[key]
        if kept is None:
            try:
                kept = self._record(function, given)
            except RuntimeError as error:
                warnings.warn(f"a CUDA graph was not recorded, the work runs without it: {error}", stacklevel=2)
                return function(*given)
        self._keep(key, kept)
        inside, replay = kept
        for mine, tensor in zip(inside, given, strict=True):
            mine.copy_(tensor)
        self.replayed += 1
        return replay()

    def _record(self, function: Function, given: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Replay]:
        record, new_pool = RECORDERS[given[0].device.type]
        # What is made here serves later calls in any mode.
        with _RECORDING, torch.inference_mode(False), torch.no_grad():
            if self._pool is None:
                self._pool = new_pool()
            inside = tuple(tensor.clone() for tensor in given)
            replay = record(function, inside, self._pool)
        self.recorded += 1
        return inside, replay

    def _keep(self, key: Hashable, kept: tuple[tuple[Tensor, ...], Replay] | None) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


def _switches() -> tuple[Hashable, ...]:
    """What of torch's settings and ours decides which kernels run."""
    backends = torch.backends
    matmul = backends.cuda.matmul
    return (
        registry.default_backend(),
        matmul.fp32_precision,
        backends.cudnn.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )
