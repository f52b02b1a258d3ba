"""Linear probes: the features against their definitions, the accuracies against scikit-learn, and refusals."""

from __future__ import annotations

import errno
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import IMAGE_SIZE, NUM_TOKENS, micro_model, sample_images

from dove_fast.data import ShortSideCenterCrop
from dove_fast.evaluation import probing
from dove_fast.evaluation.labelled import LabelledSet, take_of_each
from dove_fast.evaluation.logistic import StandardRows
from dove_fast.evaluation.probe_features import ProbeFeatures, fixed_lengths
from dove_fast.evaluation.probing import LARGEST_CLASS, PENALTIES, probe, probe_measure
from dove_fast.failures import JobError

IMAGES, WIDTH, CHANNELS = 40, 32, 4
KINDS = {
    LARGEST_CLASS: 0,
    "pooled tokens, adaptive": WIDTH,
    "pooled tokens, 2": WIDTH,
    "pooled tokens, 8": WIDTH,
    "pooled tokens, 16": WIDTH,
    "padded tokens": NUM_TOKENS * WIDTH,
    "VQGAN features, pooled": CHANNELS,
    "VQGAN features, flattened": NUM_TOKENS * CHANNELS,
    "pixels": 3 * IMAGE_SIZE**2,
}


@pytest.fixture(scope="module")
def model():
    return micro_model()


def labelled(images=IMAGES, *, classes=3, test=None, noise=60):
    """Return images of noise around a colour for each class, the third class larger than the others."""
    random = np.random.default_rng(0)
    labels = np.minimum(np.arange(images) % (classes + 1), classes - 1)
    colours = random.integers(60, 200, (classes, 3))
    around = random.integers(-noise, noise + 1, (images, IMAGE_SIZE, IMAGE_SIZE, 3))
    pixels = np.clip(colours[labels][:, None, None] + around, 0, 255).astype(np.uint8)
    names = tuple(f"colour {index}" for index in range(classes))
    return LabelledSet("colours", names, labels.astype(np.int64), test, [f"c/{i}" for i in range(images)], pixels)


def pixels_of(dataset):
    return np.stack([dataset.load(index, ShortSideCenterCrop(IMAGE_SIZE)) for index in range(len(dataset))])


def straight_features(model, images):
    """Each image alone, by the engine that `tokenize` takes, as the docstring of `probe` has it."""
    rows = {name: [] for name in KINDS if name != LARGEST_CLASS}
    for image in images:
        image = torch.from_numpy(image)[None]
        own, every = model.tokenize(image)[0], model.tokenize(image, length=NUM_TOKENS)[0]
        features = model.encode(image)[0].detach()
        rows["pooled tokens, adaptive"].append(own.mean(dim=0))
        for length in (2, 8, 16):
            rows[f"pooled tokens, {length}"].append(every[:length].mean(dim=0))
        rows["padded tokens"].append(torch.cat([own, torch.zeros(NUM_TOKENS - len(own), WIDTH)]).flatten())
        rows["VQGAN features, pooled"].append(features.mean(dim=0))
        rows["VQGAN features, flattened"].append(features.flatten())
        rows["pixels"].append(image.flatten().float())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def test_features(model, tmp_path):
    images = (sample_images(IMAGES) * 255).round().to(torch.uint8).numpy()
    features = ProbeFeatures(tmp_path, model, IMAGES)
    tokens = features.add(images[:5]) + features.add(images[5:])
    expected = straight_features(model, images)
    lengths = [len(model.tokenize(torch.from_numpy(image)[None])[0]) for image in images]
    assert len(set(lengths)) > 2 and tokens == sum(lengths)
    found = dict(features.finished())
    assert list(found) == list(expected)
    for name, rows in found.items():
        assert rows.shape == tuple(expected[name].shape) == (IMAGES, KINDS[name])
        some = np.array([0, 4, 5, 39])
        assert torch.allclose(rows.read(some), expected[name][some], rtol=1e-4, atol=1e-4), name


