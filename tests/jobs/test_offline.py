"""Jobs over shards: what comes out is what the plain pictures give, whatever they came in and whoever did it."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from kill_switch import contents
from made_pictures import add_bad
from made_shards import pictures, write_parquet, write_shards

from dove_fast import StoreError, TokenStore
from dove_fast.atomic import is_temporary
from dove_fast.data import ShortSideCenterCrop, decode_image
from dove_fast.failures import JobError
from dove_fast.jobs import LoadedModel, TokenizeOptions, tokenize
from dove_fast.jobs.repair import repair
from dove_fast.jobs.tokenize import TokenizeJob
from dove_fast.store import writer

OPTIONS = TokenizeOptions(batch_size=3, shard_size=4, workers=0)


def pixels(path, model):
    return torch.from_numpy(ShortSideCenterCrop(model.config.image_size)(decode_image(path).image))


def same_tokens(store, plain):
    assert len(store) == len(plain)
    for one, other in zip(store, plain, strict=True):
        assert one.length == other.length
        torch.testing.assert_close(one.tokens, other.tokens, rtol=1e-4, atol=1e-4)
        assert (one.width, one.height) == (other.width, other.height)


@pytest.fixture
def plain(tmp_path, photos, loaded):
    tokenize(photos, tmp_path / "plain", loaded, OPTIONS)
    return TokenStore(tmp_path / "plain")


def test_webdataset_shards(tmp_path, photos, loaded, plain):
    shards = write_shards(tmp_path / "shards", photos)
    report = tokenize(tmp_path / "shards/train-{000..002}.tar", tmp_path / "s", loaded, OPTIONS)
    store = TokenStore(tmp_path / "s")
    same_tokens(store, plain)
    assert (report.inputs, report.units, report.complete) == (10, len(shards), True)
    assert store.keys == [f"{number:04d}" for number in range(10)]
    assert store[7].extra == {"txt": "picture 7", "json": {"label": 1}}
    assert store[7].source == str(shards[1])
    for source in (tmp_path / "shards", tmp_path / "shards/*.tar"):
        assert tokenize(source, tmp_path / "s", loaded, OPTIONS).already_complete


def test_pipes_and_urls_are_shards_too(tmp_path, photos, loaded, plain):
    import fsspec

    shards = write_shards(tmp_path / "shards", photos)
    memory = fsspec.filesystem("memory")
    for shard in shards:
        memory.pipe(f"/{shard.name}", shard.read_bytes())
    for name, source in (
        ("pipe", f"pipe:cat {tmp_path}/shards/train-{{000..002}}.tar"),
        ("url", "memory://train-{000..002}.tar"),
    ):
        tokenize(source, tmp_path / name, loaded, OPTIONS)
        same_tokens(TokenStore(tmp_path / name), plain)


def test_parquet(tmp_path, photos, loaded, plain):
    table = write_parquet(
        tmp_path / "images.parquet", photos, columns={"label": list(range(10)), "caption": [f"c{i}" for i in range(10)]}
    )
    report = tokenize(table, tmp_path / "s", loaded, OPTIONS)
    store = TokenStore(tmp_path / "s")
    same_tokens(store, plain)
    assert (report.units, store.keys[3]) == (3, "images/3")
    assert store[3].extra == {"label": 3, "caption": "c3"}
    tokenize(table, tmp_path / "keyed", loaded, replace(OPTIONS, key_column="caption"))
    assert TokenStore(tmp_path / "keyed").keys == [f"c{i}" for i in range(10)]


def test_codes_are_the_nearest_codewords(tmp_path, photos, loaded):
    tokenize(photos, tmp_path / "s", loaded, replace(OPTIONS, codes=True))
    model = loaded.model
    codebook = model.vqgan.quantize.embedding.weight
    for record, path in zip(TokenStore(tmp_path / "s"), pictures(photos), strict=True):
        features = model.encode(pixels(path, model)[None])[0].double()
        distances = torch.cdist(features, codebook.double())
        chosen = distances.gather(1, record.codes[:, None])[:, 0]
        # By distance: two codewords may be as near but for rounding.
        torch.testing.assert_close(chosen, distances.min(dim=1).values, rtol=1e-5, atol=1e-6)
        assert len(set(record.codes.tolist())) > 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_tokens_are_kept_as_asked(tmp_path, photos, loaded, plain, dtype):
    report = tokenize(photos, tmp_path / "s", loaded, replace(OPTIONS, token_dtype=dtype))
    store = TokenStore(tmp_path / "s")
    assert store.lengths.tolist() == plain.lengths.tolist()
    for one, other in zip(store, plain, strict=True):
        torch.testing.assert_close(one.tokens.float(), other.tokens, rtol=0.02, atol=0.03)
    assert (report.quantization_error is not None) == (dtype == "int8")


def test_keys_that_come_again_in_another_shard_stop_the_job_early(tmp_path, photos, loaded):
    write_shards(tmp_path / "shards", photos, restart=True)
    with pytest.raises(StoreError, match=r"key '0000' of unit 1 came before, .* --prefix-keys for WebDataset"):
        tokenize(tmp_path / "shards", tmp_path / "s", loaded, OPTIONS)
    # Also in the run that goes on.
    with pytest.raises(StoreError, match="key '0000' of unit 1 came before"):
        tokenize(tmp_path / "shards", tmp_path / "s", loaded, OPTIONS)
    tokenize(tmp_path / "shards", tmp_path / "p", loaded, replace(OPTIONS, prefix_keys=True))
    assert TokenStore(tmp_path / "p").keys[3:5] == ["train-000/0003", "train-001/0000"]


def test_keys_that_come_again_are_found_by_the_last_of_several_jobs(tmp_path, photos, loaded):
    write_shards(tmp_path / "shards", photos, size=5, restart=True)
    tokenize(tmp_path / "shards", tmp_path / "s", loaded, replace(OPTIONS, rank=1, world_size=2))
    with pytest.raises(StoreError, match="came before"):
        tokenize(tmp_path / "shards", tmp_path / "s", loaded, replace(OPTIONS, rank=0, world_size=2))
    with pytest.raises(StoreError, match="not complete"):
        TokenStore(tmp_path / "s")


JOINING = replace(OPTIONS, join=True)


def test_a_job_that_runs_twice_does_not_take_its_own_keys_for_repeated_ones(tmp_path, photos, loaded):
    write_shards(tmp_path / "shards", photos)
    job = TokenizeJob(tmp_path / "shards", tmp_path / "s", loaded, JOINING)
    for unit in range(3):
        job.run([unit])
    job.conclude()
    job.close()
    assert job.report().complete


SECOND = """
import sys
from dove_fast.jobs import TokenizeOptions, load_model
from dove_fast.jobs.tokenize import TokenizeJob
from dove_fast.store import writer

