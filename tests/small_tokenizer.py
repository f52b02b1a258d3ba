"""A small `tokenizer.json`: a few words, a number each."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

WORDS = {"[UNK]": 0, "[BOS]": 1, "a": 2, "red": 3, "cat": 4, "zebra": 100}


def write_tokenizer(path: Path, *, unknown: str | None = "[UNK]") -> Path:
    """Write a tokenizer that would start every text with [BOS], pad it to 8 ids and cut it behind 2."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, **({} if unknown is None else {"unk_token": unknown})))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[BOS] $A", special_tokens=[("[BOS]", WORDS["[BOS]"])])
    tokenizer.add_special_tokens([AddedToken("[BOS]")])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path
