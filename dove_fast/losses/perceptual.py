"""LPIPS: how different two images look, by the features of a network trained on photographs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dove_fast.errors import CheckpointError

__all__ = ["LPIPS"]

logger = logging.getLogger(__name__)

# Each backbone's torchvision model, and the fewest pixels a side that its strides and poolings leave anything of.
BACKBONES = {"vgg": ("vgg16", 16), "alex": ("alexnet", 31), "squeeze": ("squeezenet1_1", 17)}

# How many tensors an error message names.
MAX_TENSORS_NAMED = 8


class LPIPS(nn.Module):
    """The LPIPS distance of the `lpips` package at every pixel, as `QDOVELoss(perceptual=...)` takes it.

    net: "vgg", "alex" or "squeeze", the backbone. weights: a file, safetensors or what `torch.save` wrote, with the
    state dict of torchvision's `vgg16`, `alexnet` or `squeezenet1_1`; its classifier is not needed. Without one the
    backbone is random, from torch's seed, and a warning is logged; `allow_download=True` lets torchvision download it
    instead. The linear layers on top are those that `lpips` ships.
    Always in evaluation mode, and no parameter learns.

    Raises `ValueError` for another net, `ImportError` where `lpips` and torchvision cannot be imported,
    `FileNotFoundError` for no such file, `CheckpointError` for one that is damaged or not this backbone's.
    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, version 0.1.
    """

    def __init__(
        self,
        net: str = "vgg",
        *,
        weights: str | os.PathLike[str] | None = None,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"net must be one of {', '.join(map(repr, BACKBONES))}, got {net!r}")
        self.net = net
        # Read first: a file that cannot be used is found before the backbone is built.
        tensors = None if weights is None else _read_weights(Path(weights))
        self.lpips = _build(net, pretrained=tensors is None and allow_download)
        if tensors is not None:
            _load_backbone(self.lpips.get_submodule("net"), tensors, str(weights), BACKBONES[net][0])
        elif not allow_download:
            logger.warning(
                "LPIPS has a random %s backbone, so its distances are not the published ones; pass weights=, a file "
                "with the state dict of torchvision's %s, or allow_download=True",
                net,
                BACKBONES[net][0],
            )
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distances (B, 1, H, W) of images and reconstructions, both (B, 3, H, W) in [0, 1].

        Computed in the weights' dtype, fp32, under autocast too; fp64 after `.double()`. The gradient goes to the
        reconstructions alone. Raises `ValueError` for shapes that do not fit, images too small for the backbone, and
        weights that were cast to a narrower dtype.
        """
        _check_shapes(images, reconstructions, self.net)
        dtype = next(self.lpips.parameters()).dtype
        if torch.promote_types(dtype, torch.float32) != dtype:
            raise ValueError(f"LPIPS computes in fp32 at least, its weights are {dtype}; leave them in torch.float32")
        with torch.autocast(images.device.type, enabled=False):
            distances: Tensor = self.lpips(images.detach().to(dtype), reconstructions.to(dtype), normalize=True)
        return distances

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in evaluation mode, whatever `mode` is: the linear layers have a dropout of their own training."""
        return super().train(False)


def _check_shapes(images: Tensor, reconstructions: Tensor, net: str) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or images.shape != reconstructions.shape:
        raise ValueError(
            f"images and reconstructions must both have shape (B, 3, H, W), got {tuple(images.shape)} and "
            f"{tuple(reconstructions.shape)}"
        )
    least = BACKBONES[net][1]
    if min(images.shape[2:]) < least:
        raise ValueError(
            f"LPIPS with net={net!r} needs images of at least {least} x {least} pixels, got "
            f"{images.shape[2]} x {images.shape[3]}"
        )


def _build(net: str, *, pretrained: bool) -> nn.Module:
    try:
        import lpips
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch raises RuntimeError.
        raise ImportError(
            f"LPIPS needs lpips and a torchvision that goes with torch {torch.__version__}, which cannot be imported "
            f"({error}); pip install 'dove-fast[train]', and torchvision from the index that torch came from"
        ) from error
    with warnings.catch_warnings():
        # lpips calls torchvision with arguments that have other names now.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.")
        model: nn.Module = lpips.LPIPS(net=net, pnet_rand=not pretrained, spatial=True, verbose=False)
    return model


def _read_weights(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of backbone weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # torch has no one exception for a file that is truncated, not its own, or would run code.
        raise CheckpointError(f"{path} is damaged, or no file of tensors alone: {error}") from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path} must hold a state dict, got {type(tensors).__name__}")
    return tensors


def _load_backbone(backbone: nn.Module, tensors: Mapping[str, Any], source: str, model: str) -> None:
    """Give lpips's backbone its tensors: its `slice{k}.{i}.*` is torchvision's `features.{i}.*`."""
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for ours, expected in backbone.state_dict().items():
        theirs = f"features.{ours.partition('.')[2]}"
        tensor = tensors.get(theirs)
        if not isinstance(tensor, Tensor):
            problems.append(f"{theirs} is missing")
        elif tensor.shape != expected.shape:
            problems.append(f"{theirs} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{theirs} is {tensor.dtype}, expected floating")
        else:
            state[ours] = tensor
    if problems:
        shown = "; ".join(problems[:MAX_TENSORS_NAMED])
        more = f"; and {len(problems) - MAX_TENSORS_NAMED} more" if len(problems) > MAX_TENSORS_NAMED else ""
        raise CheckpointError(f"{source} is not the state dict of torchvision's {model}: {shown}{more}")
    backbone.load_state_dict(state)