def test_shorter_lengths_are_beginnings(model):
    """What lets one pass over T steps stand for all fixed lengths."""
    image = sample_images(1)
    every = model.tokenize(image, length=NUM_TOKENS)[0]
    for length in (2, 8):
        assert torch.allclose(model.tokenize(image, length=length)[0], every[:length], atol=1e-4)


def test_a_threshold_that_is_given_decides_the_lengths(model, tmp_path):
    images = (sample_images(4) * 255).to(torch.uint8).numpy()
    assert ProbeFeatures(tmp_path, model, 4, eos_threshold=1e-9).add(images) == 4


def test_fixed_lengths(model):
    assert fixed_lengths(model.config) == [2, 8, 16]


def test_accuracies_are_those_of_scikit_learn(model):
    from sklearn.linear_model import LogisticRegression

    dataset = labelled()
    rows = probe(model, dataset, batch_size=7)
    assert {row.features: row.dimension for row in rows} == KINDS
    test = take_of_each(dataset.labels, 0.2, seed=0)
    assert {(row.dataset, row.train_images, row.test_images) for row in rows} == {
        ("colours", (~test).sum(), test.sum())
    }
    assert rows[0].accuracy == pytest.approx((dataset.labels[test] == 2).mean())
    features = straight_features(model, pixels_of(dataset))
    held_out = take_of_each(dataset.labels[~test], 0.2, seed=0)
    for row in rows[1:]:
        # The standardised rows are ours, which test_logistic.py compares.
        matrix = Matrix(features[row.features])
        train = StandardRows(matrix, np.flatnonzero(~test), torch.device("cpu"))
        x, y = torch.cat([block for _, block in train]).double().numpy(), dataset.labels[~test]
        tested = torch.cat([block for _, block in StandardRows(matrix, np.flatnonzero(test), train.device, like=train)])

        def classifier(penalty, images):
            return LogisticRegression(C=1 / (penalty * images), tol=1e-7, max_iter=10000)

        scores = [
            classifier(penalty, (~held_out).sum()).fit(x[~held_out], y[~held_out]).score(x[held_out], y[held_out])
            for penalty in PENALTIES
        ]
        best = classifier(PENALTIES[int(np.argmax(scores))], len(y)).fit(x, y)
        assert row.accuracy == pytest.approx(best.score(tested.numpy(), dataset.labels[test])), row.features


class Matrix:
    def __init__(self, values):
        self.values, self.shape = values, tuple(values.shape)

    def read(self, rows):
        return self.values[torch.from_numpy(rows)]


def test_the_same_seed_gives_the_same_rows(model):
    dataset = labelled(noise=120)
    first = probe(model, dataset, seed=1, images=30)
    assert first == probe(model, dataset, seed=1, images=30)
    assert first != probe(model, dataset, seed=2, images=30)
    assert (first[0].train_images, first[0].test_images) == (24, 6)


def test_labels_by_chance_are_not_read(model, monkeypatch):
    """The test's images do not help to train: with labels by chance accuracy is near chance."""
    # Weak ones take long on labels that nothing explains.
    monkeypatch.setattr(probing, "PENALTIES", (1e-2, 1e-4))
    dataset = labelled(120, classes=2, noise=60)
    chance = np.random.default_rng(5).integers(0, 2, 120)
    rows = probe(model, LabelledSet("chance", ("a", "b"), chance, None, dataset.keys, dataset.contents))
    assert max(row.accuracy for row in rows) < 0.8
    # With the labels that they have, the colours are read.
    assert probe(model, dataset, images=60)[-1].accuracy > 0.9


def test_the_publishers_split_is_kept(model):
    dataset = labelled(test=np.arange(IMAGES) >= 30)
    rows = probe(model, dataset)
    assert {(row.train_images, row.test_images) for row in rows} == {(30, 10)}
    assert rows[0].accuracy == pytest.approx((dataset.labels[30:] == 2).mean())


