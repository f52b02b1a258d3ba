"""The main job: its store holds what the model gives for each picture, and a stopped job goes on to the same bytes."""

from __future__ import annotations

import copy
import errno
import json
import os
import warnings

import pytest
import torch
from kill_switch import KilledError, KillSwitch, contents
from made_pictures import add_bad
from PIL import Image
from small_models import VOCAB

from dove_fast import StoreError, TokenStore
from dove_fast.data import ShortSideCenterCrop, decode_image
from dove_fast.failures import JobError
from dove_fast.jobs import LoadedModel, TokenizeOptions, tokenize

OPTIONS = TokenizeOptions(batch_size=3, shard_size=4, workers=2)


def keys_of(photos):
    return sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))


def expected(photos, key, loaded, query=None, **options):
    decoded = decode_image(photos / key)
    pixels = torch.from_numpy(ShortSideCenterCrop(loaded.model.config.image_size)(decoded.image))
    tokens, stats = loaded.model.tokenize(pixels[None], [query], stats=True, **options)
    return tokens[0], stats.eos_probability[0].item(), decoded


def test_the_store_holds_what_the_model_gives(tmp_path, photos, loaded):
    report = tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    store = TokenStore(tmp_path / "s")
    assert [record.key for record in store] == keys_of(photos)
    assert len(set(store.lengths.tolist())) > 2
    for record in store:
        tokens, probability, decoded = expected(photos, record.key, loaded)
        assert record.length == tokens.shape[0]
        torch.testing.assert_close(record.tokens, tokens, rtol=1e-4, atol=1e-4)
        assert record.eos_probability == pytest.approx(probability, abs=1e-5)
        assert (record.width, record.height) == (decoded.width, decoded.height)
        assert record.source == (photos / record.key).as_posix()
    assert (report.inputs, report.records, report.errors, report.computed) == (10, 10, 0, 10)
    assert report.tokens == int(store.lengths.sum())
    settings = store.manifest["settings"]
    assert settings["fingerprint"] == loaded.fingerprint
    assert settings["transform"] == ShortSideCenterCrop(16).to_dict()
    assert settings["config"] == loaded.model.config.to_dict()
    assert settings["eos_threshold"] == loaded.model.config.eos_threshold


@pytest.mark.parametrize("options", [{"length": 3}, {"max_length": 2}, {"eos_threshold": 0.999}])
def test_length_options_reach_the_model(tmp_path, photos, loaded, options):
    tokenize(photos, tmp_path / "s", loaded, TokenizeOptions(**options))
    for record in TokenStore(tmp_path / "s"):
        assert record.length == expected(photos, record.key, loaded, **options)[0].shape[0]


def test_queries_go_to_their_pictures(tmp_path, photos, loaded):
    query = (3, 1, 4)
    key = keys_of(photos)[4]
    tokenize(photos, tmp_path / "s", loaded, TokenizeOptions(length=4), queries={key: query})
    for record in TokenStore(tmp_path / "s"):
        own = torch.tensor(query) if record.key == key else None
        tokens, _, _ = expected(photos, record.key, loaded, query=own, length=4)
        torch.testing.assert_close(record.tokens, tokens, rtol=1e-4, atol=1e-4)
    with pytest.raises(StoreError, match=r"queries_sha256: '\w+', now None"):
        tokenize(photos, tmp_path / "s", loaded, TokenizeOptions(length=4))


def test_queries_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, photos, loaded):
    with pytest.raises(ValueError, match=r"the queries name keys that are not among the inputs: 'nobody.jpg'"):
        tokenize(photos, tmp_path / "s", loaded, queries={"nobody.jpg": (1,)})
    with pytest.raises(ValueError, match=r"the query of '00.jpg' does not fit the model: .* ids from 0 to 31"):
        tokenize(photos, tmp_path / "s", loaded, queries={"00.jpg": (VOCAB,)})
    assert not (tmp_path / "s").exists()


