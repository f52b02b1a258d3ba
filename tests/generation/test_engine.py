"""The engine gives the oracle's tokens, and computes no more than it says."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_TOKENS, VOCAB, micro_config, micro_model, sample_images, sharpen_attention
from tolerances import EOS_LOGIT_MARGIN, assert_close, relative_error

from dove_fast import DOVE, DOVEConfig
from dove_fast.config import GPTNeoXConfig
from dove_fast.generation import CostModel, LengthHistogram, engine
from dove_fast.generation.batch import LengthRule
from dove_fast.generation.cache import row_bytes
from dove_fast.generation.measure import _fit

query_lists = st.lists(
    st.one_of(
        st.none(),
        st.lists(st.integers(0, VOCAB - 1), max_size=16).map(lambda ids: torch.tensor(ids, dtype=torch.int64)),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def model():
    return micro_model()


@pytest.fixture(scope="module")
def exact_model():
    """In fp64, so that the sharp model's conditioning does not decide what the test sees."""
    return micro_model().double()


def decided(model, images, queries, threshold=None):
    """Return which rows' lengths rounding cannot change: no logit comes near the threshold.

    In fp64 only the logit's own rounding to fp32, in which EOS is decided, may change one.
    """
    margin = 1e-6 if model.dtype == torch.float64 else EOS_LOGIT_MARGIN
    ids = [query if query is not None else torch.empty(0, dtype=torch.int64) for query in queries]
    with torch.no_grad():
        _, logits = model.generate(model.encode(images), ids)
    threshold = model.config.eos_threshold if threshold is None else threshold
    cut = math.log(threshold / (1 - threshold))
    return ((logits - cut).abs().min(dim=1).values > margin).tolist()


def assert_same_tokens(model, images, queries, **options):
    """Compare the engine with the oracle, row by row; the rows that rounding may decide apart. Return how many."""
    ours = {name: options.pop(name) for name in ("block_size", "deterministic") if name in options}
    expected = model.tokenize(images, queries, engine="oracle", **options)
    actual = model.tokenize(images, queries, **options, **ours)
    assert actual.values.dtype == expected.values.dtype
    sure = decided(model, images, queries or [None] * len(images), options.get("eos_threshold"))
    if "length" in options:
        sure = [True] * len(images)
    for row in range(len(images)):
        if sure[row]:
            assert actual.host_lengths[row] == expected.host_lengths[row]
        shared = min(actual.host_lengths[row], expected.host_lengths[row])
        assert_close(actual[row][:shared], expected[row][:shared])
    return sure.count(False)


@settings(deadline=None, max_examples=60)
@given(
    queries=query_lists,
    seed=st.integers(0, 2**16),
    block_size=st.sampled_from([None, 1, 2, 5, 16, 100]),
    options=st.sampled_from(
        [{}, {"length": 1}, {"length": 7}, {"max_length": 1}, {"max_length": 9}, {"eos_threshold": 0.9}]
    ),
)
def test_engine_is_the_oracle(exact_model, queries, seed, block_size, options):
    assert_same_tokens(
        exact_model, sample_images(len(queries), seed).double(), queries, block_size=block_size, **options
    )


