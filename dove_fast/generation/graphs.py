"""Work on a GPU that is recorded once for a shape, as a CUDA graph, and replayed: one launch instead of a hundred."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

__all__ = ["RECORDERS", "Graphs", "bucket", "new_graphs"]

Function = Callable[..., Tensor]
Replay = Callable[[], Tensor]


def bucket(rows: int) -> int:
    """Return the least of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, .. that holds so many rows.

    Four sizes for every power of two: at most a quarter is computed in vain, and a batch that shrinks needs few graphs.
    """
    step = 1
    while rows > 8 * step:
        step *= 2
    return -(-rows // step) * step


def _record_cuda(function: Function, *given: Tensor) -> Replay:
    """Record `function(*given)`, and return what runs it again on what those tensors hold then."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*given)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# What records on a device type.
RECORDERS: dict[str, Callable[..., Replay]] = {"cuda": _record_cuda}


class Graphs:
    """Keeps recorded functions of tensors, by key. Not for several threads at once, nor for several streams.

    A key says everything that decides which kernels run, beside the contents of the tensors: their shapes, options.
    What a function reads and writes beside its tensors has to stay where it is.
    The first call with a key runs as it is, which compiles kernels and warms the libraries up; the second is recorded.
    `most` are kept, those that were used last. `recorded`, `replayed` count.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, tuple[tuple[Tensor, ...], Replay] | None] = OrderedDict()
        self.recorded = 0
        self.replayed = 0

    def __call__(self, key: Hashable, function: Function, *given: Tensor) -> Tensor:
        """Return `function(*given)`: a tensor that the next call with this key may overwrite."""
        if key not in self._kept:
            self._keep(key, None)
            return function(*given)
        kept = self._kept[key]
        if kept is None:
            inside = tuple(tensor.clone() for tensor in given)
            kept = inside, RECORDERS[given[0].device.type](function, *inside)
            self.recorded += 1
        self._keep(key, kept)
        inside, replay = kept
        for mine, tensor in zip(inside, given, strict=True):
            mine.copy_(tensor)
        self.replayed += 1
        return replay()

    def _keep(self, key: Hashable, kept: tuple[tuple[Tensor, ...], Replay] | None) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


def new_graphs(*parameters: Tensor) -> Graphs:
    """Return graphs that read these parameters: what `Derived` makes anew when one of them changes."""
    del parameters
    return Graphs()
