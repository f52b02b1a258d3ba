"""`DOVE.decode` gives the oracle's states and images, and computes a zero vector's first layer once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_TOKENS, micro_model
from tolerances import RELATIVE, assert_close, relative_error

from dove_fast import DOVE
from dove_fast.config import GPTNeoXConfig
from dove_fast.models import dove
from dove_fast.ragged import RaggedTokens

length_lists = st.lists(st.integers(1, NUM_TOKENS), min_size=1, max_size=6)
both_readings = pytest.mark.parametrize("attends_padding", [True, False])
MIXED = [1, NUM_TOKENS, 5, 2, NUM_TOKENS - 1]


def make_model(attends_padding=True, layers=2, bias=True, seed=0) -> DOVE:
    """Return a micro model without anything that is zero or one by initialisation, so that no part hides another."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 48}
    decoder = GPTNeoXConfig(vocab_size=0, num_hidden_layers=layers, attention_bias=bias, **sizes)
    model = micro_model(seed, token_decoder=decoder, decoder_attends_padding=attends_padding)
    for name, parameter in model.token_decoder.named_parameters():
        random = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data.add_(0.2 * random)
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["attends padding", "deaf to padding"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def exact_model(model):
    return copy.deepcopy(model).double()


def sample_tokens(lengths, seed=0, dtype=torch.float32) -> RaggedTokens:
    random = torch.Generator().manual_seed(seed)
    padded = torch.randn(len(lengths), NUM_TOKENS, 32, generator=random, dtype=torch.float64)
    return RaggedTokens.from_padded(padded.to(dtype), lengths)


@torch.no_grad()
def oracle(model, tokens):
    """Return the states that `decode_padded` computes."""
    padded, lengths = tokens.to_padded(NUM_TOKENS)
    mask = None if model.config.decoder_attends_padding else torch.arange(NUM_TOKENS) < lengths[:, None]
    return model.token_decoder(padded, mask)


@torch.no_grad()
def states(model, tokens):
    return model.generation.decode(model.token_decoder, tokens, attends_padding=model.config.decoder_attends_padding)


@settings(deadline=None, max_examples=40)
@given(lengths=length_lists, seed=st.integers(0, 2**16))
def test_decoder_is_the_oracle(model, exact_model, lengths, seed):
    for some, dtype in ((model, torch.float32), (exact_model, torch.float64)):
        tokens = sample_tokens(lengths, seed, dtype)
        actual = states(some, tokens)
        assert actual.dtype == dtype
        assert_close(actual, oracle(some, tokens))


@both_readings
@pytest.mark.parametrize(("layers", "bias"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("lengths", [[1], [NUM_TOKENS], [1, 1], [NUM_TOKENS] * 3, MIXED], ids=str)
def test_layers_and_lengths(attends_padding, layers, bias, lengths):
    model = make_model(attends_padding, layers, bias)
    assert_close(states(model, sample_tokens(lengths)), oracle(model, sample_tokens(lengths)))


def test_no_images(model):
    none = sample_tokens([])
    assert states(model, none).shape == (0, NUM_TOKENS, 32)
    assert model.decode(none).shape == (0, 3, model.config.image_size, model.config.image_size)


@both_readings
def test_images_are_the_oracles(attends_padding):
    """Without the codebook, where rounding may decide between two codewords."""
    model = micro_model(quantize="none", decoder_attends_padding=attends_padding)
    tokens = sample_tokens(MIXED)
    padded, lengths = tokens.to_padded(NUM_TOKENS)
    with torch.no_grad():
        expected = model.decode_padded(padded, lengths)
    pictures = model.decode(tokens)
    assert_close(pictures, expected)
    assert not pictures.requires_grad


def test_chunks(model, monkeypatch):
    """One image at a time, the rows of each its own."""
    model = copy.deepcopy(model)
    tokens = sample_tokens(MIXED)
    monkeypatch.setattr(dove, "CHUNK_BYTES", {"cpu": 1})
    seen = []
    model.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.decode(tokens)
    assert [some.shape for some in seen] == [(1, NUM_TOKENS, 32)] * len(MIXED)
    assert_close(torch.cat(seen), oracle(model, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_the_oracles(model, exact_model, dtype):
    half = copy.deepcopy(model).to(dtype)
    lengths = MIXED * 4
    tokens = sample_tokens(lengths)
    truth = oracle(exact_model, tokens.to(torch.float64))
    theirs = relative_error(oracle(half, tokens.to(dtype)), truth)
    actual = states(half, tokens.to(dtype))
    assert actual.dtype == dtype
    assert relative_error(actual, truth) <= 1.5 * theirs


def test_autocast(model, exact_model):
    tokens = sample_tokens(MIXED * 4)
    truth = oracle(exact_model, tokens.to(torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = relative_error(oracle(model, tokens), truth)
        actual = states(model, tokens)
        assert model.decode(tokens).dtype == torch.float32
    assert actual.dtype == torch.float32
    assert theirs > 10 * RELATIVE[torch.float32]
    assert relative_error(actual, truth) <= 1.5 * theirs
    # What was kept under autocast is not used without it.
    assert_close(states(model, tokens), truth)


def test_rows_computed(model):
    """The first layer's projections see the tokens, and a zero vector once until the weights change."""
    model = copy.deepcopy(model)
    first, second = model.token_decoder.layers
    rows = {"qkv": [], "mlp": [], "second": []}
    for name, module in (
        ("qkv", first.attention.query_key_value),
        ("mlp", first.mlp),
        ("second", second.attention.query_key_value),
    ):
        module.register_forward_pre_hook(lambda module, args, name=name: rows[name].append(args[0].shape[:-1].numel()))
    total = sum(MIXED)
    for _ in range(2):
        states(model, sample_tokens(MIXED))
    assert sorted(rows["qkv"]) == sorted(rows["mlp"]) == [1, total, total]
    assert rows["second"] == [len(MIXED) * NUM_TOKENS] * 2
    states(model, sample_tokens([NUM_TOKENS]))
    assert rows["qkv"][-1] == NUM_TOKENS
    model.generation.refresh()
    states(model, sample_tokens(MIXED))
    assert sorted(rows["qkv"][-2:]) == [1, total]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(make_model(model.config.decoder_attends_padding, seed=3).state_dict()),
        lambda model: model.double(),
        lambda model: torch.nn.init.normal_(model.token_decoder.layers[0].input_layernorm.bias),
        lambda model: torch.nn.init.normal_(model.token_decoder.layers[0].attention.query_key_value.bias),
        lambda model: torch.nn.init.normal_(model.token_decoder.layers[0].mlp.dense_4h_to_h.bias),
    ],
    ids=["load", "dtype", "norm", "qkv", "mlp"],
)
def test_changed_weights_are_seen(model, change):
    model = copy.deepcopy(model)
    tokens = sample_tokens(MIXED)
    states(model, tokens)
    change(model)
    tokens = tokens.to(model.dtype)
    assert_close(states(model, tokens), oracle(model, tokens))


def test_a_write_through_data_needs_refresh(model):
    model = copy.deepcopy(model)
    tokens = sample_tokens(MIXED)
    before = states(model, tokens)
    model.token_decoder.layers[0].mlp.dense_4h_to_h.bias.data.normal_()
    model.generation.refresh()
    assert_close(states(model, tokens), oracle(model, tokens))
    assert relative_error(oracle(model, tokens), before) > 1e-3


def test_optimiser_step_is_seen_and_gradients_are_left_alone(model):
    """What is kept carries no graph, even where the first call was in inference mode."""
    model = copy.deepcopy(model)
    tokens = sample_tokens(MIXED)
    with torch.inference_mode():
        model.decode(tokens)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    padded, lengths = tokens.to_padded(NUM_TOKENS)
    model.decode_padded(padded, lengths).square().mean().backward()
    assert model.token_decoder.layers[0].mlp.dense_4h_to_h.bias.grad is not None
    before = states(model, tokens)
    optimiser.step()
    assert_close(states(model, tokens), oracle(model, tokens))
    assert not torch.equal(states(model, tokens), before)


def test_copies_and_pickles(model):
    tokens = sample_tokens(MIXED)
    expected = states(model, tokens)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(states(again, tokens), expected)


def test_nothing_is_read_by_the_host(model, monkeypatch):
    """But what the ops check of their small integer tensors where these lie on the CPU."""
    tokens = sample_tokens(MIXED)
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.nbytes) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() in the token decoder"))
    states(model, tokens)
    assert max(reads, default=0) <= 4 * (len(MIXED) + 1)
