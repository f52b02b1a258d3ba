"""What --dry-run says: a rate that the job reaches, and the figures of what was tried."""

from __future__ import annotations

import time

import pytest

from dove_fast.jobs import TokenizeOptions
from dove_fast.jobs import estimate as module
from dove_fast.jobs.estimate import estimate

SECONDS = 0.02


@pytest.mark.parametrize("batch_size", [2, 3, 32])
def test_the_rate_counts_all_of_an_images_work(tmp_path, photos, loaded, monkeypatch, batch_size):
    def slow(content, transform, load_image=module.load_image):
        time.sleep(SECONDS)
        return load_image(content, transform)

    monkeypatch.setattr(module, "load_image", slow)
    found = estimate(photos, tmp_path / "s", loaded, TokenizeOptions(batch_size=batch_size, length=3))
    # Tokens come in input order, many at a time: between two of them there may be no time at all.
    assert 0 < found.images_per_second < 1 / SECONDS
    assert (found.failed, found.mean_tokens) == (0, 3)
    assert found.tried == min(3 * batch_size, found.inputs)
    assert not (tmp_path / "s").exists()
