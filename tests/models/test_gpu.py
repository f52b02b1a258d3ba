"""The oracle on a GPU against the same model on the CPU."""

from __future__ import annotations

import pytest
import torch
from small_models import NUM_TOKENS, micro_model, sample_images
from tolerances import RELATIVE, assert_close

from dove_fast.models import dove

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_precision():
    """Without TF32, which torch allows in convolutions by default and which keeps three digits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def models(request):
    return micro_model().to(request.param), micro_model().to("cuda", request.param)


def test_same_tokens_and_pictures(models):
    on_cpu, on_gpu = models
    images = sample_images(5)
    queries = [None, torch.tensor([1, 2, 3]), torch.tensor([4], device="cuda"), None, None]
    expected = on_cpu.tokenize(images, queries, length=NUM_TOKENS)
    tokens = on_gpu.tokenize(images.cuda(), queries, length=NUM_TOKENS)
    assert tokens.values.device.type == "cuda"
    assert_close(tokens.values.cpu(), expected.values)
    pictures = on_gpu.decode(tokens)
    assert pictures.device.type == "cuda"
    if on_cpu.dtype == torch.float64:
        assert_close(pictures.cpu(), on_cpu.decode(tokens.to("cpu")), RELATIVE[torch.float64])


def test_lengths_and_chunks(monkeypatch):
    model, images = micro_model().cuda(), sample_images(9).cuda()
    expected = model.tokenize(images)
    monkeypatch.setattr(dove, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    assert model.tokenize(images).lengths.tolist() == expected.lengths.tolist()


def test_nonfinite_rows_of_several_chunks_are_named(monkeypatch):
    monkeypatch.setattr(dove, "CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    model, images = micro_model().cuda(), sample_images(5).cuda()
    images[1, 0, 0, 0], images[3, 0, 0, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="got NaN or infinity in rows 1, 3"):
        model.tokenize(images)
    tokens = model.tokenize(sample_images(2).cuda(), length=2)
    tokens.values[2] = float("nan")
    with pytest.raises(ValueError, match="tokens must be finite, got NaN or infinity in row 1"):
        model.decode(tokens)


def test_images_on_another_device():
    with pytest.raises(ValueError, match="must be on the model's device cuda:0, got cpu"):
        micro_model().cuda().tokenize(sample_images(1))
