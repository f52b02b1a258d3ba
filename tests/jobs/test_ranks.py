"""Which process of many this is, and one a device."""

from __future__ import annotations

import pytest

from dove_fast.jobs.ranks import Rank, rank_from

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Rank(3, 8, 1, "torchrun")),
        (SLURM, Rank(5, 16, 2, "Slurm")),
        # torchrun within a Slurm step: the inner one counts.
        ({**SLURM, **TORCHRUN}, Rank(3, 8, 1, "torchrun")),
        # A batch script is no step, and not one of the job's tasks.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, None),
        # Variables of the same names that somebody else set.
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, None),
    ],
)
def test_what_started_this_process(environment, expected):
    assert rank_from(environment) == expected


def test_variables_that_are_no_numbers():
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, LOCAL_RANK must be numbers, set by torchrun"):
        rank_from({**TORCHRUN, "RANK": "first"})
