"""TokenStream: the oracle's tokens, in input order, with the places kept full."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import IMAGE_SIZE, NUM_TOKENS, micro_model, sample_images
from tolerances import assert_close

from dove_fast.generation import LengthHistogram, TokenStream, engine
from dove_fast.generation import stream as stream_module
from dove_fast.generation.batch import Batch


@pytest.fixture(scope="module")
def exact_model():
    return micro_model().double()


@settings(deadline=None, max_examples=25)
@given(
    queries=st.lists(st.integers(0, 12), max_size=25),
    batch_size=st.integers(1, 9),
    places=st.one_of(st.none(), st.integers(1, 12)),
    block_size=st.sampled_from([None, 1, 3, NUM_TOKENS]),
    options=st.sampled_from([{}, {"length": 5}, {"max_length": 4}, {"eos_threshold": 0.8}]),
)
def test_stream_is_the_oracle(exact_model, queries, batch_size, places, block_size, options):
    images = sample_images(len(queries)).double()
    ids = [torch.arange(count) if count > 4 else None for count in queries]
    expected = exact_model.tokenize(images, ids, engine="oracle", **options)
    stream = TokenStream(
        exact_model,
        zip(images, ids, strict=True),
        batch_size=batch_size,
        places=places,
        block_size=block_size,
        **options,
    )
    items = list(stream)
    assert [item.index for item in items] == list(range(len(images)))
    assert [len(item.tokens) for item in items] == list(expected.host_lengths)
    for item in items:
        assert_close(item.tokens, expected[item.index])


def test_places_are_filled_again(exact_model):
    images = sample_images(40).double()
    lengths = exact_model.tokenize(images, engine="oracle").host_lengths
    stream = TokenStream(exact_model, images, batch_size=4, places=8, block_size=2)
    assert len(list(stream)) == 40
    counters = stream.counters
    assert counters.rows_refilled == 40 - 8
    blocks = [-(-length // 2) for length in lengths]
    assert counters.positions == 40 * exact_model.config.num_features + 2 * sum(blocks)
    # A batch of 8 after the other would wait for its longest row each time.
    one_after_the_other = sum(max(blocks[first : first + 8]) for first in range(0, 40, 8))
    assert sum(blocks) / 8 <= counters.blocks < one_after_the_other


def test_reads_ahead_no_further_than_it_says(exact_model):
    read = 0

    def source() -> Iterator[torch.Tensor]:
        nonlocal read
        for image in sample_images(200).double():
            read += 1
            yield image

    ahead = []
    for item in TokenStream(exact_model, source(), batch_size=3, places=4):
        ahead.append(read - item.index)
    # Those in the places, those that wait, and those that ended before an earlier one.
    assert max(ahead) <= 4 + 3 + 4 * NUM_TOKENS < 200


@pytest.mark.parametrize("count", [1, 4, 6, 13])
@pytest.mark.parametrize("ahead", [False, True])
def test_reads_the_next_images_while_these_are_encoded(exact_model, monkeypatch, count, ahead):
    """As on a GPU, which computes meanwhile."""
    monkeypatch.setattr(stream_module, "READS_AHEAD", {"cpu"} if ahead else set())
    images = sample_images(count).double()
    expected = exact_model.tokenize(images, engine="oracle")
    found = list(TokenStream(exact_model, images, batch_size=4, places=5))
    assert [item.index for item in found] == list(range(count))
    for item in found:
        assert_close(item.tokens, expected[item.index])
    with pytest.raises(ValueError, match=f"image {count} of the stream must be finite"):
        list(TokenStream(exact_model, [*images, images[0] * float("nan")], batch_size=4))


def test_a_source_that_has_ended_is_not_asked_again(exact_model):
    class Source:
        def __init__(self):
            self.images = list(sample_images(5).double())
            self.ended = False

        def __iter__(self):
            return self

        def __next__(self):
            assert not self.ended
            if not self.images:
                self.ended = True
                raise StopIteration
            return self.images.pop()

    assert len(list(TokenStream(exact_model, Source(), batch_size=4, places=2))) == 5


@pytest.mark.parametrize("ahead", [False, True])
def test_how_far_it_reads_before_the_first_block(exact_model, monkeypatch, ahead):
    monkeypatch.setattr(stream_module, "READS_AHEAD", {"cpu"} if ahead else set())
    read: list[int] = []
    admitted: list[int] = []
    refill = Batch.refill

    def noted(self, waiting):
        admitted.append(len(read))
        refill(self, waiting)

    monkeypatch.setattr(Batch, "refill", noted)
    source = (read.append(1) or image for image in sample_images(20).double())
    assert len(list(TokenStream(exact_model, source, batch_size=4, places=4))) == 20
    assert admitted[0] == (8 if ahead else 4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.uint8, torch.float64])
def test_images_are_copied_to_a_gpu_while_it_computes(kind):
    model = micro_model().to("cuda", torch.float64)
    images = sample_images(40)
    images = (images * 255).to(kind) if kind == torch.uint8 else images.to(kind)
    expected = model.tokenize(images.cuda(), length=NUM_TOKENS)
    for source in (images, images.cuda()):
        items = list(TokenStream(model, source, batch_size=4, places=6, length=NUM_TOKENS))
        assert_close(torch.cat([item.tokens for item in items]), expected.values)


def test_tokens_are_copies(exact_model):
    """A place that is taken again does not change what was given out."""
    images = sample_images(12).double()
    stream = iter(TokenStream(exact_model, images, batch_size=1, places=1))
    first = next(stream)
    kept = first.tokens.clone()
    assert first.tokens.untyped_storage().nbytes() == first.tokens.nbytes
    rest = list(stream)
    assert len(rest) == 11 and torch.equal(first.tokens, kept)


def test_learns_and_can_be_left_early(exact_model):
    model = copy.deepcopy(exact_model)
    stream = iter(TokenStream(model, sample_images(20).double(), batch_size=4))
    next(stream)
    stream.close()
    assert model.generation.histogram.weight > 0
    # The cache came back.
    assert model.generation._pool._kept is not None
    assert len(list(TokenStream(model, sample_images(20).double(), batch_size=4))) == 20


def test_gradients_stay_on_for_the_caller(exact_model):
    for _ in TokenStream(exact_model, sample_images(3).double(), batch_size=1):
        assert torch.is_grad_enabled()


def test_no_images(exact_model):
    assert list(TokenStream(exact_model, [])) == []


def test_refusals(exact_model):
    image = sample_images(1)[0].double()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TokenStream(exact_model, [], batch_size=0)
    with pytest.raises(TypeError, match=r"places must be an int, got 2\.5"):
        TokenStream(exact_model, [], places=2.5)
    with pytest.raises(ValueError, match="length or max_length, not both"):
        TokenStream(exact_model, [], length=1, max_length=2)
    shape = rf"image 0 of the stream: images must have shape \(B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}\)"
    with pytest.raises(ValueError, match=shape):
        list(TokenStream(exact_model, [image[:, :5]]))
    with pytest.raises(TypeError, match=r"image 0 of the stream: images must be a torch\.Tensor, got str"):
        list(TokenStream(exact_model, ["a.jpg"]))
    with pytest.raises(ValueError, match="image 3 of the stream must be finite, got NaN or infinity"):
        list(TokenStream(exact_model, [image, image, image, image * float("nan")], batch_size=2))
    with pytest.raises(
        ValueError, match=r"image 1 of the stream: queries\[0\] is text, but this model has no tokenizer"
    ):
        list(TokenStream(exact_model, [image, (image, "a cat")]))
    mixed = r"image 1 of the stream: all images must be torch\.float64 on cpu like the first, got torch\.uint8 on cpu"
    with pytest.raises(TypeError, match=mixed):
        list(TokenStream(exact_model, [image, (image * 255).to(torch.uint8)]))


def test_is_iterated_once_and_in_one_context(exact_model):
    images = sample_images(6).double()
    stream = TokenStream(exact_model, images, batch_size=2)
    for _ in stream:
        break
    with pytest.raises(RuntimeError, match="iterated once"):
        next(iter(stream))
    items = iter(TokenStream(exact_model, images, batch_size=1, places=1))
    next(items)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="must go on under the autocast"),
    ):
        next(items)


def test_own_histogram_and_bounded_memory(exact_model, monkeypatch):
    model = copy.deepcopy(exact_model)
    own = LengthHistogram(NUM_TOKENS)
    before = model.generation.histogram.weight
    assert len(list(TokenStream(model, sample_images(9).double(), batch_size=4, histogram=own))) == 9
    assert own.weight == 9 and model.generation.histogram.weight == before
    monkeypatch.setattr(engine, "CACHE_BYTES", {"cpu": 1})
    stream = TokenStream(model, sample_images(9).double(), batch_size=4)
    assert len(list(stream)) == 9
    assert stream.counters.rows_refilled == 8
