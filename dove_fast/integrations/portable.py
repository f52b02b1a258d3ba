"""The VQGAN's encoder and the token decoder as files that run without dove_fast: ONNX, or torch.export's archive.

Shape suffixes: B images of S pixels a side, N features of C channels, M padded tokens of width d, T the most of them.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dove_fast
from dove_fast.atomic import replacing
from dove_fast.errors import BackendError
from dove_fast.models.dove import DOVE

__all__ = ["METADATA_KEY", "export_encoder", "export_token_decoder"]

# What the files say about themselves: ONNX's `metadata_props`, an extra file of torch.export's archive.
METADATA_KEY = "dove_fast.json"
# A protobuf message, which an ONNX model is, has fewer bytes than this; the graph itself takes well below a MiB.
LARGEST_ONNX = (1 << 31) - (1 << 20)


def export_encoder(model: DOVE, path: str | os.PathLike[str]) -> None:
    """Write the VQGAN's encoder: images (B, 3, S, S) fp32 in [0, 1] -> features (B, N, C) fp32, any B.

    What `DOVE.encode` computes, before the codebook. The inputs and outputs are called `images` and `features`.
    A path that ends in .onnx becomes an ONNX model; in .pt2, what `torch.export.load` reads. Neither has custom
    operators: the norms are torch's own, which other runtimes know by name. Their results are those of the model
    within 1e-5 relative. The model must be fp32 and on the CPU; it is not changed. The file appears whole or not
    at all, and says what it was made from under `METADATA_KEY`: the part, the configuration, the model's fingerprint.
    A .pt2 file computes on the CPU, whose name is in its graph; for another device, call
    `torch.export.passes.move_to_device_pass(torch.export.load(path), "cuda")` and then `.module()`.
    Raises `TypeError` for no `DOVE`, `ValueError` for another dtype, device or ending, and for more than ONNX's 2 GiB,
    `FileNotFoundError` where the directory is missing, `ImportError` without the packages that write ONNX.
    Source: METHOD section 2.
    """
    target = _checked(model, path)
    images = torch.zeros(2, 3, model.config.image_size, model.config.image_size)
    part = _Part("encoder", _Encoder(model), {"images": images}, ({0: "batch"},), "features")
    _write(part, model, target)


def export_token_decoder(
    model: DOVE, path: str | os.PathLike[str], *, output: Literal["images", "grid"] = "images"
) -> None:
    """Write the way back: tokens (B, M, d) fp32 and lengths (B,) int64 -> images (B, 3, S, S), any B and any M.

    tokens: row b's first lengths[b], at most T, are its tokens; what stands behind them is not read, so any padding
    will do. The lengths are not checked. The inputs are called `tokens` and `lengths`, the output `images`: what
    `DOVE.decode` returns, not clamped. output="grid" stops before the codebook and the VQGAN's decoder, with the
    feature grid `grid` (B, C, h, w). In fp32 a feature that is as near to two codewords as rounding can tell may get
    the other one, as between any two ways of computing; all else agrees within 1e-5 relative.
    A .pt2 file computes on the CPU, whose name is in its graph; for another device, call
    `torch.export.passes.move_to_device_pass(torch.export.load(path), "cuda")` and then `.module()`.
    The files, and what is raised, are as with `export_encoder`; `ValueError` for another output, too.
    Source: METHOD section 3.
    """
    target = _checked(model, path)
    if output not in ("images", "grid"):
        raise ValueError(f"output must be 'images' or 'grid', got {output!r}")
    inputs = {
        "tokens": torch.zeros(2, 3, model.config.generator.hidden_size),
        "lengths": torch.tensor([3, 2]),
    }
    dynamic = ({0: "batch", 1: "tokens"}, {0: "batch"})
    module = _TokenDecoder(model, to_images=output == "images")
    _write(_Part("token_decoder", module, inputs, dynamic, output), model, target)


@dataclass(frozen=True)
class _Part:
    """A module to export: example inputs by name, each one's dimensions of any size by name, and its output's name."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    dynamic: Sequence[Mapping[int, str]]
    output: str


class _Encoder(nn.Module):
    def __init__(self, model: DOVE) -> None:
        super().__init__()
        # A file has the parameters of the module that was exported, needed or not.
        self.model = _without(model, "generator", "token_decoder")
        self.model.vqgan = _without(model.vqgan, "decoder", "quantize", "post_quant_conv")

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode(images)


class _TokenDecoder(nn.Module):
    def __init__(self, model: DOVE, *, to_images: bool) -> None:
        super().__init__()
        self.model = _without(model, "generator", *(() if to_images else ("vqgan",)))
        if to_images:
            self.model.vqgan = _without(model.vqgan, "encoder", "quant_conv")
        self.to_images = to_images

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        # To T positions, whatever M is, with zeros where no token is: what the token decoder reads.
        positions = torch.arange(self.model.config.num_tokens)
        real = positions < lengths[:, None]
        padded = tokens.index_select(1, positions.clamp(max=tokens.shape[1] - 1))
        padded = torch.where(real[:, :, None], padded, 0.0)
        key_mask = None if self.model.config.decoder_attends_padding else real
        states = self.model.token_decoder(padded, key_mask)
        return self.model.pictures(states) if self.to_images else self.model.grid(states)


