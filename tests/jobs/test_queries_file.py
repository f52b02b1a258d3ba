"""The queries file: what is read, and the line that every error names."""

from __future__ import annotations

import re

import pytest

from dove_fast.jobs import read_queries
from dove_fast.jobs.queries import hash_queries


def test_ids_and_empty_texts(tmp_path):
    lines = '{"key": "a", "ids": [1, 2]}\n\n{"key": "b", "text": ""}\r\n{"key": "c", "ids": []}'
    (tmp_path / "q.jsonl").write_text(lines)
    assert read_queries(tmp_path / "q.jsonl") == {"a": (1, 2), "b": (), "c": ()}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "is not valid JSON"),
        ("[1]", 'must be an object with a string "key"'),
        ('{"key": 1, "ids": []}', 'must be an object with a string "key"'),
        ('{"key": "b"}', 'must have either "text" or "ids"'),
        ('{"key": "b", "text": "", "ids": []}', 'must have either "text" or "ids"'),
        ('{"key": "b", "text": 1}', '"text" must be a string'),
        ('{"key": "b", "text": "a red car"}', "this version has no tokenizer for texts; give token ids instead"),
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
