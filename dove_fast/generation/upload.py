"""Images on their way to the model's device, while that computes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Upload"]


class Upload:
    """Copies images from the CPU to a device, begun here and waited for in `images`.

    To a GPU from pinned memory on `stream`, a stream for copies alone, so that neither the host nor what the device
    computes waits for the bytes. Anywhere else, and without a stream, it is a plain copy or none at all.
    """

    def __init__(self, images: Tensor, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._copied: torch.cuda.Event | None = None
        if images.device == device or stream is None:
            self._images = images.to(device)
            return
        pinned = images.pin_memory()
        with torch.cuda.stream(stream):
            self._images = pinned.to(device, non_blocking=True)
            self._copied = stream.record_event()

    def images(self) -> Tensor:
        """Return the images on the device; work on the current stream comes behind the copy."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._images.device)
            current.wait_event(self._copied)
            # Their memory is not given to the next copy before that work is done.
            self._images.record_stream(current)
        return self._images
