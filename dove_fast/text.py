"""Texts to token ids, by the file that Hugging Face's `tokenizers` library writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dove_fast.atomic import replacing
from dove_fast.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TOKENIZER_NAME", "TextTokenizer"]

TOKENIZER_NAME = "tokenizer.json"


class TextTokenizer:
    """The tokenizer of a `tokenizer.json`, which turns the texts of Q-DOVE's queries into the generator's token ids.

    The file is read at once, and the `tokenizers` library imported when a text is first encoded: a model that gets
    token ids needs no such library. Copies and pickles hold the file's text.
    Raises `FileNotFoundError` for no such file, `CheckpointError` for one that is not JSON; what only the library can
    tell, when it is first used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._source = str(path)
        self._parsed: Tokenizer | None = None
        try:
            self._json = Path(path).read_bytes().decode()
            data = json.loads(self._json)
        except FileNotFoundError:
            raise FileNotFoundError(f"no tokenizer file at {path}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, 1-D int64 on the CPU; nothing is added, padded or cut off.

        Raises `TypeError` for what is no string, `ValueError` for a text that the tokenizer cannot encode,
        `ImportError` without the `tokenizers` library, `CheckpointError` for a file that it cannot read.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if not text:
            return torch.empty(0, dtype=torch.int64)
        tokenizer = self._tokenizer()
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:
            # The library raises bare Exceptions, such as for an unknown word where there is no token for those.
            raise ValueError(f"{self._source} cannot encode {text!r}: {error}") from error
        return torch.tensor(ids, dtype=torch.int64)

    @property
    def vocab_size(self) -> int:
        """How many ids an embedding needs: the largest one of all tokens, plus 1; an id in between may be free.

        Raises `ImportError` and `CheckpointError` as `encode`.
        """
        return max(self._tokenizer().get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def to_json(self) -> str:
        """Return the text of the file."""
        return self._json

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file again, by temporary file and rename."""
        with replacing(Path(path)) as file:
            file.write(self._json.encode())

    def _tokenizer(self) -> Tokenizer:
        if self._parsed is None:
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise ImportError(
                    f"texts need the tokenizers library, which cannot be imported ({error}); "
                    "pip install 'dove-fast[text]', or give token ids"
                ) from error
            try:
                parsed = Tokenizer.from_str(self._json)
            except Exception as error:
                # The library raises bare Exceptions.
                raise CheckpointError(f"{self._source} is no file of the tokenizers library: {error}") from error
            parsed.no_padding()
            parsed.no_truncation()
            self._parsed = parsed
        return self._parsed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parsed": None}
