"""Recorded blocks and blocks that are launched ahead give the oracle's tokens; a stand-in records on the CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_models import NUM_TOKENS, micro_config, micro_model, sample_images
from tolerances import assert_close

from dove_fast import DOVE
from dove_fast.generation import CostModel, LengthHistogram, TokenStream
from dove_fast.generation.batch import Batch
from dove_fast.generation.graphs import RECORDERS, Graphs, bucket, spare_places
from dove_fast.generation.schedule import launch_ahead


def record_on_the_cpu(function, given, pool):
    """As a CUDA graph does: reads its inputs where they lay, and writes its one result over the last one."""
    assert pool == "pool"
    result = function(*given)

    def replay():
        return result.copy_(function(*given))

    return replay


@pytest.fixture
def recording(monkeypatch):
    """Let work be recorded on the CPU."""
    monkeypatch.setitem(RECORDERS, "cpu", (record_on_the_cpu, lambda: "pool"))


@pytest.fixture
def model():
    model = micro_model().double()
    model.generation.cuda_graphs = True
    return model


def graphs_of(model):
    """Return the graphs of the kept cache."""
    _, cache = model.generation._pool._kept
    return cache.graphs._kept[1]


def assert_is_the_oracle(model, images, queries=None, **options):
    expected = model.tokenize(images, queries, engine="oracle", **options)
    tokens = model.tokenize(images, queries, **options)
    assert tokens.host_lengths == expected.host_lengths
    assert_close(tokens.values, expected.values)


@pytest.mark.parametrize("options", [{}, {"length": 6}, {"max_length": 5}, {"eos_threshold": 0.8}])
def test_recorded_blocks_are_the_oracle(recording, model, options):
    model.generation.learning = False
    model.generation.cost = CostModel(3.0, 1.0, 0.0)
    for seed in range(6):
        for batch in (11, 3):
            assert_is_the_oracle(model, sample_images(batch, seed).double(), **options)
    graphs = graphs_of(model)
    assert graphs.recorded > 0 and graphs.replayed > 2 * graphs.recorded
    # The encoder's: one for each of the two batch sizes.
    encoder = model.generation._encoder_graphs._kept[1]
    assert encoder.recorded == 2 and encoder.replayed == 10


def test_queries_of_mixed_lengths(recording, model):
    for seed in range(4):
        queries = [torch.arange(row % 5) if row % 2 else None for row in range(9)]
        assert_is_the_oracle(model, sample_images(9, seed).double(), queries)
    assert graphs_of(model).replayed > 0


def test_a_stream(recording, model):
    images = sample_images(40).double()
    expected = model.tokenize(images, engine="oracle")
    for _ in range(2):
        items = list(TokenStream(model, images, batch_size=4, places=6, block_size=2))
        assert [len(item.tokens) for item in items] == list(expected.host_lengths)
        for item in items:
            assert_close(item.tokens, expected[item.index])
    assert graphs_of(model).replayed > 20


def test_changed_weights_are_recorded_again(recording, model):
    images = sample_images(4).double()
    for _ in range(3):
        assert_is_the_oracle(model, images)
    model.load_state_dict(micro_model(3).double().state_dict())
    for _ in range(3):
        assert_is_the_oracle(model, images)
    assert graphs_of(model).replayed > 0
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.generation.cuda_graphs
        assert_is_the_oracle(again, images)


@pytest.mark.parametrize(("rows", "computed"), [(9, 10), (17, 20), (33, 40)])
def test_rows_that_fill_a_bucket_touch_nothing(recording, model, rows, computed):
    """Nine rows are computed as ten, and the tenth writes to a place of its own."""
    assert bucket(rows) == computed
    images = sample_images(rows).double()
    _, stats = model.tokenize(images, block_size=NUM_TOKENS, stats=True)
    assert stats.positions_computed == rows * model.config.num_features + computed * NUM_TOKENS
    for _ in range(3):
        assert_is_the_oracle(model, images, block_size=4)


def test_recorded_in_inference_mode_and_used_outside(recording, model):
    images = sample_images(5).double()
    with torch.inference_mode():
        for _ in range(3):
            assert_is_the_oracle(model, images)
    assert_is_the_oracle(model, images)


def test_the_same_bits_from_replays(recording, model):
    """An image alone is recorded alone, and a replay gives what the call before it gave."""
    images = sample_images(3).double()
    first = model.tokenize(images, deterministic=True).values
    for _ in range(3):
        assert torch.equal(model.tokenize(images, deterministic=True).values, first)
    assert torch.equal(
        model.tokenize(images[1:2], deterministic=True)[0], model.tokenize(images, deterministic=True)[1]
    )


def test_what_a_recording_reads_is_part_of_its_key(recording, model):
    """The step tables are made again under autocast, and what was recorded read the old ones."""
    images = sample_images(4).double()
    for _ in range(3):
        model.tokenize(images)
    before = graphs_of(model)
    model.generation._tables.refresh()
    assert_is_the_oracle(model, images)
    assert graphs_of(model) is not before


def test_switches_are_part_of_a_key(recording, monkeypatch):
    graphs = Graphs()
    for deterministic in (True, False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        graphs("a", lambda x: x + 1, torch.ones(2))
    assert (graphs.recorded, graphs.replayed) == (1, 1)
    monkeypatch.setenv("DOVE_FAST_BACKEND", "reference")
    graphs("a", lambda x: x + 1, torch.ones(2))
    monkeypatch.delenv("DOVE_FAST_BACKEND")
    graphs("a", lambda x: x + 1, torch.ones(3))
    assert (graphs.recorded, graphs.replayed) == (1, 1)
    graphs("a", lambda x: x + 1, torch.ones(2))
    assert (graphs.recorded, graphs.replayed) == (1, 2)


def test_work_that_cannot_be_recorded_runs_without(monkeypatch):
    broken = True

    def record(function, given, pool):
        if broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record_on_the_cpu(function, given, pool)

    monkeypatch.setitem(RECORDERS, "cpu", (record, lambda: "pool"))
    graphs, one = Graphs(), torch.ones(2)
    graphs("a", lambda x: x + 1, one)
    with pytest.warns(UserWarning, match="a CUDA graph was not recorded, the work runs without it: operation not"):
        assert torch.equal(graphs("a", lambda x: x + 1, one), one + 1)
    broken = False
    assert torch.equal(graphs("a", lambda x: x + 1, one), one + 1)
    assert (graphs.recorded, graphs.replayed) == (1, 1)


def test_buckets():
    assert [bucket(rows) for rows in (1, 5, 8, 9, 16, 17, 33, 63, 64, 65, 257)] == [
        1, 5, 8, 10, 16, 20, 40, 64, 64, 80, 320,
    ]  # fmt: skip
    for rows in range(1, 600):
        assert rows <= bucket(rows) <= 1.25 * rows
        assert max(bucket(fewer) - fewer for fewer in range(1, rows + 1)) == spare_places(rows)
    assert len({bucket(rows) for rows in range(1, 257)}) < 30


def test_the_last_used_are_kept(recording):
    graphs = Graphs(most=2)
    one = torch.ones(2)
    for key in ("a", "b", "a", "c", "a", "b", "b"):
        assert torch.equal(graphs(key, lambda x: 2 * x, one), 2 * one)
    # "a" at its second and third call, "b" after it was forgotten.
    assert (graphs.recorded, graphs.replayed) == (2, 3)


def test_refusals(model, monkeypatch):
    images = sample_images(1).double()
    with pytest.raises(ValueError, match=r"generation\.cuda_graphs is for a model on a GPU, this one is on cpu"):
        model.tokenize(images)
    monkeypatch.setitem(RECORDERS, "cpu", (record_on_the_cpu, lambda: "pool"))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="cast the model's weights instead"),
    ):
        model.tokenize(images)


@pytest.mark.parametrize("graphs", [False, True])
def test_blocks_launched_ahead_are_the_oracle(recording, model, graphs, monkeypatch):
    model.generation.cuda_graphs = graphs
    model.generation.learning = False
    outstanding, most = 0, 0
    launch, collect = Batch.launch, Batch.collect

    def counted_launch(self, block_size):
        nonlocal outstanding, most
        outstanding += 1
        most = max(most, outstanding)
        return launch(self, block_size)

    def counted_collect(self, block):
        nonlocal outstanding
        outstanding -= 1
        return collect(self, block)

    monkeypatch.setattr(Batch, "launch", counted_launch)
    monkeypatch.setattr(Batch, "collect", counted_collect)
    for read, deepest in ((0.0, 1), (1e9, 2)):
        model.generation.cost = CostModel(1.0, 1.0, 0.0, read=read)
        most = 0
        for seed in range(3):
            for options in ({}, {"block_size": 3}, {"max_length": 5}, {"length": 4}):
                outstanding = 0
                assert_is_the_oracle(model, sample_images(7, seed).double(), **options)
        assert most == deepest


def test_a_block_is_launched_ahead_where_few_rows_end():
    survival = LengthHistogram(64, [32] * 1000).survival()
    cost = CostModel(10.0, 1.0, 0.0, read=20.0)
    # Nearly all rows go on after step 16, and none after step 32.
    assert launch_ahead(survival, cost, 8, 64, 0, 16, 16)
    assert not launch_ahead(survival, cost, 8, 64, 16, 32, 16)
    # Where waiting is free it never pays.
    assert not launch_ahead(survival, CostModel(10.0, 1.0, 0.0), 8, 64, 0, 16, 16)
    # Of rows beyond what was ever seen nothing is known.
    assert not launch_ahead(survival * 0, cost, 8, 64, 0, 16, 16)


@pytest.fixture
def full_precision():
    """Without TF32, which torch allows in convolutions by default and which keeps three digits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("read", [0.0, 1e9], ids=["", "ahead"])