@pytest.mark.parametrize("block_size", [None, 1, 3, NUM_TOKENS])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_and_single_precision(layers, block_size):
    """The first layer's tables and the last layer's projection meet in one layer, too."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    generator = GPTNeoXConfig(vocab_size=VOCAB, num_hidden_layers=layers, attention_bias=layers != 3, **sizes)
    torch.manual_seed(1)
    model = DOVE(micro_config(generator=generator)).eval()
    assert len(model.generator.layers) == layers
    unsure = assert_same_tokens(
        model, sample_images(5), [None, torch.tensor([3, 4]), None, torch.tensor([9]), None], block_size=block_size
    )
    assert unsure == 0


def test_tiny_preset():
    torch.manual_seed(0)
    # In fp64, as what makes the lengths depend on the image makes them depend on rounding too.
    model = DOVE(DOVEConfig.tiny()).eval().double()
    model.in_proj.weight.data.mul_(20)
    sharpen_attention(model.generator, 20)
    images = sample_images(6, image_size=64).double()
    with torch.no_grad():
        _, logits = model.generate(model.encode(images), [torch.empty(0, dtype=torch.int64)] * 6)
    model.eos_head.bias.data.sub_(logits.quantile(0.97))
    assert len(set(model.tokenize(images, engine="oracle").host_lengths)) > 3
    for options in ({}, {"block_size": 8}, {"length": 40}):
        assert_same_tokens(model, images, [None, torch.arange(30), None, None, torch.arange(3), None], **options)


@pytest.mark.parametrize("bias", [-1e4, -0.5, 0.0, 0.5, 1e4])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_length_distributions(exact_model, bias, scale):
    model = copy.deepcopy(exact_model)
    model.eos_head.weight.data.mul_(scale)
    model.eos_head.bias.data.add_(bias)
    for batch in (1, 2, 33):
        assert_same_tokens(model, sample_images(batch).double(), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_oracles(model, exact_model, dtype):
    images = sample_images(16)
    half = copy.deepcopy(model).to(dtype)
    queries = [None, torch.tensor([1, 2, 3])] * 8
    truth = exact_model.tokenize(images.double(), queries, length=NUM_TOKENS, engine="oracle").values
    theirs = relative_error(half.tokenize(images, queries, length=NUM_TOKENS, engine="oracle").values, truth)
    for block_size in (None, 1, 5):
        ours = half.tokenize(images, queries, length=NUM_TOKENS, block_size=block_size).values
        assert ours.dtype == dtype
        assert relative_error(ours, truth) <= 1.5 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ends_where_the_oracle_does(model, exact_model, dtype):
    """Rows whose logits stay clear of the threshold by what half precision does to them have the oracle's lengths."""
    images = sample_images(256)
    half = copy.deepcopy(model).to(dtype)
    none = [torch.empty(0, dtype=torch.int64)] * 256
    with torch.no_grad():
        _, exact = exact_model.generate(exact_model.encode(images.double()), none)
        _, logits = half.generate(half.encode(images.to(dtype)), none)
    expected = exact_model.tokenize(images.double(), engine="oracle").host_lengths
    # The engine's values are as good as the oracle's by a factor of 1.5; to be on the safe side of it, twice.
    error = (logits - exact).abs().amax(dim=1)
    before_the_end = torch.arange(NUM_TOKENS) < torch.tensor(expected)[:, None]
    clear = (exact.abs().where(before_the_end, torch.inf).amin(dim=1) > 2 * error).tolist()
    assert clear.count(True) > 20 and len({n for n, sure in zip(expected, clear, strict=True) if sure}) > 1
    for block_size in (None, 1, 5):
        lengths = half.tokenize(images, block_size=block_size).host_lengths
        assert [n for n, sure in zip(lengths, clear, strict=True) if sure] == [
            n for n, sure in zip(expected, clear, strict=True) if sure
        ]


def test_autocast(model, exact_model):
    images = sample_images(8)
    truth = exact_model.tokenize(images.double(), length=NUM_TOKENS).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = relative_error(model.tokenize(images, length=NUM_TOKENS, engine="oracle").values, truth)
        tokens = model.tokenize(images, length=NUM_TOKENS, block_size=5)
        # fp64 is none of autocast's business.
        exact = exact_model.tokenize(images.double(), length=NUM_TOKENS, block_size=5).values
    assert tokens.values.dtype == torch.float32
    assert relative_error(tokens.values, truth) <= 1.5 * theirs
    assert_close(exact, truth)
    # What was kept under autocast is not used without it.
    assert_close(model.tokenize(images, length=NUM_TOKENS).values, truth)


