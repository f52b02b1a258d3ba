"""Checkpoint directories: JSON configurations and safetensors weights, whole or sharded; never pickles.

Reads dove_fast's own directories, and assembles components from diffusers' and transformers' (`foreign`), without
importing either library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dove_fast.atomic import replacing
from dove_fast.config import DOVEConfig, GPTNeoXConfig, VQGANConfig
from dove_fast.errors import CheckpointError
from dove_fast.models import foreign
from dove_fast.models.shipped import SHIPPED

__all__ = [
    "CONFIG_NAME",
    "Components",
    "assign",
    "read_components",
    "read_config",
    "read_dove",
    "weight_files",
    "write_dove",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
VQ_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# How many tensors of each kind an error message lists.
MAX_TENSORS_NAMED = 8


@dataclass(frozen=True)
class Components:
    """What `read_components` found: a configuration and the tensors for each part."""

    vqgan_config: VQGANConfig
    vqgan: dict[str, Tensor]
    image_range: tuple[float, float]
    generator_config: GPTNeoXConfig
    generator: dict[str, Tensor]
    token_decoder_config: GPTNeoXConfig
    token_decoder: dict[str, Tensor]


def read_dove(directory: str | os.PathLike[str]) -> tuple[DOVEConfig, dict[str, Tensor]]:
    """Read a directory that `write_dove` wrote: its configuration and its tensors.

    Raises `FileNotFoundError` for no such directory, `CheckpointError` for one that is not a DOVE checkpoint.
    """
    return read_config(directory), _read_tensors(directory, WEIGHTS_NAME)


def read_components(
    vqgan: str | os.PathLike[str],
    generator: str | os.PathLike[str],
    token_decoder: str | os.PathLike[str] | None,
    image_range: tuple[float, float] | None,
) -> Components:
    """Read a diffusers `VQModel` directory and one or two transformers GPT-NeoX directories.

    `token_decoder=None` takes the generator's weights. Raises `FileNotFoundError` or `CheckpointError`.
    """
    vqgan_data = _read_config(vqgan)
    vqgan_config = _converted(foreign.vqgan_config, vqgan_data, vqgan)
    if image_range is None:
        image_range = _converted(foreign.image_range, vqgan_data, vqgan)
    generator_config = _converted(foreign.gpt_neox_config, _read_config(generator), generator)
    generator_tensors = foreign.gpt_neox_tensors(_read_tensors(generator, WEIGHTS_NAME))
    if token_decoder is None:
        decoder_config, decoder_tensors = generator_config, dict(generator_tensors)
    else:
        decoder_config = _converted(foreign.gpt_neox_config, _read_config(token_decoder), token_decoder)
        decoder_tensors = foreign.gpt_neox_tensors(_read_tensors(token_decoder, WEIGHTS_NAME))
    decoder_tensors.pop(foreign.EMBEDDING_KEY, None)
    return Components(
        vqgan_config=vqgan_config,
        vqgan=foreign.vqgan_tensors(_read_tensors(vqgan, VQ_WEIGHTS_NAME)),
        image_range=image_range,
        generator_config=generator_config,
        generator=generator_tensors,
        token_decoder_config=foreign.without_embedding(decoder_config),
        token_decoder=decoder_tensors,
    )


def assign(module: nn.Module, tensors: Mapping[str, Tensor], source: str, *, dtype: torch.dtype | None) -> None:
    """Give a module on the meta device its tensors, cast to `dtype` unless that is None, in the module's memory layout.

    Raises `CheckpointError` that lists every kind of tensor that is missing, not expected, misshapen or not floating.
    """
    expected = module.state_dict()
    problems = [
        *_listed("missing", (name for name in expected if name not in tensors)),
        *_listed("not expected", (name for name in tensors if name not in expected)),
        *_listed(
            "of another shape",
            (
                f"{name} {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in tensors and tensors[name].shape != tensor.shape
            ),
        ),
        *_listed(
            "not floating",
            (f"{name} {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()),
        ),
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit its configuration: {'; '.join(problems)}")
    # Copies, because the tensors may be views of a memory-mapped file that somebody overwrites later.
    copies = {
        name: torch.empty_like(expected[name], dtype=dtype or tensor.dtype, device=tensor.device).copy_(tensor)
        for name, tensor in tensors.items()
    }
    module.load_state_dict(copies, assign=True)


def write_dove(directory: str | os.PathLike[str], config: DOVEConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a configuration and its tensors into a directory, which is made; each file by temporary file and rename."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, content in (
        (WEIGHTS_NAME, safetensors.torch.save(weights, metadata={"format": "pt"})),
        (CONFIG_NAME, config.to_json().encode()),
    ):
        with replacing(target / name) as file:
            file.write(content)


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = list(names)
    if not found:
        return []
    more = f", and {len(found) - MAX_TENSORS_NAMED} more" if len(found) > MAX_TENSORS_NAMED else ""
    return [f"{len(found)} {what}: {', '.join(found[:MAX_TENSORS_NAMED])}{more}"]


def _converted(convert: Any, data: dict[str, Any], directory: str | os.PathLike[str]) -> Any:
    try:
        return convert(data)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{Path(directory, CONFIG_NAME)}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def read_config(directory: str | os.PathLike[str]) -> DOVEConfig:
    """Read a DOVE checkpoint's configuration. Raises `FileNotFoundError` or `CheckpointError` as `read_dove` does."""
    config: DOVEConfig = _converted(DOVEConfig.from_dict, _read_config(directory), directory)
    return config


def _read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(directory)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint directory at {path}")
    if not (path / CONFIG_NAME).is_file():
        hint = f"; the model that comes with the package is at {SHIPPED[str(path)]}" if str(path) in SHIPPED else ""
        raise CheckpointError(f"{path} is not a checkpoint directory: it has no {CONFIG_NAME}{hint}")
    return _read_json(path / CONFIG_NAME)


def weight_files(directory: str | os.PathLike[str], weights_name: str = WEIGHTS_NAME) -> list[Path]:
    """Return a checkpoint's safetensors files: `weights_name`, or the shards that `weights_name`.index.json lists.

    Raises `CheckpointError` if there are none, for weights in a pickle, and for an index that cannot be followed.
    """
    path = Path(directory)
    if (path / weights_name).is_file():
        return [path / weights_name]
    index = path / f"{weights_name}.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(_read_weight_map(index).values()))]
    pickles = sorted(item.name for item in path.iterdir() if item.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{path} holds its weights in {', '.join(pickles)}, a pickle, which could run code and is never read; "
            f"save it as {weights_name} with safe_serialization=True"
        )
    raise CheckpointError(f"{path} has neither {weights_name} nor {index.name}")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} must have a weight_map from tensor to file name")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is outside its own directory")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which does not exist")
    return weight_map


def _read_tensors(directory: str | os.PathLike[str], weights_name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory, weights_name):
        tensors.update(_read_file(file))
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
