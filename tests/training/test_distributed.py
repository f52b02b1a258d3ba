"""Two processes agree on the threshold, and it is that of one process with the whole batch."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from dove_fast.losses import RunningThreshold
from dove_fast.training import mean_over_ranks

RANK = """
import json, sys
import torch
import torch.distributed as dist
from dove_fast.losses import RunningThreshold
from dove_fast.training import mean_over_ranks

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
threshold = RunningThreshold(window=3)
values = []
for step in range(5):
    errors = torch.rand(7, generator=torch.Generator().manual_seed(step))
    # Unequal shares of the batch.
    threshold.update(mean_over_ranks(errors[:5] if rank == 0 else errors[5:]))
    values.append(threshold.value)
dist.destroy_process_group()
print(json.dumps(values))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_the_threshold_is_the_same_on_all_ranks(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    first, second = (json.loads(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert first == second
    alone = RunningThreshold(window=3)
    for step, value in enumerate(first):
        alone.update(mean_over_ranks(torch.rand(7, generator=torch.Generator().manual_seed(step))))
        assert value == pytest.approx(alone.value, rel=1e-12)


def test_one_process():
    assert mean_over_ranks(torch.tensor([1.0, 2.0, 6.0], dtype=torch.bfloat16)) == 3.0
    assert mean_over_ranks(torch.tensor([1.0, float("nan"), 3.0])) == 2.0
    assert math.isnan(mean_over_ranks(torch.zeros(0)))
    assert math.isinf(mean_over_ranks(torch.tensor([1.0, float("inf")])))