def test_positions_computed(model):
    images = sample_images(12)
    queries = [torch.tensor([1, 2, 3]) if row % 3 == 0 else None for row in range(12)]
    prefix = 12 * model.config.num_features + 4 * 3
    for block_size in (1, 4, 5, NUM_TOKENS):
        tokens, stats = model.tokenize(images, queries, block_size=block_size, stats=True)
        lengths = tokens.host_lengths
        blocks = [-(-length // block_size) for length in lengths]
        assert stats.positions_computed == prefix + sum(min(n * block_size, NUM_TOKENS) for n in blocks)
        assert stats.positions_needed == prefix + sum(lengths)
        assert stats.blocks == max(blocks)
        assert stats.rows_refilled == 0
        # A block reads one int32 for every row that is alive.
        assert stats.bytes_to_host == 4 * sum(blocks)
    _, stats = model.tokenize(images, length=7, stats=True)
    assert stats.positions_computed == stats.positions_needed == 12 * (model.config.num_features + 7)
    assert stats.blocks == 1 and stats.bytes_to_host == 0
    _, stats = model.tokenize(images, queries, engine="oracle", stats=True)
    assert stats.positions_computed == prefix + 12 * NUM_TOKENS


def test_the_schedule_follows_histogram_and_cost(model):
    model = copy.deepcopy(model)
    images = sample_images(12)
    model.generation.learning = False
    model.generation.histogram = LengthHistogram(NUM_TOKENS, [NUM_TOKENS] * 1000)
    model.generation.cost = CostModel(10.0, 1.0, 0.0)
    _, stats = model.tokenize(images, stats=True)
    assert stats.blocks == 1
    model.generation.cost = CostModel(0.0, 1.0, 0.0)
    model.generation.histogram = LengthHistogram(NUM_TOKENS)
    tokens, stats = model.tokenize(images, stats=True)
    assert stats.positions_computed == stats.positions_needed
    assert stats.blocks == max(tokens.host_lengths)


def test_learning(model):
    model = copy.deepcopy(model)
    images = sample_images(12)
    model.generation.histogram = LengthHistogram(NUM_TOKENS)
    lengths = model.tokenize(images).host_lengths
    assert model.generation.histogram.weight == 12
    expected = LengthHistogram(NUM_TOKENS, lengths)
    assert (model.generation.histogram.survival() == expected.survival()).all()
    # What EOS did not decide says nothing.
    model.tokenize(images, length=3)
    model.tokenize(images, max_length=3)
    model.tokenize(images, engine="oracle")
    model.tokenize(images, deterministic=True)
    model.generation.learning = False
    model.tokenize(images)
    assert model.generation.histogram.weight == 12


@pytest.mark.parametrize("block_size", [None, 1, 3, NUM_TOKENS])
@pytest.mark.parametrize("places", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"length": 5}, {"max_length": 4}])
def test_more_rows_than_places(exact_model, monkeypatch, places, block_size, options):
    """Rows beyond what the caches may take wait, and get the places of rows that ended."""
    images = sample_images(20).double()
    queries = [torch.arange(row % 4) if row % 3 else None for row in range(20)]
    most = options.get("length", options.get("max_length", NUM_TOKENS))
    bytes_of_row = row_bytes(exact_model.config.generator, engine.rounded_up(16 + 3 + most), most, 8)
    monkeypatch.setattr(engine, "CACHE_BYTES", {"cpu": places * bytes_of_row})
    assert exact_model.config.num_features == 16
    given = {"block_size": block_size, **options}
    assert_same_tokens(exact_model, images, queries, **given)
    tokens, stats = exact_model.tokenize(images, queries, stats=True, **given)
    assert 0 < stats.rows_refilled <= 20 - places
    if block_size == 1:
        assert stats.positions_computed == stats.positions_needed
    expected = exact_model.eos_probability(torch.stack([row[-1] for row in tokens]))
    assert torch.equal(stats.eos_probability, expected)


