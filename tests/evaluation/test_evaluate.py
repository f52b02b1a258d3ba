"""A whole evaluation, from pictures of every kind of source to the figures."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import lpips
import pytest
import torch
from made_evaluations import made_evaluation
from made_pictures import add_bad, make_pictures
from made_shards import pictures, write_parquet, write_shards, write_tar
from small_models import micro_model
from small_tokenizer import write_tokenizer

from dove_fast import CheckpointError
from dove_fast.data import ShortSideCenterCrop, load_image
from dove_fast.evaluation import EvaluateOptions, QualityMeter, evaluate
from dove_fast.evaluation.context import warnings_of
from dove_fast.evaluation.results import ADAPTIVE, FIXED, VQGAN_ALONE, Measure, ProbeRow
from dove_fast.failures import JobError
from dove_fast.jobs import LoadedModel
from dove_fast.text import TextTokenizer


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = micro_model()
    return LoadedModel(model, model.fingerprint())


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_pictures(tmp_path / "photos")


def measure_of(evaluation, name: str):
    return next(measure for measure in evaluation.context.measures if measure.name == name)


def test_the_images_are_those_of_tokenize(loaded, photos):
    found = evaluate(loaded, "micro", photos, EvaluateOptions(batch_size=4)).evaluation
    meter = QualityMeter(loaded.model, lengths=(2, 4, 6, 8, 10, 12, 14, 16))
    transform = ShortSideCenterCrop(16)
    meter.add(torch.stack([torch.from_numpy(load_image(str(path), transform).pixels) for path in pictures(photos)]))
    assert [row.kind for row in found.rows] == [VQGAN_ALONE, *[FIXED] * 8, ADAPTIVE]
    for row, expected in zip(found.rows, meter.rows(), strict=True):
        assert row.name == expected.name and row.psnr.mean == pytest.approx(expected.psnr.mean, rel=1e-5)
    assert found.lengths == meter.lengths()
    context = found.context
    assert (context.images, context.set_aside, context.image_size) == (10, 0, 16)
    assert context.fingerprint == loaded.fingerprint and context.data == str(photos) and context.checkpoint == "micro"
    assert context.transform == transform.name and context.dtype == "float32" and context.device == "cpu"
    assert context.threads == torch.get_num_threads() and context.seconds > 0 and context.batch_size == 4


@pytest.mark.parametrize("kind", ["list", "shards", "parquet"])
def test_every_kind_of_source_gives_the_same_figures(loaded, photos, tmp_path, kind):
    if kind == "list":
        data = tmp_path / "paths.txt"
        data.write_text("".join(f"{path}\n" for path in pictures(photos)))
    elif kind == "shards":
        write_shards(tmp_path / "shards", photos)
        data = tmp_path / "shards"
    else:
        data = write_parquet(tmp_path / "images.parquet", photos)
    options = EvaluateOptions(lengths=(4,))
    expected, found = (evaluate(loaded, "m", place, options).evaluation for place in (photos, data))
    assert found.rows == expected.rows and found.codebooks == expected.codebooks and found.grounding is None


def test_what_cannot_be_read_is_set_aside(loaded, photos):
    bad = add_bad(photos)
    outcome = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,)))
    assert [error.key for error in outcome.errors] == bad and all(error.reason for error in outcome.errors)
    assert outcome.evaluation.context.images == 10 and outcome.evaluation.context.set_aside == 2
    evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,), max_errors=2))
    with pytest.raises(JobError, match=r"more than 1 input could not be read \(--max-errors\), the last one"):
        evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,), max_errors=1))


def test_nothing_that_can_be_read(loaded, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="no image could be read, the last one for: "):
        evaluate(loaded, "m", tmp_path / "photos")


@pytest.mark.parametrize("images", [1, 3, 4, 10, 99])
def test_the_first_images(loaded, photos, images):
    seen = []
    options = EvaluateOptions(images=images, lengths=(4,), batch_size=4)
    found = evaluate(loaded, "m", photos, options, on_stage=lambda *state: seen.append(state)).evaluation
    assert {stage for stage, _ in seen} == {"images"}
    seen = [state for _, state in seen]
    assert found.context.images == min(images, 10) == sum(found.lengths.histogram)
    assert [state.done for state in seen] == [*range(4, min(images, 10), 4), min(images, 10)]
    assert {state.total for state in seen} == {min(images, 10)} and seen[-1].images == seen[-1].done
    assert seen[-1].tokens == round(found.lengths.mean * min(images, 10))


def test_measures_without_weights_are_left_out_and_named(loaded, photos):
    found = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,))).evaluation
    assert all(row.lpips is None and row.rfid is None for row in found.rows)
    for name in ("LPIPS", "rFID"):
        assert "weights" in measure_of(found, name).left_out and measure_of(found, name).images is None
    assert measure_of(found, "PSNR").left_out is None and "11 x 11" in measure_of(found, "SSIM").parameters


def test_lpips_from_a_file(loaded, photos, tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net
    # Only what fits a test: 16 pixels are enough for vgg.
    state = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    options = EvaluateOptions(lengths=(4,), lpips_weights=str(tmp_path / "vgg.pth"))
    found = evaluate(loaded, "m", photos, options).evaluation
    assert all(row.lpips is not None and row.lpips.mean > 0 for row in found.rows)
    assert measure_of(found, "LPIPS").sha256 == hashlib.sha256((tmp_path / "vgg.pth").read_bytes()).hexdigest()


def test_rfid_of_few_images_comes_with_a_warning(loaded, photos, monkeypatch):
    class Features:
        dimension = 6
        published = True

        def __call__(self, images):
            return torch.cat([images.float().mean(dim=(2, 3)), images.float().std(dim=(2, 3))], dim=1)

    # The package has a function of the module's name.
    module = sys.modules["dove_fast.evaluation.evaluate"]
    monkeypatch.setattr(module, "load_inception", lambda *_, **__: (Features(), Measure("rFID", "of a test")))
    few = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,), images=6)).evaluation
    assert all(row.rfid is not None for row in few.rows)
    assert any("rFID of 6 images, not more than the 6 features" in line for line in few.context.warnings)
    more = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,), images=7)).evaluation
    assert not any("rFID" in line for line in more.context.warnings)
    monkeypatch.setattr(Features, "published", False)
    other = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,), images=7)).evaluation
    assert any("not the published file, whose SHA-256 begins with 6726825d" in line for line in other.context.warnings)


def test_a_vqgan_to_compare_with(loaded, photos, tmp_path):
    micro_model(seed=5).save_pretrained(tmp_path / "vqgan")
    own = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,))).evaluation
    found = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,), vqgan=str(tmp_path / "vqgan"))).evaluation
    assert found.context.vqgan == str(tmp_path / "vqgan") and own.context.vqgan is None
    assert found.rows[0] != own.rows[0] and found.rows[1:] == own.rows[1:]
    assert found.context.vqgan_fingerprint == micro_model(seed=5).fingerprint()
    assert own.context.vqgan_fingerprint is None


@pytest.mark.parametrize(("margin", "own", "warned"), [(0.6, True, True), (0.4, True, False), (9.0, False, False)])
def test_tokens_better_than_the_vqgan_alone(margin, own, warned):
    alone, fixed = made_evaluation().rows[:2]
    fixed = replace(fixed, psnr=replace(fixed.psnr, mean=alone.psnr.mean + margin))
    found = warnings_of(9, None, [alone, fixed], own_vqgan=own)
    assert any("--vqgan" in line for line in found) == warned


@pytest.fixture
def reader(tmp_path) -> LoadedModel:
    """A model that reads texts."""
    model = micro_model()
    model.tokenizer = TextTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    return LoadedModel(model, model.fingerprint())


def region_shard(path: Path, photos: Path, entries: list[dict]) -> Path:
    members = []
    for index, (photo, entry) in enumerate(zip(pictures(photos), entries, strict=False)):
        members += [(f"{index}{photo.suffix}", photo.read_bytes()), (f"{index}.json", json.dumps(entry).encode())]
    return write_tar(path, members)


def test_texts_are_measured_where_there_are_any(loaded, reader, photos, tmp_path):
    entry = {"width": 1, "height": 1, "text": "a red cat", "boxes": [[0.4, 0.4, 0.6, 0.6]]}
    path = region_shard(tmp_path / "s.tar", photos, [entry] * 6)
    found = evaluate(reader, "m", path, EvaluateOptions(lengths=(4,))).evaluation
    assert found.grounding.samples == 6 and len(found.grounding.rows) == 4
    assert any(measure.name == "grounding" for measure in found.context.measures)
    assert evaluate(reader, "m", path, EvaluateOptions(lengths=(4,), images=2)).evaluation.grounding.samples == 2
    assert evaluate(loaded, "m", path, EvaluateOptions(lengths=(4,))).evaluation.grounding is None


@pytest.mark.parametrize("named", ["pattern", "range", "list"])
def test_texts_of_shards_however_they_are_named(reader, photos, tmp_path, named):
    entry = {"width": 1, "height": 1, "text": "a red cat", "boxes": [[0.4, 0.4, 0.6, 0.6]]}
    for number in range(2):
        region_shard(tmp_path / f"s{number}.tar", photos, [entry] * (3 + number))
    (tmp_path / "list.txt").write_text("s0.tar\ns1.tar\n")
    data = tmp_path / {"pattern": "s*.tar", "range": "s{0..1}.tar", "list": "list.txt"}[named]
    stages = []
    found = evaluate(
        reader, "m", data, EvaluateOptions(lengths=(4,), batch_size=4), on_stage=lambda *state: stages.append(state)
    ).evaluation
    assert found.grounding.samples == 7 and found.context.warnings == ()
    texts = [(state.done, state.total) for stage, state in stages if stage == "texts"]
    assert texts == [(4, 7), (7, 7)]
    measure = measure_of(found, "grounding")
    assert measure.images == 7 and measure_of(found, "PSNR").images == 7


def test_texts_of_a_pipe(reader, photos, tmp_path):
    path = region_shard(tmp_path / "s.tar", photos, [{"text": "a cat", "boxes": [[1, 1, 9, 9]]}] * 3)
    found = evaluate(reader, "m", f"pipe:cat {path}", EvaluateOptions(lengths=(4,))).evaluation
    assert found.grounding is None
    assert any("not from pipes and URLs" in line for line in found.context.warnings)


def test_texts_that_fail_leave_the_rest(reader, photos, tmp_path, monkeypatch):
    entry = {"width": 1, "height": 1, "text": "a red cat", "boxes": [[0.4, 0.4, 0.6, 0.6]]}
    path = region_shard(tmp_path / "s.tar", photos, [entry] * 3)

    def fail(*_):
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr("dove_fast.evaluation.grounding.GroundingMeter.add", fail)
    found = evaluate(reader, "m", path, EvaluateOptions(lengths=(4,))).evaluation
    assert found.grounding is None and len(found.rows) == 3 and found.context.images == 3
    assert any("it failed after 0 of them: [Errno 5] the disk fails" in line for line in found.context.warnings)


def test_a_tokenizer_that_cannot_be_used_is_found_first(reader, photos, tmp_path, monkeypatch):
    path = region_shard(tmp_path / "s.tar", photos, [{"text": "a cat", "boxes": [[1, 1, 9, 9]]}])
    (tmp_path / "bad.json").write_text("{}")
    reader.model.tokenizer = TextTokenizer(tmp_path / "bad.json")
    monkeypatch.setattr(QualityMeter, "add", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(CheckpointError, match="no file of the tokenizers library"):
        evaluate(reader, "m", path, EvaluateOptions(lengths=(4,)))


def test_one_image_has_no_rfid(loaded, photos, monkeypatch):
    class Features:
        dimension = 3
        published = True

        def __call__(self, images):
            return images.float().mean(dim=(2, 3))

    module = sys.modules["dove_fast.evaluation.evaluate"]
    monkeypatch.setattr(module, "load_inception", lambda *_, **__: (Features(), Measure("rFID", "of a test")))
    found = evaluate(loaded, "m", photos, EvaluateOptions(lengths=(4,), images=1)).evaluation
    assert all(row.rfid is None for row in found.rows)
    assert "needs two images" in measure_of(found, "rFID").left_out


def test_texts_that_cannot_be_used_are_named(reader, photos, tmp_path):
    path = region_shard(tmp_path / "s.tar", photos, [{"text": "a cat"}] * 3)
    found = evaluate(reader, "m", path, EvaluateOptions(lengths=(4,))).evaluation
    assert found.grounding is None
    assert any("texts were not measured, none could be used" in line for line in found.context.warnings)
    assert evaluate(reader, "m", photos, EvaluateOptions(lengths=(4,))).evaluation.context.warnings == ()


def test_probes(loaded, photos, tmp_path, monkeypatch):
    made, asked = ProbeRow("set", "pooled tokens", 0.5, 8, 2, 32), []

    def probe(model, dataset, *, on_set_aside, **options):
        asked.append((dataset, options["images"], options["eos_threshold"]))
        on_set_aside("broken.png", "truncated")
        return [made]

    monkeypatch.setattr("dove_fast.evaluation.probing.probe", probe)
    for label in ("a", "b"):
        make_pictures(tmp_path / "labelled" / label, 3)
    data = str(tmp_path / "labelled")
    options = EvaluateOptions(lengths=(4,), probes=(data, "digits"), probe_images=7, eos_threshold=0.4)
    outcome = evaluate(loaded, "m", photos, options)
    assert outcome.evaluation.probes == (made, made) and asked == [(data, 7, 0.4), ("digits", 7, 0.4)]
    assert any(measure.name == "linear probe" for measure in outcome.evaluation.context.measures)
    assert [error.key for error in outcome.errors] == ["broken.png"] * 2
    assert outcome.evaluation.context.set_aside == 2
    # One budget for all.
    with pytest.raises(JobError, match="more than 1 input could not be read"):
        evaluate(loaded, "m", photos, replace(options, max_errors=1))
    with pytest.raises(FileNotFoundError, match="no labelled data set 'nowhere'"):
        evaluate(loaded, "m", photos, EvaluateOptions(probes=("nowhere",)))
    assert len(asked) == 4, "refused before anything is computed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_errors": -1}, "max_errors must be at least 0, got -1"),
        ({"probe_images": 1}, "probe_images must be at least 2, got 1"),
        ({"lpips_net": "resnet"}, "lpips_net must be one of vgg, alex, squeeze, got 'resnet'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateOptions(**options)


def test_what_is_refused_before_the_work(loaded, photos, tmp_path):
    with pytest.raises(ValueError, match="from 1 to this model's 16, got 40"):
        evaluate(loaded, "m", photos, EvaluateOptions(lengths=(40,)))
    with pytest.raises(ValueError, match="at least one token count"):
        evaluate(loaded, "m", photos, EvaluateOptions(lengths=()))
    with pytest.raises(ValueError, match="eos_threshold"):
        evaluate(loaded, "m", photos, EvaluateOptions(eos_threshold=1.5))
    with pytest.raises(FileNotFoundError, match="no such input"):
        evaluate(loaded, "m", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file of Inception weights"):
        evaluate(loaded, "m", photos, EvaluateOptions(inception_weights=str(tmp_path / "nowhere")))
