"""Offline tokenization: the whole job against the bare stream and against the script that one would write.

    pytest benchmarks/bench_offline.py --benchmark-only --benchmark-json=figures.json

The pictures are crops of the sample photographs, 256x256 pixels, JPEG of quality 90; the model is the shipped one, on
the device of --device. The bare stream is `TokenStream` over the same images in memory, already decoded; so the ratio
is the share of its rate that is left when images are read, decoded and transformed, and tokens, records and checksums
written and synced. Unlike there, the decoding processes compete with the model for the cores of a CPU. Tokens
are compared before anything is timed.

The script decodes a batch with Pillow, calls `DOVE.tokenize`, and saves each image's tokens with `numpy.save`: no
records, no checks, no resuming. Decoders are compared by decoding alone. Memory is the peak of a process of its own.
All sides run in processes that keep freed memory, as the command does; the script also as it comes.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from offline_sides import SHARD, bare, job, script, shipped
from PIL import Image
from processes import Remote

from dove_fast import TokenStore
from dove_fast.jobs import TokenizeOptions, tokenize

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
SIDE, QUALITY = 256, 90
# Enough that the start of the processes does not count.
IMAGES = 4096
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


@pytest.mark.parametrize("kind", ["folder", "webdataset", "reduced"])
def bench_job(compare, device, pictures, tmp_path, batch, kind) -> None:
    """The job against the bare stream: how much of its rate is left."""
    source = pictures
    if kind == "webdataset":
        source = tmp_path / "shards"
        write_shards(source, pictures, SHARD)
    size, where = max(batch, BATCH), str(device)
    with (
        Remote(functools.partial(job, reduced=kind == "reduced"), source, tmp_path / "store", where, size) as ours,
        Remote(bare, pictures, where, size) as theirs,
    ):
        ours()
        theirs()
        store = TokenStore(tmp_path / "store")
        if kind != "reduced":
            for record, tokens in zip(store, theirs.report(), strict=True):
                assert torch.equal(record.tokens.float(), torch.from_numpy(tokens))
        compare(
            ours,
            theirs,
            rival_name="bare stream",
            images=len(store),
            memory=False,
            batch_size=size,
            mean_tokens=float(store.lengths.mean()),
        )


@pytest.mark.parametrize("keep", [False, True], ids=["as-it-comes", "keeps-memory"])
def bench_script(compare, device, pictures, tmp_path, batch, keep) -> None:
    """The job against the script that one would write, as it comes and with freed memory kept."""
    size, where = max(batch, BATCH), str(device)
    with (
        Remote(job, pictures, tmp_path / "store", where, size) as ours,
        Remote(functools.partial(script, keep=keep), pictures, tmp_path / "script", where, size) as theirs,
    ):
        ours()
        theirs()
        store = TokenStore(tmp_path / "store")
        folder, others = theirs.report(), 0
        for record in store:
            expected = torch.from_numpy(np.load(folder / f"{Path(record.key).stem}.npy"))
            if expected.shape == record.tokens.shape:
                torch.testing.assert_close(record.tokens.float(), expected, rtol=1e-3, atol=1e-3)
            else:
                others += 1
        # One whose EOS is within rounding of the threshold may have another length.
        assert others <= len(store) // 100
        compare(ours, theirs, rival_name="obvious script", images=len(store), memory=False, batch_size=size)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("pixels", [SIDE, 2 * SIDE])
def bench_stages(benchmark, device, tmp_path, batch, request, pixels, reduced) -> None:
    """What each stage takes of an image, and how many bytes go in and out: what docs/OFFLINE.md reckons with."""
    count = 64 if request.config.getoption("--quick") else STAGE_IMAGES
    pictures = tmp_path / "pictures"
    write_pictures(pictures, count, pixels)
    size = max(batch, BATCH)
    alone = functools.partial(job, reduced=reduced, workers=0)
    with Remote(alone, pictures, tmp_path / "store", str(device), size) as measured:
        measured()
        benchmark.pedantic(measured, rounds=1)
        seconds, stages = measured.report()
    # In one process the stages follow each other, so that they come to the whole.
    assert 0.9 * seconds < sum(stages.values()) <= seconds
    tokens = TokenStore(tmp_path / "store")
    benchmark.extra_info.update(
        stage_ms={stage: 1e3 * taken / count for stage, taken in stages.items()},
        images=count,
        mean_tokens=float(tokens.lengths.mean()),
        jpeg_bytes=sum(file.stat().st_size for file in pictures.iterdir()) / count,
        store_bytes=sum(file.stat().st_size for file in (tmp_path / "store").rglob("*") if file.is_file()) / count,
        batch_size=size,
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
    """Run one job as the command does, and print its process's peak memory in bytes."""
    tokenize(source, output, shipped("cpu"), TokenizeOptions(prefix_keys=True))
    # Not getrusage's, which begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(json.dumps(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
