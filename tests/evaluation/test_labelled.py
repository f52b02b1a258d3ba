"""Labelled data sets: folders, scikit-learn's digits, torchvision's files, and how they are divided."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from dove_fast.data import ShortSideCenterCrop
from dove_fast.evaluation.labelled import draw, open_labelled, take_of_each


def save(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (grey, grey, grey)).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, grey in (("b/1.png", 10), ("b/deeper/2.png", 20), ("a/3.jpg", 30)):
        save(tmp_path / "animals" / name, grey)
    return tmp_path / "animals"


def test_a_folder_for_each_class(folder):
    found = open_labelled(folder)
    assert (found.name, found.classes, found.test) == ("animals", ("a", "b"), None)
    assert list(found.keys) == ["a/3.jpg", "b/1.png", "b/deeper/2.png"]
    assert found.labels.tolist() == [0, 1, 1] and len(found) == 3
    image = found.load(1, ShortSideCenterCrop(4))
    assert image.shape == (3, 4, 4) and image.dtype == np.uint8 and (image == 10).all()
    (folder / "a/3.jpg").write_text("no picture")
    assert found.load(0, ShortSideCenterCrop(4)) == "not an image in a known format, or damaged at its start"


def test_train_and_test(tmp_path):
    for part, name in (("train", "a/1"), ("train", "b/1"), ("train", "b/2"), ("test", "b/1"), ("test", "a/1")):
        save(tmp_path / part / f"{name}.png", 0)
    found = open_labelled(str(tmp_path))
    assert found.classes == ("a", "b")
    assert list(found.keys) == ["test/a/1.png", "test/b/1.png", "train/a/1.png", "train/b/1.png", "train/b/2.png"]
    assert found.labels.tolist() == [0, 1, 0, 1, 1]
    assert found.test.tolist() == [True, True, False, False, False]
    save(tmp_path / "test/c/1.png", 0)
    with pytest.raises(ValueError, match=r"class 'c' has images in test/ and none in train/"):
        open_labelled(tmp_path)


def test_folders_that_are_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"no labelled data set 'nowhere': give a folder .* cifar10:ROOT"):
        open_labelled("nowhere")
    with pytest.raises(ValueError, match=r"1\.png is not a folder"):
        open_labelled(folder / "b/1.png")
    with pytest.raises(ValueError, match=r"b: 1\.png lies in no class's folder; move it"):
        open_labelled(folder / "b")
    (folder / "b").rename(folder.parent / "b")
    with pytest.raises(ValueError, match="animals has one class, 'a': a classifier needs two"):
        open_labelled(folder)
    save(folder / "train/x/1.png", 0)
    with pytest.raises(ValueError, match=r"must hold train/ and test/ and nothing else, or a folder .*: a, train"):
        open_labelled(folder)


def test_digits():
    from sklearn.datasets import load_digits

    found = open_labelled("digits")
    assert (len(found), found.name, found.test, found.classes) == (1797, "digits", None, tuple("0123456789"))
    assert found.labels.tolist() == load_digits().target.tolist()
    # At its own size nothing is resized.
    image = found.load(5, ShortSideCenterCrop(8))
    expected = load_digits().images[5] * 255 / 16
    for channel in image:
        assert np.abs(channel - expected).max() <= 0.5


def test_a_path_comes_before_a_name(folder, tmp_path, monkeypatch):
    folder.rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(open_labelled("digits")) == 3


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"digits needs scikit-learn .*pip install 'dove-fast\[eval\]'"):
        open_labelled("digits")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"cifar10 needs a torchvision .*pip install 'dove-fast\[eval\]'"):
        open_labelled(f"cifar10:{tmp_path}")


def test_cifar_as_torchvision_reads_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    kind = datasets.CIFAR10
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    for name, rows in (("first", slice(0, 2)), ("second", slice(2, 4)), ("held", slice(4, 5))):
        content = {"data": pixels[rows].reshape(-1, 3072), "labels": [0, 1, 1, 0, 1][rows]}
        path = tmp_path / kind.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
    (tmp_path / kind.base_folder / "meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    # The published files have checksums; these are ours.
    monkeypatch.setattr(kind, "train_list", [["first", None], ["second", None]])
    monkeypatch.setattr(kind, "test_list", [["held", None]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    found = open_labelled(f"cifar10:{tmp_path}")
    assert (found.name, found.classes, found.labels.tolist()) == ("cifar10", ("cat", "dog"), [0, 1, 1, 0, 1])
    assert found.test.tolist() == [False] * 4 + [True]
    assert np.array_equal(found.load(3, ShortSideCenterCrop(32)), pixels[3])


def test_stl_has_its_channels_first(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    kind = datasets.STL10
    base = tmp_path / kind.base_folder
    base.mkdir()
    # Its files hold columns first.
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    pixels[:2].tofile(base / "train_X.bin")
    pixels[2:].tofile(base / "test_X.bin")
    np.array([2, 1], dtype=np.uint8).tofile(base / "train_y.bin")
    np.array([1], dtype=np.uint8).tofile(base / "test_y.bin")
    (base / "class_names.txt").write_text("airplane\nbird\n")
    for lists in ("train_list", "test_list"):
        part = lists.split("_")[0]
        monkeypatch.setattr(kind, lists, [[f"{part}_X.bin", None], [f"{part}_y.bin", None], ["class_names.txt", None]])
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    found = open_labelled(f"stl10:{tmp_path}")
    assert (found.classes, found.labels.tolist()) == (("airplane", "bird"), [1, 0, 0])
    assert found.test.tolist() == [False, False, True]
    assert np.array_equal(found.load(2, ShortSideCenterCrop(96)), pixels[2].transpose(0, 2, 1))


def test_what_torchvision_does_not_find(tmp_path):
    pytest.importorskip("torchvision.datasets")
    with pytest.raises(FileNotFoundError, match=r"no cifar100 in .*allow_download=True downloads it"):
        open_labelled(f"cifar100:{tmp_path}")
    with pytest.raises(ValueError, match="stl10 needs the folder that it lies in: stl10:ROOT"):
        open_labelled("stl10")


@pytest.mark.parametrize("images", [10, 100, 500])
def test_draw_keeps_the_classes_in_proportion(images):
    digits = open_labelled("digits")
    drawn = draw(digits, images, seed=3)
    assert len(drawn) == images and (np.diff(drawn) > 0).all()
    counts = np.bincount(digits.labels[drawn], minlength=10)
    expected = np.bincount(digits.labels) * images / len(digits)
    assert np.abs(counts - expected).max() <= 1
    assert np.array_equal(drawn, draw(digits, images, seed=3))
    assert not np.array_equal(drawn, draw(digits, images, seed=4))


def test_draw_keeps_the_parts_in_proportion(tmp_path):
    for part, count in (("train", 12), ("test", 6)):
        for index in range(count):
            save(tmp_path / part / "ab"[index % 2] / f"{index}.png", 0)
    found = open_labelled(tmp_path)
    drawn = draw(found, 6, seed=0)
    assert found.test[drawn].sum() == 2 and found.labels[drawn].sum() == 3
    assert draw(found, 18, seed=0).tolist() == draw(found, None, seed=0).tolist() == list(range(18))


def test_take_of_each():
    labels = np.repeat([0, 1, 2, 3], [1, 2, 10, 57])
    taken = take_of_each(labels, 0.2, seed=0)
    assert [int(taken[labels == label].sum()) for label in range(4)] == [0, 1, 2, 11]
    assert np.array_equal(taken, take_of_each(labels, 0.2, seed=0))
    assert not np.array_equal(taken, take_of_each(labels, 0.2, seed=1))
    # Everything but one, and a class that no image has.
    assert take_of_each(np.array([0, 0, 0, 2, 2]), 0.99, seed=0).sum() == 3
