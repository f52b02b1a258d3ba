"""The data sets that `[data]` names."""

from __future__ import annotations

from dove_fast.data import ImageFolder, JoinedSamples, OpenImages, Samples, VisualGenome, WebDataset
from dove_fast.training.config import DataConfig, DataSource

__all__ = ["open_samples"]


def open_samples(config: DataConfig) -> Samples:
    """Open the data sets: index their files, without decoding a picture. Raises what their classes raise."""
    opened = [_open(source) for source in config.sources]
    return opened[0] if len(opened) == 1 else JoinedSamples(opened)


def _open(source: DataSource) -> Samples:
    if source.kind == "folder":
        return ImageFolder(source.path)
    if source.kind == "webdataset":
        return WebDataset(source.path)
    if source.kind == "visual-genome":
        wanted = source.regions or "all"
        return VisualGenome(
            source.path, descriptions=wanted in ("descriptions", "all"), questions=wanted in ("questions", "all")
        )
    wanted = source.regions or "relationships"
    return OpenImages(
        source.path, source.split, relationships=wanted in ("relationships", "all"), boxes=wanted in ("boxes", "all")
    )