def _without(module: Any, *names: str) -> Any:
    """Return a copy of a module that shares everything with it but lacks some of its parts."""
    part = copy.copy(module)
    part._modules = {name: child for name, child in module._modules.items() if name not in names}
    return part


def _checked(model: DOVE, path: str | os.PathLike[str]) -> Path:
    if not isinstance(model, DOVE):
        raise TypeError(f"model must be a DOVE, got {type(model).__name__}")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(
            f"a model is exported in float32 from the CPU, got {model.dtype} on {model.device}; use "
            "copy.deepcopy(model).float().cpu()"
        )
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"path must end in .onnx or .pt2 (torch.export), got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no directory {path.parent} to write {path.name} into")
    if path.suffix == ".onnx":
        _import_onnx()
    return path


def _import_onnx() -> None:
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"ONNX files need onnx and onnxscript, which cannot be imported ({error}); pip install 'dove-fast[export]'"
        ) from error


def _write(part: _Part, model: DOVE, path: Path) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in part.module.parameters())
    if path.suffix == ".onnx" and size > LARGEST_ONNX:
        raise ValueError(f"an ONNX file has at most 2 GiB, and the {part.name} has {size} bytes of weights; write .pt2")
    about = json.dumps(
        {
            "part": part.name,
            "version": dove_fast.__version__,
            "fingerprint": model.fingerprint(),
            "config": model.config.to_dict(),
        }
    )
    with warnings.catch_warnings():
        # torch's own, about its tree specifications, weights that share a storage, and two inputs of one batch size.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="No complete tensor found|# The axis name", category=UserWarning)
        program = _trace(part)
        if path.suffix == ".pt2":
            with replacing(path) as file:
                torch.export.save(program, cast("Any", file), extra_files={METADATA_KEY: about})
            return
        content = _onnx(part, program, about)
    with replacing(path) as file:
        file.write(content)


def _trace(part: _Part) -> torch.export.ExportedProgram:
    """Return the part's graph with torch's own operators alone."""
    names = {name for axes in part.dynamic for name in axes.values()}
    sizes = {name: torch.export.Dim(name) for name in names}
    dynamic = tuple({axis: sizes[name] for axis, name in axes.items()} for axes in part.dynamic)
    with torch.no_grad():
        program = torch.export.export(part.module, tuple(part.inputs.values()), dynamic_shapes=dynamic, strict=False)
        program = program.run_decompositions(_plain_forms())
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dove_fast":
            raise BackendError(f"{node.target} has no form in torch's own operators for export")
    return program


def _onnx(part: _Part, program: torch.export.ExportedProgram, about: str) -> bytes:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=list(part.inputs),
        output_names=[part.output],
        dynamic_shapes=tuple(part.dynamic),
        verbose=False,
    )
    message = cast("Any", exported).model_proto
    message.metadata_props.add(key=METADATA_KEY, value=about)
    return cast("bytes", message.SerializeToString())


def _plain_forms() -> dict[Any, Callable[..., Any]]:
    """Return each op of the exported parts in torch's own operators, in the signature of its schema.

    Results that only a backward reads are empty: an exported graph has none, and leaves them out.
    """
    ops = torch.ops.dove_fast
    return {
        ops.group_norm_silu.default: _group_norm_silu,
        ops.layer_norm_pair.default: _layer_norm_pair,
        ops.add_layer_norm_pair.default: _add_layer_norm_pair,
        ops.vq_lookup.default: _vq_lookup,
    }


def _group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # Around 0 first: torch's and other runtimes' variance is off where a group's mean is far larger than its
    # deviation, by a few per cent for a flat picture.
    groups = x.flatten(2).unflatten(1, (num_groups, -1)).flatten(2)
    centred = (groups - groups.mean(2, keepdim=True)).view(x.shape)
    out = F.group_norm(centred, num_groups, weight, bias, eps)
    unread = x.new_empty(0)
    return F.silu(out) if activation == "silu" else out, unread, unread


def _layer_norm_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unread = x.new_empty(0)
    y1 = F.layer_norm(x, x.shape[-1:], weight1, bias1, eps)
    y2 = unread if weight2 is None else F.layer_norm(x, x.shape[-1:], weight2, bias2, eps)
    return y1, y2, unread, unread


def _add_layer_norm_pair(
    x: Tensor, addend1: Tensor, addend2: Tensor | None, *norms: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = addend1 + x if addend2 is None else addend1 + addend2 + x
    return total, *_layer_norm_pair(total, *norms)


def _vq_lookup(x: Tensor, codebook: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    # |x - c|^2 / 2 less |x|^2 / 2, which is the same for every codeword.
    scores = torch.addmm(codebook.square().sum(1) / 2, x.flatten(0, -2), codebook.T, alpha=-1)
    codes = scores.argmin(1).view(x.shape[:-1])
    return F.embedding(codes, codebook), codes
