"""Offline tokenization: the whole job against the bare stream and against the script that one would write.

    pytest benchmarks/bench_offline.py --benchmark-only --benchmark-json=figures.json

The pictures are crops of the sample photographs, 256x256 pixels, JPEG of quality 90; the model is the shipped one, on
the device of --device. The bare stream is `TokenStream` over the same images in memory, already decoded; so the ratio
is the share of its rate that is left when images are read, decoded and transformed, and tokens, records and checksums
written and synced. Unlike there, the decoding processes compete with the model for the cores of a CPU. Tokens
are compared before anything is timed.

The script decodes a batch with Pillow, calls `DOVE.tokenize`, and saves each image's tokens with `numpy.save`: no
records, no checks, no resuming. Decoders are compared by decoding alone. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import io
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dove_fast import TokenStore
from dove_fast.data import ShortSideCenterCrop, decode_image, list_inputs
from dove_fast.generation import LengthHistogram, TokenStream
from dove_fast.jobs import LoadedModel, TokenizeOptions, load_model, tokenize
from dove_fast.jobs.progress import Progress

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
SIDE, QUALITY = 256, 90
# Images, and how many of them are a unit: the command's default. Enough that the start of the processes does not count.
IMAGES, SHARD = 4096, 1024
# Of the job that is taken apart, in one process: each stage alone has the cores then.
STAGE_IMAGES = 512
BATCH = 32
MEMORY_IMAGES = (1000, 20000)


def write_pictures(folder: Path, count: int, pixels: int = SIDE) -> None:
    """Write `count` crops of the photographs, at many scales, each `pixels` wide and high."""
    random = np.random.default_rng(0)
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    folder.mkdir()
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(random.integers(SIDE // 2, min(photo.size)))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.resize((pixels, pixels), box=(left, top, left + side, top + side))
        crop.save(folder / f"{index:06d}.jpg", quality=QUALITY)


def write_shards(folder: Path, pictures: Path, size: int) -> None:
    """Put the pictures into WebDataset shards."""
    folder.mkdir()
    files = sorted(pictures.iterdir())
    for first in range(0, len(files), size):
        with tarfile.open(folder / f"{first // size:05d}.tar", "w") as archive:
            for file in files[first : first + size]:
                archive.add(file, file.name)


@pytest.fixture(scope="module")
def pictures(request, tmp_path_factory) -> Path:
    """The folder of pictures."""
    folder = tmp_path_factory.mktemp("offline") / "pictures"
    write_pictures(folder, 64 if request.config.getoption("--quick") else IMAGES)
    return folder


@pytest.fixture(scope="module")
def loaded(device) -> LoadedModel:
    """The shipped model, in bf16 on a GPU."""
    return load_model(device=device, dtype="bfloat16" if device.type == "cuda" else None)


def decoded(folder: Path) -> list[torch.Tensor]:
    """Return the pictures as the model takes them."""
    transform = ShortSideCenterCrop(64)
    return [torch.from_numpy(transform(decode_image(item.path).image)) for item in list_inputs(folder)]


def bare(model, images: list[torch.Tensor], batch_size: int) -> list[torch.Tensor]:
    """Tokenize images in memory, unit by unit as the job does."""
    tokens = []
    for first in range(0, len(images), SHARD):
        stream = TokenStream(
            model,
            images[first : first + SHARD],
            batch_size=batch_size,
            histogram=LengthHistogram(model.config.num_tokens),
        )
        tokens += [item.tokens for item in stream]
    return tokens


def job(source: Path, store: Path, loaded: LoadedModel, options: TokenizeOptions) -> None:
    """Run the job from nothing."""
    shutil.rmtree(store, ignore_errors=True)
    tokenize(source, store, loaded, options)


@pytest.mark.parametrize("kind", ["folder", "webdataset", "reduced"])
def bench_job(compare, loaded, pictures, tmp_path, batch, request, kind) -> None:
    """The job against the bare stream: how much of its rate is left."""
    source = pictures
    if kind == "webdataset":
        source = tmp_path / "shards"
        write_shards(source, pictures, SHARD)
    images = decoded(pictures)
    size = max(batch, BATCH)
    options = TokenizeOptions(batch_size=size, shard_size=SHARD, reduced=kind == "reduced")
    job(source, tmp_path / "store", loaded, options)
    store = TokenStore(tmp_path / "store")
    if kind != "reduced":
        for record, tokens in zip(store, bare(loaded.model, images, size), strict=True):
            assert torch.equal(record.tokens, tokens.cpu())
    compare(
        lambda: job(source, tmp_path / "store", loaded, options),
        lambda: bare(loaded.model, images, size),
        rival_name="bare stream",
        images=len(images),
        memory=False,
        batch_size=size,
        mean_tokens=float(store.lengths.mean()),
    )


def bench_script(compare, loaded, pictures, tmp_path, batch) -> None:
    """The job against the script that one would write."""
    size = max(batch, BATCH)
    model = loaded.model
    transform = ShortSideCenterCrop(model.config.image_size)
    files = sorted(pictures.iterdir())
    options = TokenizeOptions(batch_size=size, shard_size=SHARD)

    def script() -> None:
        output = tmp_path / "script"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        for first in range(0, len(files), size):
            some = files[first : first + size]
            batch = torch.from_numpy(np.stack([transform(Image.open(file).convert("RGB")) for file in some]))
            for file, tokens in zip(some, model.tokenize(batch.to(model.device)), strict=True):
                np.save(output / f"{file.stem}.npy", tokens.float().cpu().numpy())

    script()
    job(pictures, tmp_path / "store", loaded, options)
    for record in TokenStore(tmp_path / "store"):
        theirs = torch.from_numpy(np.load(tmp_path / "script" / f"{Path(record.key).stem}.npy"))
        # One whose EOS is within rounding of the threshold may have another length.
        if theirs.shape == record.tokens.shape:
            torch.testing.assert_close(record.tokens.float(), theirs, rtol=1e-3, atol=1e-3)
    compare(
        lambda: job(pictures, tmp_path / "store", loaded, options),
        script,
        rival_name="obvious script",
        images=len(files),
        memory=False,
        batch_size=size,
    )


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("pixels", [SIDE, 2 * SIDE])
def bench_stages(benchmark, loaded, tmp_path, batch, request, pixels, reduced) -> None:
    """What each stage takes of an image, and how many bytes go in and out: what docs/OFFLINE.md reckons with."""
    count = 64 if request.config.getoption("--quick") else STAGE_IMAGES
    pictures = tmp_path / "pictures"
    write_pictures(pictures, count, pixels)
    options = TokenizeOptions(batch_size=max(batch, BATCH), shard_size=SHARD, reduced=reduced, workers=0)
    job(pictures, tmp_path / "store", loaded, options)
    last: list[Progress] = []
    seconds = []

    def measure() -> None:
        shutil.rmtree(tmp_path / "store")
        report = tokenize(pictures, tmp_path / "store", loaded, options, on_progress=last.append)
        seconds.append(report.seconds)

    benchmark.pedantic(measure, rounds=1)
    stages = {stage: 1e3 * taken / count for stage, taken in last[-1].stage_seconds.items()}
    # In one process the stages follow each other, so that they come to the whole.
    assert 0.9 * seconds[0] < sum(last[-1].stage_seconds.values()) <= seconds[0]
    tokens = TokenStore(tmp_path / "store")
    benchmark.extra_info.update(
        stage_ms=stages,
        images=count,
        mean_tokens=float(tokens.lengths.mean()),
        jpeg_bytes=sum(file.stat().st_size for file in pictures.iterdir()) / count,
        store_bytes=sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file()) / count,
        batch_size=options.batch_size,
    )
    print(f"{pixels} pixels{', reduced' if reduced else ''}, ms an image:", {k: round(v, 3) for k, v in stages.items()})


@pytest.mark.parametrize("rival", ["simplejpeg", "turbojpeg", "torchcodec"])
def bench_decoders(compare, pictures, rival) -> None:
    """Pillow, which the job uses, against other decoders: JPEG to RGB, nothing else."""
    contents = [file.read_bytes() for file in itertools.islice(sorted(pictures.iterdir()), 64)]

    def pillow() -> list[np.ndarray]:
        return [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]

    if rival == "simplejpeg":
        simplejpeg = pytest.importorskip("simplejpeg")

        def theirs() -> list[np.ndarray]:
            return [simplejpeg.decode_jpeg(content) for content in contents]
    elif rival == "turbojpeg":
        turbojpeg = pytest.importorskip("turbojpeg")
        try:
            turbo = turbojpeg.TurboJPEG()
        except RuntimeError as error:
            pytest.skip(f"no libturbojpeg: {error}")

        def theirs() -> list[np.ndarray]:
            return [turbo.decode(content, pixel_format=turbojpeg.TJPF_RGB) for content in contents]
    else:
        decoders = pytest.importorskip("torchcodec.decoders")
        if not hasattr(decoders, "decode_jpeg"):
            pytest.skip("this torchcodec decodes no single images")

        def theirs() -> list[np.ndarray]:
            return [decoders.decode_jpeg(content).numpy() for content in contents]

    for ours, other in zip(pillow(), theirs(), strict=True):
        # Decoders may differ by a step of the colour conversion.
        assert np.abs(ours.astype(int) - other).max() <= 4
    compare(pillow, theirs, rival_name=rival, images=len(contents), memory=False)


@pytest.mark.large
def bench_memory(benchmark, pictures, tmp_path) -> None:
    """Peak memory of the command at 1,000 and at 20,000 images."""
    names = sorted(pictures.iterdir())[:1000]
    first = tmp_path / "first.tar"
    with tarfile.open(first, "w") as archive:
        for file in names:
            archive.add(file, file.name)
    peaks = {}

    def measure() -> None:
        for count in MEMORY_IMAGES:
            shards = tmp_path / f"shards-{count}"
            shards.mkdir()
            for number in range(count // len(names)):
                (shards / f"{number:05d}.tar").hardlink_to(first)
            command = [sys.executable, __file__, str(shards), str(tmp_path / f"store-{count}")]
            peaks[count] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    benchmark.pedantic(measure, rounds=1)
    small, large = (peaks[count] for count in MEMORY_IMAGES)
    benchmark.extra_info.update(peak_bytes=peaks, ratio=large / small)
    print(f"peak memory at {MEMORY_IMAGES} images: {small / 2**20:.0f} and {large / 2**20:.0f} MiB")
    assert large < 1.1 * small


def main(source: str, output: str) -> None:
    """Run one job, and print its process's peak memory in bytes."""
    tokenize(source, output, load_model(), TokenizeOptions(prefix_keys=True))
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


if __name__ == "__main__":
    main(*sys.argv[1:])
