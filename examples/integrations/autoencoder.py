"""DOVE where code has a diffusers autoencoder: the same calls, with tokens in the place of a latent grid.

    pip install dove-fast diffusers
    python autoencoder.py            # writes pictures/
    python autoencoder.py elsewhere

diffusers is here for its image processor alone; `DOVEAutoencoder` does not need it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dove_fast.integrations.autoencoder import DOVEAutoencoder

PHOTOS = Path(__file__).parents[1] / "photos"


def main(directory: Path) -> dict[str, Any]:
    """Take the sample photographs through the autoencoder, and write what comes back as PNG files into `directory`."""
    # Was: vae = VQModel.from_pretrained("path/to/VQModel").eval()
    vae = DOVEAutoencoder.from_pretrained("tiny").eval()
    processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))

    paths = sorted(PHOTOS.glob("*.jpg"))
    photos = []
    for path in paths:
        with Image.open(path) as photo:
            side = min(photo.size)
            left, top = (photo.width - side) // 2, (photo.height - side) // 2
            photos.append(photo.convert("RGB").crop((left, top, left + side, top + side)))
    size = vae.config.sample_size
    images = processor.preprocess(photos, height=size, width=size).to(vae.device, vae.dtype)  # in [-1, 1]

    with torch.no_grad():
        latents = vae.encode(images).latents
        decoded = vae.decode(latents).sample
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / f"{path.stem}.png" for path in paths]
    for target, picture in zip(written, processor.postprocess(decoded), strict=True):
        picture.save(target)

    psnr = -10 * (decoded.clamp(-1, 1) - images).div(2).square().mean(dim=(1, 2, 3)).log10()
    for target, length, quality in zip(written, latents.host_lengths, psnr.tolist(), strict=True):
        print(f"{length:3} tokens  {quality:.1f} dB  {target}")
    return {"images": images, "latents": latents, "decoded": decoded, "psnr": psnr}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=Path("pictures"), help="where to write (default: pictures)"
    )
    main(parser.parse_args().directory)