def test_a_cache_is_used_again(model):
    model = copy.deepcopy(model)
    images = sample_images(4)
    first = model.tokenize(images).values
    kept = model.generation._pool._kept[1]
    for some in (images, images[:1], images):
        model.tokenize(some)
        assert model.generation._pool._kept[1] is kept
    # What earlier rows left behind is never read.
    for tensor in (*kept.keys, *kept.values, kept.states):
        tensor.fill_(float("nan"))
    assert torch.equal(model.tokenize(images, block_size=100).values, model.tokenize(images, block_size=100).values)
    assert_close(model.tokenize(images).values, first)
    model.tokenize(sample_images(9), [torch.tensor([1, 2])] * 9)
    assert model.generation._pool._kept[1] is not kept
    model.generation.refresh()
    assert model.generation._pool._kept is None
    assert_close(model.tokenize(images).values, first)


@pytest.mark.parametrize(
    ("change", "hidden"),
    [
        (lambda model: model.load_state_dict(micro_model(3).state_dict()), False),
        (lambda model: model.double(), False),
        # A write through .data is not seen: that is what refresh is for.
        (lambda model: [parameter.data.add_(0.01) for parameter in model.generator.parameters()], True),
        (lambda model: torch.nn.init.normal_(model.generator.layers[0].mlp.dense_4h_to_h.bias), False),
        (lambda model: torch.nn.init.normal_(model.generator.layers[-1].attention.query_key_value.weight), False),
    ],
    ids=["load", "dtype", "data", "first layer", "last layer"],
)
def test_changed_weights_change_the_tokens(change, hidden):
    model = micro_model()
    images = sample_images(4)
    before = model.tokenize(images, length=NUM_TOKENS).values
    change(model)
    if hidden:
        model.generation.refresh()
    images = images.to(model.dtype)
    expected = model.tokenize(images, length=NUM_TOKENS, engine="oracle").values
    assert_close(model.tokenize(images, length=NUM_TOKENS).values, expected)
    assert model.dtype == torch.float64 or relative_error(expected, before) > 1e-3


def test_optimiser_step_is_seen(model):
    model = copy.deepcopy(model)
    images = sample_images(2)
    model.tokenize(images)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    states, logits = model.generate(model.encode(images), [torch.empty(0, dtype=torch.int64)] * 2)
    (states.square().sum() + logits.sum()).backward()
    optimiser.step()
    expected = model.tokenize(images, length=NUM_TOKENS, engine="oracle").values
    assert_close(model.tokenize(images, length=NUM_TOKENS).values, expected)


def test_gradients_after_the_engine(model):
    """What the engine keeps carries no graph, and a training forward after it works."""
    model = copy.deepcopy(model)
    images = sample_images(2)
    with torch.inference_mode():
        model.tokenize(images)
    model.tokenize(images)
    states, _ = model.generate(model.encode(images), [torch.empty(0, dtype=torch.int64)] * 2)
    states.sum().backward()
    assert model.generator.layers[0].mlp.dense_4h_to_h.weight.grad is not None


def test_copies_and_pickles(model):
    images = sample_images(3)
    expected = model.tokenize(images)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.generation is not model.generation
        assert_close(again.tokenize(images).values, expected.values)


def test_threads(model):
    images = sample_images(16)
    expected = model.tokenize(images, engine="oracle")
    failures: list[BaseException] = []

    def work(count: int) -> None:
        try:
            for _ in range(5):
                tokens = model.tokenize(images[:count])
                assert tokens.host_lengths == expected.host_lengths[:count]
                assert_close(tokens.values, expected[:count].values)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 4, 16, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"block_size": 3}, {"length": 9}])
