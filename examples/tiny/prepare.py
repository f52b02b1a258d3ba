"""Cut photographs into the shards that the tiny model is trained and validated on.

`python prepare.py PHOTOS OUT` takes one file of every picture below PHOTOS but grey ones, drawings and previews,
sets aside every eighth photograph, and writes OUT/train/*.tar and OUT/held-out/*.tar of square crops at many scales,
each with captioned regions for Q-DOVE.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from regions import regions

from dove_fast.data import DecodeError, ImageInput, decode_image, list_inputs

# Larger than the model's 64 pixels: the training crops again.
SIZE = 96
# Of the original's pixels; smaller ones are blurred by the enlargement, which makes simple pictures.
SMALLEST_SIDE = 48
CROPS_PER_PICTURE, CROPS_PER_SHARD = 600, 4096
HELD_OUT = 8
# Logos, charts, patterns and previews of other files, by the names that their packages give them.
LEFT_OUT = re.compile(
    r"screenshot|preview|logo|phantom|chessboard|/text\.|/page\.|clock|color\.png|/horse\.|/abstract/|/desktop/|"
    r"gnome/(adwaita|grid|licorice|pixels|symbolic|truchet|vnc|blobs|drool)|"
    r"backgrounds/(2004|calla|city|desert|fluent|focal|first|rollpaper|warty|lomiri)"
)
# Landscapes that were painted on a computer: to train on, not to measure with.
PAINTED = re.compile(
    r"wallpapers/(Altai|Canopee|Cascade|Cluster|Elarun|Flow|Honeywave|IceCold|Kay|Kokkini|MilkyWay|Opal|PastelHills|"
    r"Patak|SafeLanding|Shell|Volna)/|rhythm"
)
# Mean difference of the channels below which a picture is grey.
GREYEST = 4.0


def group_of(key: str) -> str:
    """Return what all variants of one picture share: a wallpaper's folder, or the name without size and suffix."""
    if "/contents/" in key:
        return key.split("/contents/")[0].rsplit("/", 1)[-1]
    return re.split(r"_\d|-[dl]\.|_left|_right|\.", key.rsplit("/", 1)[-1])[0]


def crops(image: Image.Image, count: int, seed: int) -> Iterator[Image.Image]:
    """Yield square crops, their sides log-uniform from SMALLEST_SIDE to the short side."""
    random = np.random.default_rng(seed)
    short = min(image.size)
    for share, x, y in random.random((count, 3)):
        side = short * (SMALLEST_SIDE / short) ** share if short > SMALLEST_SIDE else short
        left, top = x * (image.width - side), y * (image.height - side)
        box = (left, top, left + side, top + side)
        yield image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def largest_of_each(inputs: list[ImageInput]) -> dict[str, ImageInput]:
    """Return one picture a group, the one with most pixels, without those that are grey."""
    found: dict[str, tuple[int, ImageInput]] = {}
    for item in inputs:
        try:
            image = decode_image(item.path).image
        except DecodeError as error:
            print(f"left out {item.key}: {error}")
            continue
        small = np.asarray(image.resize((64, 64)), dtype=np.float64)
        if (small.max(axis=2) - small.min(axis=2)).mean() < GREYEST:
            print(f"left out {item.key}: grey")
            continue
        pixels = image.width * image.height
        if pixels > found.get(group_of(item.key), (0, item))[0]:
            found[group_of(item.key)] = pixels, item
    return {group: item for group, (_, item) in sorted(found.items())}


def write_shards(out: Path, label: str, pictures: dict[str, ImageInput]) -> int:
    """Write the crops of all pictures in a mixed order; returns how many."""
    made: list[tuple[str, bytes, bytes]] = []
    for group, item in pictures.items():
        image = decode_image(item.path).image
        seed = zlib.crc32(group.encode())
        random = np.random.default_rng((seed, 1))
        for number, crop in enumerate(crops(image, CROPS_PER_PICTURE, seed)):
            buffer = io.BytesIO()
            crop.save(buffer, "PNG")
            captions = json.dumps({"width": SIZE, "height": SIZE, "regions": regions(np.asarray(crop), random)})
            made.append((f"{group}-{number:03d}", buffer.getvalue(), captions.encode()))
    order = np.random.default_rng(0).permutation(len(made))
    for shard, start in enumerate(range(0, len(made), CROPS_PER_SHARD)):
        with tarfile.open(out / f"{label}-{shard:04d}.tar", "w") as tar:
            for index in order[start : start + CROPS_PER_SHARD]:
                key, picture, captions = made[index]
                for name, content in ((f"{key}.png", picture), (f"{key}.json", captions)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return len(made)


def main() -> None:
    """Read the arguments and write the shards."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    pictures = largest_of_each([item for item in list_inputs(arguments.photos) if not LEFT_OUT.search("/" + item.key)])
    photographs = [group for group, item in pictures.items() if not PAINTED.search("/" + item.key)]
    held_out = set(photographs[HELD_OUT // 2 :: HELD_OUT])
    print(f"{len(pictures)} pictures; held out: {', '.join(sorted(held_out))}")
    for name, wanted in (("train", False), ("held-out", True)):
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {group: item for group, item in pictures.items() if (group in held_out) == wanted}
        print(f"{name}: {write_shards(folder, name, chosen)} crops of {len(chosen)} pictures")


if __name__ == "__main__":
    main()
