"""Lets a torchvision built for another torch be imported: transformers and lpips import it wherever it is installed.

Such a build fails with `operator torchvision::nms does not exist`. Nothing here calls these operators, and dove_fast
itself works without torchvision. Import this module before whatever imports torchvision.
"""

from __future__ import annotations

import importlib.util

import torch

# A Library removes its definitions when it is collected.
_KEEP_ALIVE: list[torch.library.Library] = []


def _define_torchvision_ops() -> None:
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP_ALIVE.append(library)


_define_torchvision_ops()