shards, store, model = sys.argv[1:]
options = TokenizeOptions(batch_size=3, workers=0, join=True)
TokenizeJob(shards, store, load_model(model, device="cpu"), options).run([1])
"""


def test_jobs_that_join_find_a_key_that_each_has_once(tmp_path, photos, loaded):
    write_shards(tmp_path / "shards", photos, size=5, restart=True)
    loaded.model.save_pretrained(tmp_path / "model")
    job = TokenizeJob(tmp_path / "shards", tmp_path / "s", loaded, JOINING)
    job.begin()
    subprocess.run([sys.executable, "-c", SECOND, tmp_path / "shards", tmp_path / "s", tmp_path / "model"], check=True)
    with pytest.raises(StoreError, match="came before, and a store's keys must be unique"):
        job.run()
    job.close()


def test_what_a_killed_job_left_beside_others_is_gone_at_the_end(tmp_path, photos, loaded):
    job = TokenizeJob(photos, tmp_path / "s", loaded, JOINING)
    job.begin()
    (tmp_path / "s/tokens/.dove-0123456789abcdef.tmp").write_bytes(b"begun")
    job.run()
    job.close()
    assert not [path for path in (tmp_path / "s").rglob("*") if is_temporary(path.name)]


def test_damaged_shards_cost_what_is_damaged(tmp_path, photos, loaded):
    shards = write_shards(tmp_path / "shards", photos)
    shards[1].write_bytes(shards[1].read_bytes()[:6000])
    report = tokenize(tmp_path / "shards", tmp_path / "s", loaded, OPTIONS)
    assert report.complete
    assert 6 <= report.records < 10
    lines = [json.loads(line) for line in (tmp_path / "s/errors.jsonl").read_text().splitlines()]
    assert lines[-1]["key"] == "train-001"
    assert "the shard is damaged, not complete or no tar archive" in lines[-1]["reason"]
    assert {record.key for record in TokenStore(tmp_path / "s")} >= {"0000", "0003", "0008", "0009"}


def test_a_medium_that_fails_stops_the_job_and_it_goes_on(tmp_path, photos, loaded):
    write_shards(tmp_path / "shards", photos)
    command = f"pipe:test -e {tmp_path}/ready && cat {tmp_path}/shards/train-000.tar"
    with pytest.raises(JobError, match=r"run the same command again to go on"):
        tokenize(command, tmp_path / "s", loaded, OPTIONS)
    (tmp_path / "ready").touch()
    assert tokenize(command, tmp_path / "s", loaded, OPTIONS).records == 4


def test_too_many_errors_stop_the_job(tmp_path, photos, loaded):
    bad = add_bad(photos)
    with pytest.raises(JobError, match=rf"more than 1 input set aside \(--max-errors\), the last one '{bad[1]}'"):
        tokenize(photos, tmp_path / "s", loaded, replace(OPTIONS, max_errors=1))
    listed = [json.loads(line)["key"] for line in (tmp_path / "s/errors.jsonl").read_text().splitlines()]
    assert listed == bad
    report = tokenize(photos, tmp_path / "s", loaded, replace(OPTIONS, max_errors=2))
    assert (report.errors, report.complete) == (2, True)


def test_a_file_that_vanishes_is_set_aside(tmp_path, photos, loaded):
    def remove(progress):
        (photos / "deep/09.jpg").unlink(missing_ok=True)

    report = tokenize(photos, tmp_path / "s", loaded, OPTIONS, on_progress=remove)
    assert (report.records, report.errors) == (9, 1)
    assert json.loads((tmp_path / "s/errors.jsonl").read_text()) == {
        "key": "deep/09.jpg",
        "source": str(photos / "deep/09.jpg"),
        "reason": "the file does not exist",
    }


def test_ranks_share_the_units_and_the_bytes_are_the_same(tmp_path, photos, loaded, plain):
    reports = [
        tokenize(photos, tmp_path / "s", loaded, replace(OPTIONS, rank=rank, world_size=3)) for rank in (2, 0, 1)
    ]
    assert [report.computed for report in reports] == [2, 4, 4]
    assert [report.complete for report in reports] == [False, False, True]
    assert [report.missing for report in reports] == [2, 1, 0]
    assert contents(tmp_path / "s") == contents(tmp_path / "plain")


def test_a_second_job_in_one_process_is_refused(tmp_path, photos, loaded):
    begun, go_on = threading.Event(), threading.Event()

    def wait(progress):
        begun.set()
        assert go_on.wait(60)

    first = threading.Thread(
        target=tokenize, args=(photos, tmp_path / "s", loaded, OPTIONS), kwargs={"on_progress": wait}
    )
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(StoreError, match="is being written by another job"):
            tokenize(photos, tmp_path / "s", loaded, OPTIONS)
    finally:
        go_on.set()
        first.join()
    assert TokenStore(tmp_path / "s").keys
    assert tokenize(photos, tmp_path / "s", loaded, OPTIONS).already_complete


def test_decoding_in_processes_gives_the_same_bytes(tmp_path, photos, loaded, plain):
    tokenize(photos, tmp_path / "s", loaded, replace(OPTIONS, workers=2))
    assert contents(tmp_path / "s") == contents(tmp_path / "plain")


def test_a_folder_that_cannot_be_written(tmp_path, photos, loaded, monkeypatch):
    # Root may write anywhere, so the refusal is made.
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(JobError, match=r"^Permission denied: .*/s; run the same command again to go on$"):
        tokenize(photos, tmp_path / "s", loaded, OPTIONS)


def test_every_image_is_seen_with_its_length(tmp_path, photos, loaded):
    seen = {}
    tokenize(
        photos, tmp_path / "s", loaded, OPTIONS, on_image=lambda key, length, image: seen.update({key: (length, image)})
    )
    store = TokenStore(tmp_path / "s")
    assert {key: length for key, (length, _) in seen.items()} == dict(zip(store.keys, store.lengths, strict=True))
    assert torch.equal(seen["00.jpg"][1], pixels(photos / "00.jpg", loaded.model))


def test_progress_adds_up(tmp_path, photos, loaded):
    add_bad(photos)
    seen = []
    report = tokenize(photos, tmp_path / "s", loaded, OPTIONS, on_progress=seen.append)
    last = seen[-1]
    assert (last.done, last.total, last.images, last.tokens, last.errors) == (12, 12, 10, report.tokens, 2)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert last.stage_seconds["encode"] > 0
    assert sum(seconds for stage, seconds in last.stage_seconds.items() if stage != "decode") < last.elapsed
    assert set(report.stages) == {"decode", "wait", "encode", "generate", "write"}


def test_what_was_set_aside_is_tried_again_once_it_is_mended(tmp_path, photos, loaded):
    whole = (photos / "deep/05.png").read_bytes()
    store = tmp_path / "s"
    tokenize(photos, tmp_path / "expected", loaded, OPTIONS)
    (photos / "deep/05.png").write_bytes(whole[:50])
    assert tokenize(photos, store, loaded, OPTIONS).errors == 1
    before = contents(store)
    retry = replace(OPTIONS, retry_errors=True)
    # Still broken: the same again.
    assert tokenize(photos, store, loaded, retry).computed == 3
    assert contents(store) == before
    (photos / "deep/05.png").write_bytes(whole)
    assert tokenize(photos, store, loaded, OPTIONS).already_complete
    report = tokenize(photos, store, loaded, retry)
    assert (report.computed, report.errors, report.records, report.kept) == (4, 0, 10, ())
    assert contents(store) == contents(tmp_path / "expected")
    assert tokenize(photos, store, loaded, retry).already_complete
    with pytest.raises(ValueError, match="needs the store to itself"):
        replace(retry, join=True)


def test_done_again_a_unit_loses_nothing(tmp_path, photos, loaded):
    store = tmp_path / "s"
    tokenize(photos, store, loaded, OPTIONS)
    before = contents(store)
    for path in sorted(photos.rglob("*.*"))[:2]:
        path.write_bytes(b"")
    report = repair(store, [0, 1, 2], loaded)
    assert report.errors == 2
    assert sorted(report.kept) and set(report.kept) < {0, 1, 2}
    for unit in report.kept:
        for name in (f"records/{unit:05d}.parquet", f"tokens/{unit:05d}.safetensors"):
            assert (store / "replaced" / name).read_bytes() == before[name]


@pytest.mark.parametrize("pattern", ["{}/train-{{000..002}}.tar", "{}/*.tar", "pipe:cat {}/train-{{000..002}}.tar"])
def test_repair_reads_what_the_store_was_made_from(tmp_path, photos, loaded, pattern):
    write_shards(tmp_path / "shards", photos)
    tokenize(pattern.format(tmp_path / "shards"), tmp_path / "s", loaded, OPTIONS)
    before = contents(tmp_path / "s")
    assert repair(tmp_path / "s", [1], loaded).computed == 4
    assert contents(tmp_path / "s") == before


def test_repair_names_sources_as_they_were_given(tmp_path, photos, loaded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenize(photos.name, "s", loaded, OPTIONS)
    before = contents(tmp_path / "s")
    assert repair("s", [1], loaded).computed == 4
    assert contents(tmp_path / "s") == before
    # From elsewhere the same images, by their whole paths.
    monkeypatch.chdir("/")
    assert repair(tmp_path / "s", [1], loaded).computed == 4
    tokens = {name: data for name, data in contents(tmp_path / "s").items() if name.startswith("tokens/")}
    assert tokens.items() <= before.items()


def test_a_folder_whose_name_is_no_text(tmp_path, photos, loaded):
    odd = os.fsdecode(bytes(tmp_path) + b"/p\xff")
    os.rename(photos, odd)
    tokenize(odd, tmp_path / "s", loaded, OPTIONS)
    assert TokenStore(tmp_path / "s").manifest["environments"][0]["source"] == odd
    assert repair(tmp_path / "s", [0], loaded).computed == 4


def test_tokens_that_a_dtype_does_not_hold_stop_the_job(tmp_path, photos, loaded, monkeypatch):
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        model.generator.final_layer_norm.weight.mul_(1e6)
    large = LoadedModel(model, model.fingerprint())
    with pytest.raises(JobError, match=r"tokens of '00\.jpg' are not finite in float16; .* another --token-dtype"):
        tokenize(photos, tmp_path / "s", large, replace(OPTIONS, token_dtype="float16"))
    assert tokenize(photos, tmp_path / "t", large, OPTIONS).complete


def test_a_unit_alone_costs_no_look_at_the_others(tmp_path, photos, loaded, monkeypatch):
    looks = []
    plain = writer.read_unit
    monkeypatch.setattr(writer, "read_unit", lambda path: looks.append(path.name) or plain(path))
    job = TokenizeJob(photos, tmp_path / "s", loaded, replace(OPTIONS, shard_size=1))
    job.begin()
    looks.clear()
    job.run([7])
    assert set(looks) == {"00007.parquet"}
    assert job.is_done(7) and not job.is_done(6)
    job.conclude()
    assert job.missing == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    job.close()


def test_decoding_counts_also_while_the_model_computes(tmp_path, photos, loaded):
    class Busy:
        workers, seconds = 2, 0.0

    work, busy = TokenizeJob(photos, tmp_path / "s", loaded, OPTIONS)._work, Busy()
    chunks = iter("ab")
    for _ in chunks:
        work._next(chunks, busy)
        busy.seconds += 1.5
    work._next(chunks, busy)
    assert work.clock.seconds["decode"] == busy.seconds == 1.5
