"""The model a job runs: from a checkpoint, on its device and in its dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dove_fast.errors import BackendError
from dove_fast.models.dove import DOVE
from dove_fast.models.shipped import SHIPPED
from dove_fast.ops import registry
from dove_fast.store.layout import DTYPES

__all__ = ["LoadedModel", "default_device", "load_model", "own_device"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the fingerprint it had before it was cast to another dtype."""

    model: DOVE
    fingerprint: str


def default_device() -> torch.device:
    """Return the GPU if there is one, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def own_device(device: str | None, local: int) -> str | None:
    """Return the GPU of its own that the `local`-th process of a machine has, where `device` is None or "cuda".

    Any other device, and every one where there is no GPU, is returned as it is, for `load_model` to take or to refuse.
    """
    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local % torch.cuda.device_count()}"


def load_model(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
) -> LoadedModel:
    """Load a checkpoint: what `DOVE.from_pretrained` takes; None is the shipped model, even where a path is named tiny.

    `device` None is `default_device()`; `dtype` is a key of `DTYPES`, None is `DOVE.from_pretrained`'s.
    Raises `FileNotFoundError` and `CheckpointError` as `DOVE.from_pretrained` does, `ValueError` for an unknown device
    or dtype, `BackendError` for a device that is not here, or a backend named by the environment that cannot run there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = _device(device)
    model = DOVE.from_pretrained(SHIPPED["tiny"] if checkpoint is None else checkpoint)
    fingerprint = model.fingerprint()
    if dtype is not None:
        model = model.to(DTYPES[dtype])
    for op in registry.available_backends():
        # Refused before the job starts, not in the middle of it.
        registry.choose(op, target, model.dtype)
    return LoadedModel(model.to(target).eval(), fingerprint)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(name)!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(name)!r}")
    count = torch.cuda.device_count()
    index = 0 if device.index is None else device.index
    if index >= count:
        raise BackendError(f"device {name} is not here: torch sees {count} CUDA devices; use --device cpu")
    # With its number, because tensors on it report one.
    return torch.device("cuda", index)