@pytest.mark.parametrize("options", [{}, {"length": NUM_TOKENS}, {"block_size": 3}, {"eos_threshold": 0.8}])
def test_cuda_graphs(full_precision, options, read):
    """In fp64, in which EOS is decided alike on both sides."""
    model = micro_model().to("cuda", torch.float64)
    model.generation.cuda_graphs = True
    model.generation.learning = False
    model.generation.cost = CostModel(3.0, 1.0, 0.0, read=read)
    for seed in range(5):
        for batch in (11, 17):
            assert_is_the_oracle(model, sample_images(batch, seed).to("cuda", torch.float64), **options)
    assert graphs_of(model).replayed > 0
    images = sample_images(11).to("cuda", torch.float64)
    model.load_state_dict(micro_model(3).to("cuda", torch.float64).state_dict())
    first = model.tokenize(images, **options)
    for _ in range(3):
        assert_is_the_oracle(model, images, **options)
        assert torch.equal(model.tokenize(images, **options).values, first.values)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_of_the_kernels(full_precision, dtype):
    """fp64 goes to the references; these are the kernels, of a model that is not sharp."""
    torch.manual_seed(0)
    model = DOVE(micro_config()).eval().to("cuda", dtype)
    plain = copy.deepcopy(model)
    model.generation.cuda_graphs = True
    for seed in range(5):
        images = sample_images(11, seed).to("cuda", dtype)
        expected = plain.tokenize(images, length=NUM_TOKENS)
        for block_size in (None, 4):
            assert_close(model.tokenize(images, length=NUM_TOKENS, block_size=block_size).values, expected.values)
    assert graphs_of(model).replayed > 0


@pytest.mark.gpu
def test_a_stream_with_cuda_graphs(full_precision):
    model = micro_model().to("cuda", torch.float64)
    model.generation.cuda_graphs = True
    images = sample_images(40).double()
    expected = model.tokenize(images.cuda(), engine="oracle")
    for _ in range(2):
        items = list(TokenStream(model, images, batch_size=4, places=17, block_size=2))
        assert [len(item.tokens) for item in items] == list(expected.host_lengths)
        assert_close(torch.cat([item.tokens for item in items]), expected.values)
