"""The queries file: what is read, and the line that every error names."""

from __future__ import annotations

import copy
import re

import pytest
from kill_switch import contents
from small_tokenizer import write_tokenizer

from dove_fast import StoreError
from dove_fast.jobs import LoadedModel, TokenizeOptions, read_queries, tokenize
from dove_fast.jobs.queries import encode_texts, hash_queries
from dove_fast.text import TextTokenizer


@pytest.fixture
def tokenizer(tmp_path_factory):
    return TextTokenizer(write_tokenizer(tmp_path_factory.mktemp("text") / "tokenizer.json", unknown=None))


def test_ids_and_texts(tmp_path):
    lines = (
        '{"key": "a", "ids": [1, 2]}\n\n{"key": "b", "text": ""}\r\n{"key": "c", "ids": []}\n'
        '{"key": "d", "text": "a cat"}'
    )
    (tmp_path / "q.jsonl").write_text(lines)
    assert read_queries(tmp_path / "q.jsonl") == {"a": (1, 2), "b": (), "c": (), "d": "a cat"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "is not valid JSON"),
        ("[1]", 'must be an object with a string "key"'),
        ('{"key": 1, "ids": []}', 'must be an object with a string "key"'),
        ('{"key": "b"}', 'must have either "text" or "ids"'),
        ('{"key": "b", "text": "", "ids": []}', 'must have either "text" or "ids"'),
        ('{"key": "b", "text": 1}', '"text" must be a string'),
        ('{"key": "b", "text": null}', '"text" must be a string'),
        ('{"key": "b", "ids": [1.5]}', '"ids" must be a list of integers'),
        ('{"key": "b", "ids": [true]}', '"ids" must be a list of integers'),
        ('{"key": "a", "ids": [1]}', "key 'a' comes more than once"),
    ],
)
def test_errors_name_the_line(tmp_path, line, text):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"key": "a", "ids": [1]}}\n{line}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} line 2.*{re.escape(text)}"):
        read_queries(path)


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such queries file"):
        read_queries(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_queries(tmp_path / "q.jsonl")


def test_the_hash_is_of_what_changes_results():
    assert hash_queries({}) is None
    assert hash_queries({"a": ()}) is None
    assert hash_queries({"a": (1,), "b": (2,)}) == hash_queries({"b": (2,), "a": (1,), "c": ()})
    assert hash_queries({"a": (1,)}) != hash_queries({"a": (2,)})
    assert hash_queries({"a": (1,)}) != hash_queries({"b": (1,)})


def test_texts_are_encoded_and_ids_are_kept(tokenizer):
    assert encode_texts({"a": "red cat", "b": (7,), "c": ()}, tokenizer) == {"a": (3, 4), "b": (7,), "c": ()}
    assert encode_texts({"b": (7,)}, None) == {"b": (7,)}
    with pytest.raises(ValueError, match="the query of 'a' is text, but this model has no tokenizer; give token ids"):
        encode_texts({"b": (7,), "a": "red cat"}, None)
    with pytest.raises(ValueError, match=r"the query of 'a' is no text for the model: .* cannot encode 'dog'"):
        encode_texts({"a": "dog"}, tokenizer)


def test_a_store_of_texts_is_the_store_of_their_ids(tmp_path, photos, loaded, tokenizer):
    model = copy.deepcopy(loaded.model)
    model.tokenizer = tokenizer
    reader = LoadedModel(model, loaded.fingerprint)
    options = TokenizeOptions(length=4)
    (tmp_path / "q.jsonl").write_text('{"key": "00.jpg", "text": "a red cat"}\n{"key": "deep/03.jpg", "ids": [4]}')
    texts = read_queries(tmp_path / "q.jsonl")
    ids = {"00.jpg": (2, 3, 4), "deep/03.jpg": (4,)}
    tokenize(photos, tmp_path / "texts", reader, options, queries=texts)
    tokenize(photos, tmp_path / "ids", loaded, options, queries=ids)
    assert contents(tmp_path / "texts") == contents(tmp_path / "ids")
    # Either goes on with the other's store, and another text does not.
    assert tokenize(photos, tmp_path / "texts", loaded, options, queries=ids).already_complete
    assert tokenize(photos, tmp_path / "ids", reader, options, queries=texts).already_complete
    with pytest.raises(StoreError, match="queries_sha256"):
        tokenize(photos, tmp_path / "ids", reader, options, queries={**texts, "00.jpg": "a cat"})


def test_texts_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, photos, loaded, tokenizer):
    model = copy.deepcopy(loaded.model)
    model.tokenizer = tokenizer
    reader = LoadedModel(model, loaded.fingerprint)
    with pytest.raises(ValueError, match=r"the query of '00\.jpg' does not fit the model: .* 0 to 31, got 100"):
        tokenize(photos, tmp_path / "s", reader, queries={"00.jpg": "zebra"})
    with pytest.raises(ValueError, match=r"the query of '00\.jpg' is text, but this model has no tokenizer"):
        tokenize(photos, tmp_path / "s", loaded, queries={"00.jpg": "cat"})
    assert not (tmp_path / "s").exists()