def test_deterministic_bits(model, exact_model, options, dtype):
    """Whatever else is in the batch, how it lies in memory, what was learned and what is in the kept cache."""
    model = exact_model if dtype == torch.float64 else model
    images = sample_images(9).to(dtype)
    queries = [torch.tensor([1, 2, 3]) if row % 4 == 1 else None for row in range(9)]
    together = model.tokenize(images, queries, deterministic=True, **options)
    for order in ([0], [8, 1], [1, 1, 1], [5, 4, 3, 2, 1, 0], list(range(9))):
        some = images[order].contiguous(memory_format=torch.channels_last)
        tokens = model.tokenize(some, [queries[row] for row in order], deterministic=True, **options)
        for place, row in enumerate(order):
            assert torch.equal(tokens[place], together[row])
        # Another cache, and another history.
        model.tokenize(sample_images(3, seed=len(order)).to(dtype), [torch.arange(16)] * 3)
        gc.collect()
    assert_same_tokens(exact_model, images.double(), queries, deterministic=True, **options)


def test_deterministic_refuses_the_oracle(model):
    with pytest.raises(ValueError, match="deterministic=True is for the default engine, got engine='oracle'"):
        model.tokenize(sample_images(1), deterministic=True, engine="oracle")


def test_nothing_is_read_by_the_host_but_lengths(model, monkeypatch):
    """With tensors that cannot be read but through eos_scan's result; a stand-in for a device."""
    images = sample_images(6)
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.nbytes) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() in the engine"))
    prefixes = model.prefixes(model.encode(images), [torch.empty(0, dtype=torch.int64)] * 6)
    reads.clear()
    rule = LengthRule(NUM_TOKENS, 0.5)
    with torch.no_grad():
        _, counters = engine.generate(model.generation, model.generator, model.eos_head, prefixes, rule, 4)
    # The ops check the contents of their small integer tensors where they lie on the CPU.
    assert counters.bytes_to_host > 0
    assert max(reads) <= 4 * (6 + 1)


def test_measured_costs(model):
    model = copy.deepcopy(model)
    images = sample_images(4)
    expected = model.tokenize(images, engine="oracle")
    before = model.generation.histogram.weight
    cost = model.measure_cost()
    assert model.generation.cost is cost
    # In seconds: a block takes longer than nothing, and a thousand positions less than a minute.
    assert cost.time(1, model.config.num_features, 1) > 0 and cost.time(10, model.config.num_features, 100) < 60
    assert model.generation.histogram.weight == before
    assert_close(model.tokenize(images).values, expected.values)


def test_cost_fit():
    shares = np.array([[1.0, 1, 20], [1, 16, 400], [1, 64, 3000], [1, 128, 4000]])
    for truth in ((5.0, 2.0, 0.01), (0.0, 2.0, 0.0), (3.0, 1.0, 0.0)):
        assert _fit(shares, shares @ np.array(truth)) == pytest.approx(truth, abs=1e-9)
    # A part that would come out negative is none.
    block, position, pair = _fit(shares, np.array([1.0, 16.0, 60.0, 128.0]))
    assert min(block, position, pair) >= 0 and position == pytest.approx(1.0, rel=0.1)


def test_a_wrapped_projection_is_called(model):
    """An adapter around the last layer's projection is not gone round."""

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)

    model = copy.deepcopy(model)
    attention = model.generator.layers[-1].attention
    plain = attention.query_key_value
    attention.query_key_value = Adapter(plain.in_features, plain.out_features)
    attention.query_key_value.load_state_dict(plain.state_dict())
    images = sample_images(3)
    expected = model.tokenize(images, length=NUM_TOKENS, engine="oracle").values
    assert_close(model.tokenize(images, length=NUM_TOKENS).values, expected)


def test_a_hook_on_the_last_projection_is_called(model):
    model = copy.deepcopy(model)
    projection = model.generator.layers[-1].attention.query_key_value
    projection.register_forward_hook(lambda module, args, out: out + 0.1)
    images = sample_images(3)
    expected = model.tokenize(images, length=NUM_TOKENS, engine="oracle").values
    assert_close(model.tokenize(images, length=NUM_TOKENS).values, expected)


def test_histogram_is_checked(model):
    model = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"histogram must be over {NUM_TOKENS} tokens, got 9"):
        model.generation.histogram = LengthHistogram(9)
    with pytest.raises(TypeError, match="histogram must be a LengthHistogram, got list"):
        model.generation.histogram = [1, 2]
