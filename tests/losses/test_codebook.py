"""The codebook's terms: their values, and each one's gradient on its own side."""

from __future__ import annotations

import pytest
import torch
from tolerances import RELATIVE, assert_close

from dove_fast.losses import codebook_terms

BATCH, WIDTH, HEIGHT, COLUMNS, CODEWORDS = 2, 3, 4, 5, 7


@pytest.fixture
def problem():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, WIDTH, HEIGHT, COLUMNS, generator=random, dtype=torch.float64).requires_grad_()
    codebook = torch.randn(CODEWORDS, WIDTH, generator=random, dtype=torch.float64).requires_grad_()
    # The last codeword is used by none.
    codes = torch.randint(0, CODEWORDS - 1, (BATCH, HEIGHT, COLUMNS), generator=random)
    return features, codes, codebook


def differences(features, codes, codebook):
    """Codeword less feature at every place, one by one."""
    for image in range(BATCH):
        for y in range(HEIGHT):
            for x in range(COLUMNS):
                code = int(codes[image, y, x])
                yield (image, y, x), code, (codebook[code] - features[image, :, y, x]).detach()


def test_values_are_the_mean_squared_distance(problem):
    expected = torch.cat([difference for _, _, difference in differences(*problem)]).square().mean()
    of_codebook, of_commitment = codebook_terms(*problem)
    assert of_codebook.shape == of_commitment.shape == ()
    assert_close(of_codebook.detach(), expected, RELATIVE[torch.float64])
    assert_close(of_commitment.detach(), expected, RELATIVE[torch.float64])


def test_each_gradient_goes_to_one_side(problem):
    features, _, codebook = problem
    count = features.numel()
    to_codebook, to_features = torch.zeros_like(codebook), torch.zeros_like(features)
    for (image, y, x), code, difference in differences(*problem):
        to_codebook[code] += 2 * difference / count
        to_features[image, :, y, x] -= 2 * difference / count
    of_codebook, of_commitment = codebook_terms(*problem)
    of_codebook.backward()
    assert features.grad is None
    assert_close(codebook.grad, to_codebook, RELATIVE[torch.float64])
    assert not codebook.grad[-1].any() and codebook.grad[:-1].any()
    codebook.grad = None
    of_commitment.backward()
    assert codebook.grad is None
    assert_close(features.grad, to_features, RELATIVE[torch.float64])


def test_features_on_their_codewords_cost_nothing(problem):
    _, codes, codebook = problem
    features = codebook.detach()[codes].movedim(-1, 1)
    assert [term.item() for term in codebook_terms(features, codes, codebook)] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_fp32(problem, dtype):
    features, codes, codebook = problem
    features, codebook = (tensor.detach().to(dtype).requires_grad_() for tensor in (features, codebook))
    terms = codebook_terms(features, codes, codebook)
    wanted = codebook_terms(features.detach().double(), codes, codebook.detach().double())
    for term, other in zip(terms, wanted, strict=True):
        assert term.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # The rounding is that of the inputs alone.
        assert_close(term.detach().double(), other.detach(), RELATIVE[torch.float32])
    sum(terms).backward()
    assert features.grad.dtype == codebook.grad.dtype == dtype


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_any_memory_layout(problem, layout):
    features, codes, codebook = problem
    expected = codebook_terms(features.detach(), codes, codebook.detach())
    found = codebook_terms(features.detach().to(memory_format=layout), codes, codebook.detach())
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine, other, RELATIVE[torch.float64])


def test_shapes_that_do_not_fit(problem):
    features, codes, codebook = (tensor.detach() for tensor in problem)
    for wrong_features, wrong_codebook in (
        (features[0], codebook),
        (features, codebook[:, :2]),
        (features, codebook[None]),
        (features.transpose(1, 3), codebook),
    ):
        with pytest.raises(ValueError, match=r"features must be \(B, C, h, w\) and codebook \(K, C\), got") as caught:
            codebook_terms(wrong_features, codes, wrong_codebook)
        for tensor in (wrong_features, wrong_codebook):
            assert str(tuple(tensor.shape)) in str(caught.value)
    for wrong in (codes[0], codes.flatten(1), codes[:, :, :-1], codes.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"codes must have shape \(B, h, w\) of .*, got") as caught:
            codebook_terms(features, wrong, codebook)
        assert str(caught.value).endswith(f"got {tuple(wrong.shape)}")