def test_progress_rows_and_what_cannot_be_read(model, tmp_path, caplog):
    dataset = labelled()
    for index, pixels in enumerate(dataset.contents):
        path = tmp_path / dataset.classes[dataset.labels[index]] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    bad = tmp_path / "colour 1/99.png"
    bad.write_text("no picture")
    states, rows, set_aside = [], [], []
    found = probe(
        model,
        tmp_path,
        batch_size=16,
        on_progress=states.append,
        on_row=rows.append,
        on_set_aside=lambda key, reason: set_aside.append((key, reason)),
    )
    assert rows == found
    assert found[0].train_images + found[0].test_images == IMAGES
    assert set_aside == [("colour 1/99.png", "not an image in a known format, or damaged at its start")]
    assert [(state.done, state.total, state.images, state.errors) for state in states] == [
        (16, 41, 16, 0), (32, 41, 31, 1), (41, 41, 40, 1),
    ]  # fmt: skip
    assert states[-1].tokens == sum(model.tokenize(torch.from_numpy(pixels_of(dataset))).host_lengths)
    with caplog.at_level(logging.WARNING):
        probe(model, tmp_path)
    assert "1 of 41 images cannot be read and were set aside, the first colour 1/99.png: not an image" in caplog.text


def test_refusals(model, tmp_path, monkeypatch):
    single = labelled(5, classes=4)
    with pytest.raises(ValueError, match=r"class 'colour 0' needs two images at least, got 1 of the 5 images"):
        probe(model, single)
    nothing = labelled(test=np.zeros(IMAGES, dtype=bool))
    with pytest.raises(ValueError, match="none of the 40 images is to be tested on"):
        probe(model, nothing)
    everything = labelled(test=np.ones(IMAGES, dtype=bool))
    with pytest.raises(ValueError, match="class 'colour 0' needs an image to train on"):
        probe(model, everything)
    pairs = labelled(4, classes=2)
    pairs = LabelledSet("pairs", pairs.classes, np.array([0, 0, 1, 1]), None, pairs.keys, pairs.contents)
    with pytest.raises(ValueError, match="no class has two images to train on, one of which chooses the penalty"):
        probe(model, pairs)
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"images": 1}, "images must be at least 2"),
        ({"eos_threshold": 2.0}, "eos_threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            probe(model, labelled(), **options)
    space = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: space)
    with pytest.raises(ValueError, match=r"the features of 40 images may take 0\.0 GiB, .*; take at most 0 images, or"):
        probe(model, labelled())


def test_features_that_are_not_finite(tmp_path):
    model = micro_model()
    model.generator.final_layer_norm.weight.data[0] = float("nan")
    with pytest.raises(JobError, match=r"features are not finite in torch\.float32"):
        probe(model, labelled())


def test_nothing_is_left_behind(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    probe(model, labelled(), images=20)
    with pytest.raises(RuntimeError, match="enough"):
        probe(model, labelled(), on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_with_one_sentence(model, monkeypatch):
    """A job's failure, and no wrong use: in the reading as in the fits."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("ProbeFeatures.add", "_accuracy"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dove_fast.evaluation.probing.{name}", full)
            with pytest.raises(JobError, match="No space left on device; run the same command again; TMPDIR names"):
                probe(model, labelled(), images=20)


def test_classifiers_are_counted(model):
    seen = []
    rows = probe(model, labelled(), images=20, on_fit=lambda *state: seen.append(state))
    # The guess is not fitted.
    assert seen == [(number, len(rows) - 1) for number in range(1, len(rows))]


def stop(_):
    raise RuntimeError("enough")


def test_a_search_that_is_cut_short_is_reported(model, monkeypatch, caplog):
    monkeypatch.setattr("dove_fast.evaluation.logistic.MAX_ITERATIONS", 1)
    with caplog.at_level(logging.WARNING):
        probe(model, labelled())
    assert "the classifier of pixels was stopped before its optimum" in caplog.text


def test_the_measure_says_how():
    text = probe_measure(7).parameters
    assert "seed 7" in text and "0.01" in text and "20%" in text
