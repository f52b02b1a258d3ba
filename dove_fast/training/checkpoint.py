"""A run's checkpoints: directories that appear whole or not at all, without pickles.

`checkpoints/step-000001000/` holds `model/` and `ema/`, which `DOVE.from_pretrained` loads, `training.safetensors` with
the optimisers, the discriminator and the codebook's counts, and `state.json` with the rest.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dove_fast.atomic import is_temporary, make_directory, replacing, sync_directory
from dove_fast.errors import CheckpointError
from dove_fast.models.dove import DOVE

__all__ = [
    "RunState",
    "latest_checkpoint",
    "load_optimizer",
    "optimizer_tensors",
    "read_checkpoint",
    "read_models",
    "remove_unfinished",
    "write_checkpoint",
]

CHECKPOINTS = "checkpoints"
MODEL, AVERAGED, TENSORS, STATE = "model", "ema", "training.safetensors", "state.json"
NAME = re.compile(r"step-(\d{9,})")
FORMAT_VERSION = 1
# What a state must have, and be.
STATE_TYPES: dict[str, Any] = {
    "step": int,
    "skipped": int,
    "samples": int,
    "data": str,
    "threshold": dict,
    "left_out": dict,
}


@dataclass
class RunState:
    """Where a run is: everything that decides how it goes on, but for weights and moments.

    step: optimiser steps done, skipped ones included. threshold: `RunningThreshold.state_dict()`. skipped: steps left
    out because they were not finite, all and the last ones in a row. left_out: samples that could not be used, by
    reason. samples, data: how many the data had, and a hash of some of them.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    samples: int = 0
    data: str = ""
    threshold: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]], prefix: str
) -> dict[str, Tensor]:
    """Return an optimiser's moments by the names of their parameters."""
    return {
        f"{prefix}.{key}.{name}": value
        for name, parameter in parameters
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[tuple[str, nn.Parameter]],
    prefix: str,
    tensors: Mapping[str, Tensor],
) -> None:
    """Give an optimiser the moments that `optimizer_tensors` returned.

    A parameter that never had a gradient has none. Raises `CheckpointError` for one that has a part of them.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name, _ in parameters}
    for full, tensor in tensors.items():
        owner, _, rest = full.partition(".")
        key, _, name = rest.partition(".")
        if owner == prefix and name in found:
            found[name][key] = tensor
    keys = {key for state in found.values() for key in state}
    for name, state in found.items():
        if state and state.keys() != keys:
            raise CheckpointError(f"the checkpoint lacks {prefix}.{min(keys - state.keys())}.{name}")
    for name, parameter in parameters:
        for key, tensor in found[name].items():
            # The count of steps has a device of its own.
            device = tensor.device if tensor.dim() == 0 and parameter.device.type == "cpu" else parameter.device
            layout = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
            optimizer.state[parameter][key] = layout.copy_(tensor).to(device)


def write_checkpoint(
    output: Path, model: DOVE, averaged: DOVE | None, tensors: Mapping[str, Tensor], state: RunState, *, keep: int
) -> Path:
    """Write a checkpoint of `state.step`, then remove all but the last `keep`. Returns its directory."""
    root = output / CHECKPOINTS
    make_directory(root)
    target = root / _name(state.step)
    if target.exists():
        # A run that went on from it and did no step.
        return target
    temporary = root / f".dove-{secrets.token_hex(8)}.tmp"
    temporary.mkdir()
    try:
        model.save_pretrained(temporary / MODEL)
        if averaged is not None:
            averaged.save_pretrained(temporary / AVERAGED)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        for name, content in (
            (TENSORS, safetensors.torch.save(weights)),
            (STATE, (json.dumps({"format_version": FORMAT_VERSION, **vars(state)}, indent=2) + "\n").encode()),
        ):
            with replacing(temporary / name) as file:
                file.write(content)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(root)
    for _, old in _all_checkpoints(root)[:-keep]:
        # Renamed first, so that no half of it is ever taken for a checkpoint.
        doomed = root / f".dove-{secrets.token_hex(8)}.tmp"
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return target


def latest_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint with the most steps, None where there is none."""
    root = output / CHECKPOINTS
    found = _all_checkpoints(root) if root.is_dir() else []
    return found[-1][1] if found else None


def remove_unfinished(output: Path) -> None:
    """Remove the checkpoints that a killed run left half written."""
    root = output / CHECKPOINTS
    for entry in root.iterdir() if root.is_dir() else ():
        if is_temporary(entry.name):
            shutil.rmtree(entry)


def read_checkpoint(directory: Path) -> tuple[dict[str, Tensor], RunState]:
    """Return what `write_checkpoint` was given beside the models. Raises `CheckpointError` for a damaged one."""
    try:
        values = dict(json.loads((directory / STATE).read_text(encoding="utf-8")))
        version = values.pop("format_version")
        state = RunState(**{name: kind(values.pop(name)) for name, kind in STATE_TYPES.items()}, **values)
        tensors = safetensors.torch.load_file(directory / TENSORS)
        if directory.name != _name(state.step):
            raise ValueError(f"its state is that of step {state.step}")
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _damaged(directory, error) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory} has format version {version}, this package reads {FORMAT_VERSION}")
    return tensors, state


def read_models(directory: Path, *, averaged: bool) -> tuple[DOVE, DOVE | None]:
    """Return a checkpoint's model and, if asked for, its averaged weights. Raises `CheckpointError`."""
    try:
        return DOVE.from_pretrained(directory / MODEL), DOVE.from_pretrained(directory / AVERAGED) if averaged else None
    except (OSError, CheckpointError) as error:
        raise _damaged(directory, error) from error


def _damaged(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{directory} is damaged ({error!r}); remove it to go on from the checkpoint before it")


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _all_checkpoints(root: Path) -> list[tuple[int, Path]]:
    matches = [(NAME.fullmatch(entry.name), entry) for entry in root.iterdir()]
    return sorted((int(match[1]), entry) for match, entry in matches if match)
