"""The relations that tokenize and decode must keep, whatever the weights."""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import IMAGE_SIZE, NUM_TOKENS, VOCAB, micro_model, sample_images
from tolerances import EOS_LOGIT_MARGIN, assert_close

from dove_fast import RaggedTokens
from dove_fast.models import dove
from dove_fast.models.lengths import eos_lengths

query_lists = st.lists(
    st.one_of(
        st.none(),
        st.just(""),
        st.lists(st.integers(0, VOCAB - 1), max_size=16).map(lambda ids: torch.tensor(ids, dtype=torch.int64)),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def model():
    return micro_model()


@pytest.fixture(scope="module")
def exact_model():
    """In fp64, so that the sharp model's conditioning does not decide what the test sees."""
    return micro_model().double()


def near_threshold(model, image, query) -> bool:
    """Whether rounding may decide an image's length."""
    ids = query if isinstance(query, torch.Tensor) else torch.empty(0, dtype=torch.int64)
    with torch.no_grad():
        _, logits = model.generate(model.encode(image), [ids])
    cut = math.log(model.config.eos_threshold / (1 - model.config.eos_threshold))
    return bool((logits - cut).abs().min() <= EOS_LOGIT_MARGIN)


def assert_tokens_close(actual: RaggedTokens, expected: RaggedTokens) -> None:
    assert actual.lengths.tolist() == expected.lengths.tolist()
    assert_close(actual.values, expected.values)


@settings(deadline=None, max_examples=40)
@given(queries=query_lists, seed=st.integers(0, 2**16))
def test_batch_is_each_row_alone(exact_model, queries, seed):
    images = sample_images(len(queries), seed).double()
    together, stats = exact_model.tokenize(images, queries, stats=True)
    assert len(together) == len(queries)
    for row, query in enumerate(queries):
        if near_threshold(exact_model, images[row : row + 1], query):
            continue
        alone, alone_stats = exact_model.tokenize(images[row : row + 1], [query], stats=True)
        assert together.lengths[row] == alone.lengths[0]
        assert_close(together[row], alone[0])
        assert_close(stats.eos_probability[row], alone_stats.eos_probability[0])


def test_lengths_are_spread(model):
    lengths = model.tokenize(sample_images(64)).lengths.tolist()
    assert min(lengths) <= 3 and max(lengths) == NUM_TOKENS and len(set(lengths)) >= 5


def test_query_changes_its_own_row_alone(model):
    images = sample_images(3)
    without = model.tokenize(images, length=NUM_TOKENS)
    with_one = model.tokenize(images, [None, torch.tensor([1, 2, 3]), None], length=NUM_TOKENS)
    assert_close(with_one[0], without[0])
    assert_close(with_one[2], without[2])
    assert (with_one[1] - without[1]).norm() > 0.01 * without[1].norm()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_query_dtypes(model, dtype):
    images = sample_images(1)
    expected = model.tokenize(images, [torch.tensor([1, 2, 3])])
    assert_tokens_close(model.tokenize(images, [torch.tensor([1, 2, 3], dtype=dtype)]), expected)


@given(
    logits=st.lists(st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    threshold=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_eos_rule(logits, threshold):
    probabilities = torch.tensor(logits).sigmoid().double()
    expected = [next((i + 1 for i, p in enumerate(row) if p > threshold), 5) for row in probabilities.tolist()]
    cut = torch.logit(torch.tensor(threshold, dtype=torch.float64)).item()
    if (torch.tensor(logits) - cut).abs().min() > 1e-4:
        assert eos_lengths(torch.tensor(logits), threshold).tolist() == expected


@pytest.mark.parametrize(("bias", "expected"), [(1e4, 1), (-1e4, NUM_TOKENS)])
def test_eos_at_once_and_never(model, bias, expected, monkeypatch):
    monkeypatch.setattr(model.eos_head.bias, "data", torch.tensor([bias]))
    assert model.tokenize(sample_images(3)).lengths.tolist() == [expected] * 3


def test_length_is_a_prefix_of_all_tokens(model):
    images = sample_images(4)
    everything = model.tokenize(images, length=NUM_TOKENS)
    assert everything.lengths.tolist() == [NUM_TOKENS] * 4
    natural = model.tokenize(images)
    for n in (1, 5, NUM_TOKENS):
        fixed, capped = model.tokenize(images, length=n), model.tokenize(images, max_length=n)
        assert fixed.lengths.tolist() == [n] * 4
        assert capped.lengths.tolist() == natural.lengths.clamp(max=n).tolist()
        for row in range(4):
            assert_close(fixed[row], everything[row][:n])
            assert_close(capped[row], everything[row][: len(capped[row])])


def test_numpy_numbers(model):
    images = sample_images(2)
    assert model.tokenize(images, length=np.int64(3)).lengths.tolist() == [3, 3]
    expected = model.tokenize(images, max_length=4, eos_threshold=0.5)
    assert_tokens_close(model.tokenize(images, max_length=np.int32(4), eos_threshold=np.float32(0.5)), expected)


def test_threshold(model):
    images = sample_images(16)
    lengths = [model.tokenize(images, eos_threshold=t).lengths for t in (1e-6, 0.3, 0.5, 0.7, 1 - 1e-6)]
    for lower, higher in pairwise(lengths):
        assert (lower <= higher).all()
    assert lengths[0].tolist() != lengths[-1].tolist()
    assert torch.equal(lengths[2], model.tokenize(images).lengths)


def test_stats(model):
    images, query = sample_images(2), torch.tensor([1, 2, 3])
    tokens, stats = model.tokenize(images, [None, query], stats=True)
    # What is computed and what is needed: tests/generation/test_engine.py.
    assert stats.positions_computed >= stats.positions_needed == 2 * NUM_TOKENS + 3 + len(tokens.values)
    assert stats.eos_probability.dtype == torch.float32 and stats.eos_probability.shape == (2,)
    with torch.no_grad():
        logits = model.eos_head(torch.stack([tokens[0][-1], tokens[1][-1]]))[:, 0]
    assert_close(stats.eos_probability, logits.sigmoid())


def test_no_images(model):
    images = sample_images(0)
    tokens, stats = model.tokenize(images, stats=True)
    assert len(tokens) == 0 and tokens.values.shape == (0, 32) and tokens.max_seqlen == 0
    assert stats.eos_probability.shape == (0,) and stats.positions_computed == 0
    assert model.decode(tokens).shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
    pictures, again = model.reconstruct(images, [])
    assert pictures.shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE) and len(again) == 0


def test_chunks_do_not_change_the_result(model, monkeypatch):
    images = sample_images(5)
    queries = [None, torch.tensor([1]), None, torch.tensor([4, 5, 6]), None]
    pictures, tokens = model.reconstruct(images, queries)
    monkeypatch.setattr(dove, "CHUNK_BYTES", {"cpu": 1})
    assert len(model.chunks(5)) == 5
    chunked_pictures, chunked = model.reconstruct(images, queries)
    assert_tokens_close(chunked, tokens)
    assert_close(chunked_pictures, pictures)
    with pytest.raises(ValueError, match="row 3"):
        model.tokenize(torch.cat([images[:3], torch.full_like(images[:1], float("nan"))]))


def test_uint8_is_divided_by_255(model):
    images = (sample_images(2) * 255).round().to(torch.uint8)
    assert_tokens_close(model.tokenize(images), model.tokenize(images.float() / 255))


def test_values_outside_the_range_are_let_through(model):
    assert len(model.tokenize(sample_images(1) * 3 - 1)) == 1


def test_image_range(model):
    signed = micro_model(image_range=(-1, 1))
    signed.load_state_dict(model.state_dict())
    images = sample_images(2)
    assert_tokens_close(signed.tokenize(images), model.tokenize(images * 2 - 1))
    tokens = model.tokenize(images)
    assert_close(signed.decode(tokens), (model.decode(tokens) + 1) / 2)


def test_training_mode_and_gradients_are_left_alone(model):
    for training in (True, False):
        model.train(training)
        pictures, tokens = model.reconstruct(sample_images(1))
        assert model.training is training
        assert not tokens.values.requires_grad and not pictures.requires_grad


def test_plain_forward_has_gradients(model):
    images = sample_images(2)
    states, logits = model.generate(model.encode(images), [torch.tensor([1, 2]), torch.tensor([3])])
    (model.decode_padded(states, torch.full((2,), NUM_TOKENS)).square().mean() + logits.mean()).backward()
    # Every parameter takes part but the codebook, whose gradient is the codebook loss's business.
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    assert missing == ["vqgan.quantize.embedding.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(model, dtype):
    cast = micro_model()
    cast.to(dtype)
    images = sample_images(4)
    pictures, tokens = cast.reconstruct(images, length=NUM_TOKENS)
    assert tokens.values.dtype == dtype and pictures.dtype == dtype
    assert_close(tokens.values, model.tokenize(images, length=NUM_TOKENS).values)
    # Tokens of another dtype are cast.
    assert model.decode(tokens).dtype == torch.float32


def test_autocast(model):
    """Tokens keep the model's dtype, and the head that decides EOS is not rounded."""
    states = torch.randn(2, NUM_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    expected = model.eos_logits(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pictures, tokens = model.reconstruct(sample_images(2))
        assert torch.equal(model.eos_logits(states), expected)
    assert tokens.values.dtype == torch.float32 and pictures.dtype == torch.float32


def test_threads(model):
    images = sample_images(8)
    expected = model.tokenize(images)
    results: list[RaggedTokens] = []
    threads = [threading.Thread(target=lambda: results.append(model.tokenize(images))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for tokens in results:
        assert_tokens_close(tokens, expected)


@torch.no_grad()
def test_padding_reaches_the_decoder_only_as_configured(model):
    """With decoder_attends_padding=False the tokens' own positions see the tokens alone."""
    deaf = micro_model(decoder_attends_padding=False)
    deaf.load_state_dict(model.state_dict())
    tokens = model.tokenize(sample_images(1), length=5)
    padded, lengths = tokens.to_padded(NUM_TOKENS)
    mask = torch.arange(NUM_TOKENS) < lengths[:, None]
    alone = deaf.token_decoder(tokens.values[None])
    assert_close(deaf.token_decoder(padded, mask)[:, :5], alone)
    assert (model.token_decoder(padded)[:, :5] - alone).norm() > 0.01 * alone.norm()


def test_query_text_is_empty_or_refused(model):
    images = sample_images(1)
    assert_tokens_close(model.tokenize(images, [""]), model.tokenize(images))
    with pytest.raises(ValueError, match=r"queries\[0\] is text, but this model has no tokenizer"):
        model.tokenize(images, ["a cat"])
