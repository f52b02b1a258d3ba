"""The features that a linear probe compares, of images in batches, kept in files until a classifier reads them.

Shape suffixes: n images, B of them in a batch, N features of C channels, T the most tokens an image can have, d width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dove_fast.evaluation.logistic import Rows
from dove_fast.failures import JobError
from dove_fast.models.lengths import eos_lengths
from dove_fast.ragged import RaggedTokens

if TYPE_CHECKING:
    from dove_fast.config import DOVEConfig
    from dove_fast.models.dove import DOVE

__all__ = ["ProbeFeatures", "fixed_lengths"]

PADDED = "padded tokens"


def fixed_lengths(config: DOVEConfig) -> list[int]:
    """Return the token counts that are pooled beside the adaptive one: T / 8, T / 2 and T."""
    most = config.num_tokens
    return sorted({max(1, most // 8), max(1, most // 2), most})


class ProbeFeatures:
    """All kinds of features of at most `images` images, in files of `directory`.

    eos_threshold: None takes the model's. Raises `ValueError` where they might not fit into the directory.
    """

    def __init__(self, directory: Path, model: DOVE, images: int, eos_threshold: float | None = None) -> None:
        _check_space(directory, model.config, images)
        self._directory, self._model, self.config = directory, model, model.config
        self._threshold = model.config.eos_threshold if eos_threshold is None else eos_threshold
        self._files: dict[str, _File] = {}
        self._lengths: list[int] = []

    def add(self, pixels: npt.NDArray[np.uint8]) -> int:
        """Compute and keep the features of images, uint8 (B, 3, S, S); returns how many tokens EOS chose for them.

        The encoder runs once, and the generator over all T steps, as the longest fixed length needs them: shorter ones
        are their beginnings. Raises `JobError` for features that are not finite, `OSError` where the disk fails.
        """
        model = self._model
        images = torch.from_numpy(pixels).to(model.device)
        with torch.no_grad():
            features = model.encode_in_chunks(images)
            none = torch.empty(0, dtype=torch.int64)
            states, logits = model.generate(features, [none] * len(images))
            tokens = RaggedTokens.from_padded(states, eos_lengths(logits, self._threshold))
        features, states = features.float(), states.float()
        if not (features.isfinite().all() and states.isfinite().all()):
            raise JobError(
                f"features are not finite in {model.dtype}; if the model is sound, another --dtype holds them"
            )
        self._keep("pooled tokens, adaptive", torch.stack([row.float().mean(dim=0) for row in tokens]))
        for length in fixed_lengths(self.config):
            self._keep(f"pooled tokens, {length}", states[:, :length].mean(dim=1))
        self._keep(PADDED, tokens.values.float())
        self._keep("VQGAN features, pooled", features.mean(dim=1))
        self._keep("VQGAN features, flattened", features.flatten(1))
        self._keep("pixels", torch.from_numpy(pixels).flatten(1))
        self._lengths += tokens.host_lengths
        return tokens.values.shape[0]

    def _keep(self, name: str, rows: Tensor) -> None:
        array = rows.cpu().numpy()
        if name not in self._files:
            path = self._directory / f"{len(self._files)}.raw"
            self._files[name] = _File(path, array.shape[1], array.dtype)
        self._files[name].append(array)

    @property
    def kinds(self) -> int:
        """How many kinds of features `finished` yields."""
        return len(self._files)

    def finished(self) -> Iterator[tuple[str, Rows]]:
        """Yield each kind's name and its rows, in the order of the images."""
        for name, file in self._files.items():
            rows = file.read_back()
            yield name, _Padded(rows, self._lengths, self.config.num_tokens) if name == PADDED else _Dense(rows)


class _File:
    """Rows of one width and dtype in a file, one behind the other."""

    def __init__(self, path: Path, width: int, dtype: np.dtype[Any]) -> None:
        self._path, self._width, self._dtype = path, width, dtype

    def append(self, rows: npt.NDArray[Any]) -> None:
        with open(self._path, "ab") as file:
            file.write(np.ascontiguousarray(rows).data)

    def read_back(self) -> npt.NDArray[Any]:
        return np.memmap(self._path, self._dtype, "r").reshape(-1, self._width)


class _Dense:
    """Rows as they lie in the file."""

    def __init__(self, rows: npt.NDArray[Any]) -> None:
        self._rows = rows
        self.shape = rows.shape[0], rows.shape[1]

    def read(self, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._rows[rows]).float()


class _Padded:
    """An image's own tokens with zeros behind them, (n, T d), of which the tokens alone are kept."""

    def __init__(self, values: npt.NDArray[Any], lengths: list[int], num_tokens: int) -> None:
        self._values, self._num_tokens = values, num_tokens
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.shape = len(lengths), num_tokens * values.shape[1]

    def read(self, rows: npt.NDArray[np.int64]) -> Tensor:
        padded = torch.zeros(len(rows), self._num_tokens, self._values.shape[1])
        for row, start, stop in zip(padded, self._offsets[rows], self._offsets[rows + 1], strict=True):
            row[: stop - start] = torch.from_numpy(np.array(self._values[start:stop]))
        return padded.flatten(1)


def _check_space(directory: Path, config: DOVEConfig, images: int) -> None:
    """Raise `ValueError` where so many images, all of T tokens, would not fit."""
    width, channels = config.generator.hidden_size, config.vqgan.vq_embed_dim
    numbers = (1 + len(fixed_lengths(config)) + config.num_tokens) * width + (1 + config.num_features) * channels
    image = 4 * numbers + 3 * config.image_size**2
    free = shutil.disk_usage(directory).free
    if images * image > free:
        raise ValueError(
            f"the features of {images} images may take {images * image / 2**30:.1f} GiB, and {directory.parent} has "
            f"{free / 2**30:.1f}; take at most {free // image} images, or set TMPDIR to a larger disk"
        )
