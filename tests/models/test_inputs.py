"""Bad input to the model: each error says what came and what to do."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import IMAGE_SIZE, micro_model, sample_images
from small_tokenizer import write_tokenizer

from dove_fast import DOVE, RaggedTokens
from dove_fast.generation import TokenStream
from dove_fast.text import TextTokenizer
from dove_fast.training import training_forward


@pytest.fixture(scope="module")
def model():
    return micro_model()


def corrupt(rows: list[int], value: float) -> torch.Tensor:
    images = sample_images(14)
    for row in rows:
        images[row, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[1]], TypeError, "images must be a torch.Tensor, got list"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), TypeError, "floating in [0, 1] or uint8, got torch.int64"),
        (torch.zeros(3, 16, 16), ValueError, "images must have shape (B, 3, 16, 16), got (3, 16, 16)"),
        (torch.zeros(1, 3, 16, 32), ValueError, "images must have shape (B, 3, 16, 16), got (1, 3, 16, 32)"),
        (torch.zeros(1, 1, 16, 16), ValueError, "images must have shape (B, 3, 16, 16), got (1, 1, 16, 16)"),
        (torch.zeros(1, 3, 16, 16, device="meta"), ValueError, "must be on the model's device cpu, got meta"),
        (corrupt([2], float("nan")), ValueError, "images must be finite, got NaN or infinity in row 2"),
        (corrupt([0, 5], float("-inf")), ValueError, "images must be finite, got NaN or infinity in rows 0, 5"),
        (corrupt(list(range(12)), float("inf")), ValueError, "in rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
    ],
)
def test_images(model, images, error, message):
    with pytest.raises(error) as caught:
        model.tokenize(images)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 3, "max_length": 4}, ValueError, "length or max_length, not both, got length=3 and max_length=4"),
        ({"length": 0}, ValueError, "length must be from 1 to 16, the most tokens an image can have, got 0"),
        ({"length": 17}, ValueError, "length must be from 1 to 16, the most tokens an image can have, got 17"),
        ({"max_length": -1}, ValueError, "max_length must be from 1 to 16, the most tokens an image can have, got -1"),
        ({"length": 2.0}, TypeError, "length must be an int or None, got 2.0"),
        ({"max_length": True}, TypeError, "max_length must be an int or None, got True"),
        ({"eos_threshold": 0.0}, ValueError, "eos_threshold must lie between 0 and 1, both excluded, got 0.0"),
        ({"eos_threshold": 1}, ValueError, "eos_threshold must lie between 0 and 1, both excluded, got 1"),
        ({"eos_threshold": float("nan")}, ValueError, "eos_threshold must lie between 0 and 1, both excluded, got nan"),
        ({"eos_threshold": "0.5"}, TypeError, "eos_threshold must be a number or None, got '0.5'"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"engine": "warp"}, ValueError, "engine must be None or one of 'blocks', 'oracle', got 'warp'"),
    ],
)
def test_options(model, options, error, message):
    with pytest.raises(error) as caught:
        model.tokenize(sample_images(1), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "queries must be None or a list with one entry an image, got Tensor"),
        ("ab", TypeError, "queries must be None or a list with one entry an image, got str"),
        ([None], ValueError, "queries must have one entry an image: 2 images, got 1 queries"),
        ([None, 7], TypeError, "queries[1] must be None, text or a 1-D tensor of token ids, got int"),
        ([None, torch.zeros(2)], TypeError, "queries[1] must hold integer token ids, got torch.float32"),
        ([torch.tensor([True]), None], TypeError, "queries[0] must hold integer token ids, got torch.bool"),
        ([torch.zeros(1, 2, dtype=torch.int64), None], ValueError, "queries[0] must be 1-D, got shape (1, 2)"),
        ([None, torch.tensor([0, 32])], ValueError, "queries[1] must hold ids from 0 to 31, got 32"),
        ([None, torch.tensor([-1])], ValueError, "queries[1] must hold ids from 0 to 31, got -1"),
        ([None, torch.zeros(17, dtype=torch.int64)], ValueError, "queries[1] must have at most 16 ids for the"),
    ],
)
def test_queries(model, queries, error, message):
    with pytest.raises(error) as caught:
        model.tokenize(sample_images(2), queries)
    assert message in str(caught.value)


@pytest.fixture
def reader(tmp_path):
    """A model with a tokenizer, one of whose words is beyond its vocabulary."""
    model = micro_model()
    model.tokenizer = TextTokenizer(write_tokenizer(tmp_path / "tokenizer.json", unknown=None))
    return model


def test_text_is_its_ids(reader):
    images = sample_images(3)
    ids = [torch.tensor([2, 3, 4]), None, torch.tensor([4])]
    texts = ["a red cat", "", "cat"]
    expected = reader.tokenize(images, ids, length=4).values
    assert not torch.equal(expected, reader.tokenize(images, length=4).values)
    assert torch.equal(reader.tokenize(images, texts, length=4).values, expected)
    forwards = [training_forward(reader, images, queries, lengths=[4, 4, 4]) for queries in (ids, texts)]
    assert torch.equal(forwards[0].tokens.values, forwards[1].tokens.values)
    streams = [list(TokenStream(reader, zip(images, queries, strict=True), length=4)) for queries in (ids, texts)]
    for first, second in zip(*streams, strict=True):
        assert torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a zebra", "queries[1] must hold ids from 0 to 31, got 100"),
        ("cat " * 17, "queries[1] must have at most 16 ids for the"),
        ("a dog", "queries[1]: "),
    ],
)
def test_text_that_does_not_fit(reader, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reader.tokenize(sample_images(2), [None, text])


def test_text_without_a_tokenizer(model):
    assert model.tokenizer is None
    message = r"queries\[1\] is text, but this model has no tokenizer; pass .* or set model\.tokenizer = "
    with pytest.raises(ValueError, match=message):
        model.tokenize(sample_images(2), ["", "a cat"])


def ragged(lengths: list[int], width: int = 32, fill: float = 0, **options) -> RaggedTokens:
    padded = torch.full((len(lengths), max(lengths), width), float(fill)).to(**{"dtype": torch.float32, **options})
    return RaggedTokens.from_padded(padded, lengths)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 2, 32), TypeError, "tokens must be RaggedTokens, got Tensor"),
        (ragged([2], dtype=torch.int64), TypeError, "tokens must be floating, got torch.int64"),
        (ragged([2], width=31), ValueError, "tokens must have width 32, got values of shape (2, 31)"),
        (ragged([2, 17]), ValueError, "an image has at most 16 tokens, got 17"),
        (ragged([2, 0]), ValueError, "an image has at least 1 token, got none for row 1"),
        (
            ragged([1, 2], fill=float("nan")),
            ValueError,
            "tokens must be finite, got NaN or infinity in rows 0, 1",
        ),
    ],
)
def test_tokens(model, tokens, error, message):
    with pytest.raises(error) as caught:
        model.decode(tokens)
    assert message in str(caught.value)


def test_config_type():
    with pytest.raises(TypeError, match="config must be a DOVEConfig, got dict"):
        DOVE({"image_size": IMAGE_SIZE})


def test_model_without_query_embedding():
    config = micro_model().config
    generator = config.token_decoder
    model = micro_model(generator=generator)
    assert len(model.tokenize(sample_images(1), [None])) == 1
    with pytest.raises(ValueError, match=r"queries\[0\] holds ids, but this model has no query embedding"):
        model.tokenize(sample_images(1), [torch.tensor([1])])


def test_nonfinite_tokens_are_found_in_their_rows(model):
    tokens = ragged([3, 1, 4, 2])
    tokens.values[3, 7] = float("inf")
    tokens.values[9, 0] = float("nan")
    with pytest.raises(ValueError, match="tokens must be finite, got NaN or infinity in rows 1, 3"):
        model.decode(tokens)