def test_bad_inputs_are_set_aside_with_their_reason(tmp_path, photos, loaded):
    bad = add_bad(photos)
    report = tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    assert (report.inputs, report.records, report.errors) == (12, 10, 2)
    assert [record.key for record in TokenStore(tmp_path / "s")] == [key for key in keys_of(photos) if key not in bad]
    lines = [json.loads(line) for line in (tmp_path / "s/errors.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == bad
    assert "truncated" in lines[0]["reason"].lower()
    assert lines[1] == {
        "key": "deep/zz-text.png",
        "source": (photos / "deep/zz-text.png").as_posix(),
        "reason": "not an image in a known format, or damaged at its start",
    }


def test_one_picture_and_a_list(tmp_path, photos, loaded):
    tokenize(photos / "00.jpg", tmp_path / "one", loaded)
    assert [record.key for record in TokenStore(tmp_path / "one")] == ["00.jpg"]
    (tmp_path / "list.txt").write_text("photos/deep/03.jpg\nphotos/00.jpg\n")
    tokenize(tmp_path / "list.txt", tmp_path / "list", loaded)
    assert TokenStore(tmp_path / "list").keys == ["photos/deep/03.jpg", "photos/00.jpg"]


def test_a_complete_store_is_not_touched_again(tmp_path, photos, loaded):
    tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    before = contents(tmp_path / "s")
    with pytest.MonkeyPatch.context() as patch:
        KillSwitch(at=1).arm(patch)
        report = tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    assert (report.already_complete, report.computed, report.records) == (True, 0, 10)
    assert contents(tmp_path / "s") == before


def test_other_settings_and_other_inputs_are_refused(tmp_path, photos, loaded):
    tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    with pytest.raises(StoreError, match=r"made with other settings \(shard_size: 4, now 1024; units: 3, now 1\)"):
        tokenize(photos, tmp_path / "s", loaded)
    other = LoadedModel(loaded.model, "sha256:other")
    with pytest.raises(StoreError, match=r"another checkpoint \(fingerprint sha256:.*, now sha256:other"):
        tokenize(photos, tmp_path / "s", other, OPTIONS)
    Image.new("RGB", (5, 5)).save(photos / "new.png")
    with pytest.raises(StoreError, match=r"was made from other inputs \(10, now 11\); choose another output"):
        tokenize(photos, tmp_path / "s", loaded, OPTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_stored_as_they_are(tmp_path, photos, loaded, dtype):
    narrow = LoadedModel(copy.deepcopy(loaded.model).to(dtype), loaded.fingerprint)
    tokenize(photos / "00.jpg", tmp_path / "s", narrow)
    assert TokenStore(tmp_path / "s")[0].tokens.dtype == dtype


def test_wide_weights_are_refused(tmp_path, photos, loaded):
    wide = LoadedModel(copy.deepcopy(loaded.model).double(), loaded.fingerprint)
    with pytest.raises(
        ValueError, match=r"tokens are stored as float32, bfloat16, float16, the model is torch\.float64"
    ):
        tokenize(photos, tmp_path / "s", wide)


def test_a_job_killed_now_and_then_gives_the_same_bytes(tmp_path, photos, loaded):
    add_bad(photos)
    tokenize(photos, tmp_path / "whole", loaded, OPTIONS)
    kills = 0
    for at in (3, 9, 15, 16, 17, 18, 19):
        with pytest.MonkeyPatch.context() as patch:
            KillSwitch(at, after=bool(at % 2)).arm(patch)
            try:
                tokenize(photos, tmp_path / "s", loaded, OPTIONS)
            except KilledError:
                kills += 1
    tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    assert kills >= 4
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_going_on_computes_the_missing_units_alone(tmp_path, photos, loaded):
    seen = []

    class Stop(BaseException):
        pass

    def stop_in_the_third_unit(progress):
        if progress.done > 9:
            raise Stop

    with pytest.raises(Stop):
        tokenize(photos, tmp_path / "s", loaded, OPTIONS, on_progress=stop_in_the_third_unit)
    report = tokenize(photos, tmp_path / "s", loaded, OPTIONS, on_progress=seen.append)
    assert (report.computed, report.records) == (2, 10)
    assert (seen[0].done, seen[-1].done, seen[-1].total, seen[-1].images) == (8, 10, 10, 2)


def test_errors_of_finished_units_are_listed_when_a_job_stops(tmp_path, photos, loaded):
    (photos / "0-bad.jpg").write_text("no picture")

    def stop(progress):
        if progress.done > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(photos, tmp_path / "s", loaded, OPTIONS, on_progress=stop)
    assert json.loads((tmp_path / "s/errors.jsonl").read_text())["key"] == "0-bad.jpg"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_stops_the_job_in_one_sentence(tmp_path, photos, loaded, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(JobError, match=f"^{os.strerror(code)}; run the same command again to go on$"):
        tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    monkeypatch.undo()
    assert tokenize(photos, tmp_path / "s", loaded, OPTIONS).records == 10


def test_memory_that_does_not_suffice_says_what_helps(tmp_path, photos, loaded, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..")

    monkeypatch.setattr(type(loaded.model), "encode", fail)
    with pytest.raises(JobError, match="out of memory; a smaller batch needs less; run the same command again"):
        tokenize(photos, tmp_path / "s", loaded, OPTIONS)


def test_pillows_warnings_stay_silent_and_filters_are_restored(tmp_path, photos, loaded, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    assert not caught
    assert list(warnings.filters) == filters


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"max_errors": -1}, "max_errors must be at least 0, got -1"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be from 0 to 1 \(world_size - 1\), got 2"),
        ({"token_dtype": "int4"}, "token_dtype must be one of float32, bfloat16, float16, int8, got 'int4'"),
    ],
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        TokenizeOptions(**options)
