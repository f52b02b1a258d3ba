"""The encoder and the token decoder without dove_fast: as ONNX in onnxruntime, and by torch.export.

pip install 'dove-fast[export]'
python portable_models.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import onnxruntime
import torch

from dove_fast import DOVE
from dove_fast.data import ShortSideCenterCrop, load_image
from dove_fast.integrations.portable import METADATA_KEY, export_encoder, export_token_decoder

PHOTOS = Path(__file__).parents[1] / "photos"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||actual - expected|| / ||expected||."""
    return float((actual - expected).norm() / expected.norm())


def main(directory: Path) -> dict[str, float]:
    """Write both files, run them on the sample photographs, and return how far they are from the model."""
    model = DOVE.from_pretrained("tiny")
    # Both functions write either format, by the path's ending.
    export_encoder(model, directory / "encoder.onnx")
    export_token_decoder(model, directory / "token_decoder.pt2")

    crop = ShortSideCenterCrop(model.config.image_size)
    paths = sorted(PHOTOS.glob("*.jpg"))
    images = torch.stack([torch.from_numpy(load_image(str(path), crop).pixels) for path in paths]) / 255
    session = onnxruntime.InferenceSession(directory / "encoder.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"images": images.numpy()})
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])

    tokens = model.tokenize(images)
    padded, lengths = tokens.to_padded()
    decoder = torch.export.load(directory / "token_decoder.pt2").module()
    with torch.no_grad():
        decoded = decoder(padded, lengths)
        errors = {
            "encoder.onnx": relative_error(torch.from_numpy(features), model.encode(images)),
            "token_decoder.pt2": relative_error(decoded, model.decode(tokens)),
        }
    for name, error in errors.items():
        size = (directory / name).stat().st_size
        print(f"{name}: {size / 2**20:.1f} MiB, relative error {error:.1e} on {len(images)} photographs")
    print(f"the file says it is the {about['part']} of {about['fingerprint'][:19]}..")
    return errors


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
