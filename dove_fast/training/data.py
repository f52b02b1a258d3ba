"""The data sets that `[data] kind` names."""

from __future__ import annotations

from dove_fast.data import ImageFolder, OpenImages, Samples, VisualGenome, WebDataset
from dove_fast.training.config import DataConfig

__all__ = ["open_samples"]


def open_samples(config: DataConfig) -> Samples:
    """Open a data set: index its files, without decoding a picture. Raises what its class raises."""
    if config.kind == "folder":
        return ImageFolder(config.path)
    if config.kind == "webdataset":
        return WebDataset(config.path)
    if config.kind == "visual-genome":
        return VisualGenome(config.path)
    return OpenImages(config.path, split=config.split)
