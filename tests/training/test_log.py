"""What a run writes for people: lines that survive a stop, TensorBoard's files, and pictures to the pixel."""

from __future__ import annotations

import io
import json
import sys
import time

import numpy as np
import pytest
import torch
from kill_switch import contents
from PIL import Image

from dove_fast.training.log import RunLog, histogram_picture, picture_grid, read_log


def opened(output, step=0, tensorboard=False):
    return RunLog(output, step, tensorboard=tensorboard)


def test_lines_there_and_back(tmp_path):
    assert read_log(tmp_path) == []
    log = opened(tmp_path)
    log.write("train", 1, {"mse": 0.5, "threshold": None, "left_out": 3})
    log.write("validation", 1, {"mse": 1e-9, "warning": "all of them\nä"})
    expected = [
        {"kind": "train", "step": 1, "mse": 0.5, "threshold": None, "left_out": 3},
        {"kind": "validation", "step": 1, "mse": 1e-9, "warning": "all of them\nä"},
    ]
    # Every line is on its way before the next step.
    assert read_log(tmp_path) == expected
    log.close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == expected
    assert list(contents(tmp_path)) == ["log.jsonl"]


def test_a_torn_last_line_and_lines_of_later_steps(tmp_path):
    log = opened(tmp_path)
    for step in range(1, 6):
        log.write("train", step, {"mse": step / 10})
    log.close()
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(lines[4]) // 2, len(lines[4]) - 1):
        path.write_bytes(b"".join(lines[:4]) + lines[4][:cut])
        assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]
    again = opened(tmp_path, 3)
    assert path.read_bytes() == b"".join(lines[:3])
    again.write("train", 4, {"mse": 9.0})
    again.close()
    assert [(line["step"], line["mse"]) for line in read_log(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]


def test_a_run_that_starts_again_starts_an_empty_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind"')
    opened(tmp_path, 0).close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def scalars_of(output):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_has_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard")
    log = opened(tmp_path, tensorboard=True)
    for step in (1, 2, 3, 4):
        log.write("train", step, {"mse": step / 8, "threshold": None, "skipped": step, "warning": "words"})
    # A step without pixels has no error.
    log.write("train", 4, {"mse": float("nan"), "eos": float("inf")})
    log.write("validation", 4, {"psnr": 20.5})
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    log.picture("lengths", 4, pixels)
    log.close()
    events = scalars_of(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["train/mse", "train/skipped", "validation/psnr"]
    assert [(event.step, event.value) for event in events.Scalars("train/mse")] == [
        (step, step / 8) for step in (1, 2, 3, 4)
    ]
    assert [(event.step, event.value) for event in events.Scalars("validation/psnr")] == [(4, 20.5)]
    (image,) = events.Images("lengths")
    assert image.step == 4
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert np.array_equal(shown, pixels.permute(1, 2, 0).numpy())

    # A run that goes on at step 2 shows its own figures behind it. Files are read in the order of their seconds.
    time.sleep(1 - time.time() % 1)
    again = opened(tmp_path, 2, tensorboard=True)
    again.write("train", 3, {"mse": 7.0})
    again.close()
    shown = [(event.step, event.value) for event in scalars_of(tmp_path).Scalars("train/mse")]
    assert shown == [(1, 1 / 8), (2, 2 / 8), (3, 7.0)]


def test_no_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"\[report\] tensorboard = true needs .*pip install 'dove-fast\[train\]'"):
        opened(tmp_path, tensorboard=True)
    opened(tmp_path).close()
    assert not (tmp_path / "tensorboard").exists()


def test_pictures_are_files_to_the_pixel(tmp_path):
    log = opened(tmp_path)
    first, second = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    log.picture("reconstructions", 20, first)
    log.picture("reconstructions", 1_000_000_000, second)
    # Again, as a run does that goes on before it.
    log.picture("reconstructions", 20, second)
    log.close()
    names = ["reconstructions-000000020.png", "reconstructions-1000000000.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    for name in names:
        shown = np.asarray(Image.open(tmp_path / "pictures" / name))
        assert np.array_equal(shown, second.permute(1, 2, 0).numpy())


def test_a_grid_of_pictures_to_the_pixel():
    first = torch.tensor([0.0, 0.25, 0.4, 1.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2).clone()
    first[:, 2] = 0.6
    second = torch.full((1, 3, 2, 2), 1.5)
    third = torch.full((1, 3, 2, 2), -0.5)
    grid = picture_grid([torch.cat([first, second]), torch.cat([third, first])])
    # 0.25 of 255 is 63.75.
    white, black = 255, 0
    red = [
        [0, 64, white, white, 255, 255, white, white],
        [102, 255, white, white, 255, 255, white, white],
        [white] * 8,
        [white] * 8,
        [black, black, white, white, 0, 64, white, white],
        [black, black, white, white, 102, 255, white, white],
        [white] * 8,
        [white] * 8,
    ]
    assert grid.dtype == torch.uint8 and grid.shape == (3, 8, 8)
    assert grid[0].tolist() == grid[1].tolist() == red
    assert grid[2, :2, :2].tolist() == [[153, 153], [153, 153]]


@pytest.mark.parametrize(
    ("lengths", "most", "heights"),
    [
        ([1, 1, 3], 4, [120, 0, 60, 0]),
        # Rounded up, so that a single picture among many is seen.
        ([2] * 1000 + [4], 4, [0, 120, 0, 1]),
        ([3] * 7 + [1], 3, [18, 0, 120]),
        ([], 3, [0, 0, 0]),
        ([1], 1, [120]),
    ],
)
def test_a_histogram_to_the_pixel(lengths, most, heights):
    picture = histogram_picture(torch.tensor(lengths, dtype=torch.int64), most)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 120, 6 * most)
    for row in range(120):
        # A bar is five pixels wide, the sixth is a gap.
        expected = [64 if column % 6 < 5 and 120 - row <= heights[column // 6] else 255 for column in range(6 * most)]
        assert picture[0, row].tolist() == expected, row
    assert torch.equal(picture[1], picture[0]) and torch.equal(picture[2], picture[0])
