"""The queries file of Q-DOVE: one JSON object a line with an input's key, and its text or its token ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dove_fast.config import DOVEConfig
from dove_fast.models.inputs import check_queries
from dove_fast.text import TOKENIZER_NAME, TextTokenizer

__all__ = ["check_against", "encode_texts", "hash_queries", "read_queries"]

# How many keys an error message spells out.
MAX_KEYS_NAMED = 5

Ids = tuple[int, ...]


def read_queries(path: str | os.PathLike[str]) -> dict[str, Ids | str]:
    """Read `{"key": .., "ids": [..]}` or `{"key": .., "text": ".."}` a line; blank lines are skipped.

    Returns token ids or a text by key; an empty text is no ids, which means no query.
    Raises `FileNotFoundError` for no such file; `ValueError` that names the line for anything else that is wrong.
    """
    queries: dict[str, Ids | str] = {}
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such queries file: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, query = _parse(line, f"{path} line {number}")
        if key in queries:
            raise ValueError(f"{path} line {number}: key {key!r} comes more than once")
        queries[key] = query
    return queries


def _parse(line: str, where: str) -> tuple[str, Ids | str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        raise ValueError(f'{where} must be an object with a string "key", and "text" or "ids"')
    if ("text" in entry) == ("ids" in entry):
        raise ValueError(f'{where} must have either "text" or "ids"')
    if "text" in entry:
        if not isinstance(entry["text"], str):
            raise ValueError(f'{where}: "text" must be a string')
        return entry["key"], entry["text"] or ()
    ids = entry["ids"]
    if not isinstance(ids, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise ValueError(f'{where}: "ids" must be a list of integers')
    return entry["key"], tuple(ids)


def encode_texts(queries: Mapping[str, Ids | str], tokenizer: TextTokenizer | None) -> dict[str, Ids]:
    """Return the queries with every text as the tokenizer's ids.

    Raises `ValueError` that names the key where there is no tokenizer or it cannot encode the text, and what else
    `TextTokenizer.encode` raises.
    """
    encoded: dict[str, Ids] = {}
    for key, query in queries.items():
        if not isinstance(query, str):
            encoded[key] = query
            continue
        if tokenizer is None:
            raise ValueError(
                f"the query of {key!r} is text, but this model has no tokenizer; give token ids instead, as "
                f'"ids": [..], or put a {TOKENIZER_NAME} into the checkpoint'
            )
        try:
            encoded[key] = tuple(tokenizer.encode(query).tolist())
        except ValueError as error:
            raise ValueError(f"the query of {key!r} is no text for the model: {error}") from error
    return encoded


def check_against(queries: Mapping[str, Ids], keys: Iterable[str] | None, config: DOVEConfig) -> None:
    """Raise `ValueError` for a query whose key is no input's, or whose ids do not fit the model.

    `keys` None: which inputs there are is not known.
    """
    known = set(queries if keys is None else keys)
    unknown = [key for key in queries if key not in known]
    if unknown:
        more = f" and {len(unknown) - MAX_KEYS_NAMED} more" if len(unknown) > MAX_KEYS_NAMED else ""
        raise ValueError(
            f"the queries name keys that are not among the inputs: "
            f"{', '.join(map(repr, unknown[:MAX_KEYS_NAMED]))}{more}"
        )
    for key, ids in queries.items():
        try:
            check_queries([torch.tensor(ids, dtype=torch.int64)], 1, config)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the query of {key!r} does not fit the model: {error}") from None


def hash_queries(queries: Mapping[str, Ids]) -> str | None:
    """Return the SHA-256, in hexadecimal, over the queries that are not empty; None if there are none."""
    real = sorted((key, list(ids)) for key, ids in queries.items() if ids)
    if not real:
        return None
    return hashlib.sha256(json.dumps(real).encode()).hexdigest()
