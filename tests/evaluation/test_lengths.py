"""One tokenization at full length gives every other one: tokens are causal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import NUM_TOKENS, micro_model, sample_images
from tolerances import EOS_LOGIT_MARGIN, RELATIVE, relative_error

from dove_fast.evaluation.lengths import check_lengths, default_lengths, eos_prefixes, prefixes, summarize_lengths


def test_default_lengths():
    assert default_lengths(256) == (32, 64, 96, 128, 160, 192, 224, 256)
    assert default_lengths(64) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert default_lengths(3) == (1, 2, 3)
    assert default_lengths(1) == (1,)


def test_check_lengths():
    assert check_lengths([8, 2, 8], 16) == (2, 8)
    with pytest.raises(ValueError, match="at least one token count"):
        check_lengths([], 16)
    for length in (0, 17):
        with pytest.raises(ValueError, match=f"from 1 to this model's 16, got {length}"):
            check_lengths([4, length], 16)


@pytest.mark.parametrize("queries", [None, [torch.tensor([1, 2]), None] * 8])
def test_prefixes_are_the_tokens_of_that_length(queries):
    model, images = micro_model(), sample_images(16)
    tokens, _ = model.tokenize(images, queries, length=NUM_TOKENS).to_padded()
    for length in (1, 2, 7, NUM_TOKENS):
        expected = model.tokenize(images, queries, length=length)
        found = prefixes(tokens, length)
        assert found.host_lengths == expected.host_lengths
        assert relative_error(found.values, expected.values) < RELATIVE[torch.float32]


@pytest.mark.parametrize("threshold", [0.5, 0.48])
@pytest.mark.parametrize("queries", [None, [torch.tensor([3]), torch.tensor([1, 2, 4])] * 24])
def test_adaptive_lengths_are_those_of_tokenize(threshold, queries):
    model, images = micro_model(), sample_images(48)
    tokens, _ = model.tokenize(images, queries, length=NUM_TOKENS).to_padded()
    expected = model.tokenize(images, queries, eos_threshold=threshold)
    found = eos_prefixes(model, tokens, threshold)
    limit = torch.tensor(threshold).logit()
    near = (model.eos_logits(tokens) - limit).abs().min(dim=1).values < EOS_LOGIT_MARGIN
    rows = (~near).nonzero().flatten().tolist()
    assert len(rows) > 40 and len(set(expected.host_lengths)) > 2, "lengths differ, and few are undecided"
    for row in rows:
        assert found.host_lengths[row] == expected.host_lengths[row]
        assert relative_error(found[row], expected[row]) < RELATIVE[torch.float32]


def test_summary():
    lengths = torch.tensor([1, 1, 2, 5, 8, 8, 8, 3, 1, 7])
    found = summarize_lengths(lengths, 8)
    assert found.mean == pytest.approx(4.4)
    assert found.histogram == (3, 1, 1, 0, 1, 0, 1, 3) and found.num_tokens == 8
    expected = np.percentile(lengths.numpy(), [5, 25, 50, 75, 95], method="nearest")
    assert found.percentiles == dict(zip((5, 25, 50, 75, 95), expected.tolist(), strict=True))
    assert summarize_lengths(torch.tensor([4]), 4).percentiles[50] == 4
