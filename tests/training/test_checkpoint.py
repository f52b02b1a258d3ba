"""A run's checkpoints: whole or not at all wherever the process dies, and every bit as it was."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from kill_switch import KilledError, KillSwitch, contents
from small_models import micro_config, micro_model

from dove_fast import DOVE
from dove_fast.atomic import is_temporary
from dove_fast.errors import CheckpointError
from dove_fast.training.checkpoint import (
    RunState,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    remove_unfinished,
    write_checkpoint,
)
from dove_fast.training.config import OptimizerConfig
from dove_fast.training.optimization import make_optimizer


class EveryOperation(KillSwitch):
    """Of renames and removals of directories too."""

    def arm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().arm(monkeypatch)
        for name in ("rename", "rmdir"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))


@pytest.fixture(scope="module")
def model() -> DOVE:
    torch.manual_seed(0)
    return DOVE(micro_config())


def averaged_of(model: DOVE) -> DOVE:
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        averaged.out_proj.bias.add_(1)
    return averaged


def write(output: Path, model: DOVE, step: int, keep: int = 2) -> Path:
    """Write a checkpoint whose every part tells its step."""
    with torch.no_grad():
        model.out_proj.bias.fill_(step)
    tensors = {"optimizer.exp_avg.a": torch.full((2, 2), float(step)), "codebook_counts": torch.arange(step)}
    state = RunState(step, skipped=1, samples=12, threshold={"window": 3, "errors": [0.1]}, left_out={"why": step})
    return write_checkpoint(output, model, averaged_of(model), tensors, state, keep=keep)


def assert_is_step(directory: Path, step: int) -> None:
    assert directory.name == f"step-{step:09d}"
    tensors, state = read_checkpoint(directory)
    assert torch.equal(tensors["optimizer.exp_avg.a"], torch.full((2, 2), float(step)))
    assert torch.equal(tensors["codebook_counts"], torch.arange(step))
    expected = RunState(step, skipped=1, samples=12, threshold={"window": 3, "errors": [0.1]}, left_out={"why": step})
    assert state == expected
    for name, value in (("model", step), ("ema", step + 1)):
        assert DOVE.from_pretrained(directory / name).out_proj.bias.unique().tolist() == [value]


def steps_in(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((output / "checkpoints").glob("step-*"))]


def temporaries_in(output: Path) -> list[str]:
    return [path.name for path in (output / "checkpoints").iterdir() if is_temporary(path.name)]


def test_there_and_back(tmp_path, model):
    assert latest_checkpoint(tmp_path) is None
    remove_unfinished(tmp_path)
    assert write(tmp_path, model, 5) == latest_checkpoint(tmp_path)
    assert_is_step(latest_checkpoint(tmp_path), 5)
    names = {"training.safetensors", "state.json"} | {
        f"{part}/{file}" for part in ("model", "ema") for file in ("config.json", "model.safetensors")
    }
    assert contents(latest_checkpoint(tmp_path)).keys() == names


def test_no_averaged_weights(tmp_path, model):
    directory = write_checkpoint(tmp_path, model, None, {}, RunState(1), keep=1)
    assert not (directory / "ema").exists()
    assert read_checkpoint(directory) == ({}, RunState(1))


def test_the_last_ones_are_kept(tmp_path, model):
    for step in (1, 2, 9, 10):
        write(tmp_path, model, step, keep=3)
        assert_is_step(latest_checkpoint(tmp_path), step)
    assert steps_in(tmp_path) == [2, 9, 10]
    write(tmp_path, model, 11, keep=1)
    assert steps_in(tmp_path) == [11]


def test_more_steps_than_digits(tmp_path, model):
    for step in (999_999_999, 1_000_000_000):
        write_checkpoint(tmp_path, model, None, {}, RunState(step), keep=2)
    assert latest_checkpoint(tmp_path).name == "step-1000000000"
    write_checkpoint(tmp_path, model, None, {}, RunState(1_000_000_001), keep=2)
    assert steps_in(tmp_path) == [1_000_000_000, 1_000_000_001]


def test_what_is_no_checkpoint_is_left_alone(tmp_path, model):
    root = tmp_path / "checkpoints"
    for name in ("step-12", "step-000000009-mine", "best", "notes.txt"):
        (root / name).mkdir(parents=True)
    for step in (1, 2):
        write(tmp_path, model, step, keep=1)
    remove_unfinished(tmp_path)
    names = sorted(path.name for path in root.iterdir())
    assert names == ["best", "notes.txt", "step-000000002", "step-000000009-mine", "step-12"]
    assert latest_checkpoint(tmp_path).name == "step-000000002"


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path, model):
    before = contents(write(tmp_path, model, 4))
    with torch.no_grad():
        model.out_proj.bias.fill_(-1)
    directory = write_checkpoint(tmp_path, model, None, {}, RunState(4), keep=2)
    assert contents(directory) == before


@pytest.fixture(scope="module")
def two(tmp_path_factory, model):
    """Checkpoints of steps 1 and 2, and how many disk operations it takes to write step 3 and to remove step 1."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        write(folder / "two", model, step)
    shutil.copytree(folder / "two", folder / "counted")
    counting = EveryOperation(None)
    with pytest.MonkeyPatch.context() as patch:
        counting.arm(patch)
        third = write(folder / "counted", model, 3)
    assert steps_in(folder / "counted") == [2, 3]
    assert_is_step(third, 3)
    return folder / "two", contents(third), counting.count


# A process may die before the operation takes effect, and behind it.
@pytest.mark.parametrize("after", [False, True])
def test_dying_at_every_disk_operation(two, tmp_path, model, after):
    start, third, operations = two
    earlier = contents(start)
    assert operations > 30
    found = []
    for at in range(1, operations + 1):
        output = tmp_path / str(at)
        shutil.copytree(start, output)
        with pytest.MonkeyPatch.context() as patch:
            EveryOperation(at, after).arm(patch)
            with pytest.raises(KilledError):
                write(output, model, 3)
        latest = latest_checkpoint(output)
        found.append(int(latest.name.removeprefix("step-")))
        assert found[-1] in (2, 3)
        # What the dead process left half is gone when the run goes on.
        remove_unfinished(output)
        assert temporaries_in(output) == []
        if found[-1] == 2:
            assert contents(output) == earlier
        else:
            assert contents(latest) == third
            unharmed = {name: content for name, content in earlier.items() if "step-000000002" in name}
            assert contents(output).items() >= unharmed.items()
    # First always the earlier one, from the rename on always the new one.
    assert found == sorted(found) and set(found) == {2, 3}
    for at in (1, operations):
        write(tmp_path / str(at), model, 4)
        assert_is_step(latest_checkpoint(tmp_path / str(at)), 4)
    # What was half removed is removed now.
    assert steps_in(tmp_path / str(operations)) == [3, 4]


def test_the_new_one_is_on_the_disk_before_an_old_one_goes(two, tmp_path, model, monkeypatch):
    """A kill loses nothing that was renamed, a power failure does until the directory is synced."""
    shutil.copytree(two[0], tmp_path / "run")
    done = []

    def recorded(name):
        operation = getattr(os, name)

        def call(*arguments, **options):
            done.append(name)
            return operation(*arguments, **options)

        return call

    for name in ("fsync", "rename", "rmdir"):
        monkeypatch.setattr(os, name, recorded(name))
    write(tmp_path / "run", model, 3)
    renamed = done.index("rename")
    assert "rmdir" not in done[:renamed] and "fsync" in done[renamed : done.index("rmdir")]


def test_a_failure_leaves_no_half_checkpoint(two, tmp_path, model, monkeypatch):
    shutil.copytree(two[0], tmp_path / "run")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "run", model, 3)
    assert steps_in(tmp_path / "run") == [1, 2] and temporaries_in(tmp_path / "run") == []


def test_a_half_checkpoint_is_not_taken_and_removed(two, tmp_path, model):
    output = tmp_path / "run"
    shutil.copytree(two[0], output)
    half = output / "checkpoints/.dove-0123456789abcdef.tmp"
    shutil.copytree(output / "checkpoints/step-000000002", half)
    (half / "state.json").unlink()
    assert latest_checkpoint(output).name == "step-000000002"
    remove_unfinished(output)
    assert not half.exists() and steps_in(output) == [1, 2]


@pytest.mark.parametrize("name", ["state.json", "training.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
def test_damaged_files_are_named(two, tmp_path, name, damage):
    directory = tmp_path / "step-000000002"
    shutil.copytree(two[0] / "checkpoints/step-000000002", directory)
    file = directory / name
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "other": b"[1, 2]\xff"}[damage])
    with pytest.raises(CheckpointError, match=f"{directory} is damaged .*remove it to go on from the checkpoint befo"):
        read_checkpoint(directory)


@pytest.mark.parametrize("part", ["model", "ema"])
def test_damaged_weights_are_noticed(two, tmp_path, part):
    directory = tmp_path / "step-000000002"
    shutil.copytree(two[0] / "checkpoints/step-000000002", directory)
    file = directory / part / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        DOVE.from_pretrained(directory / part)


@pytest.mark.parametrize("change", [{"colour": "red"}, {"format_version": 99}, {"format_version": None}])
def test_a_state_of_another_format(two, tmp_path, change):
    directory = tmp_path / "step-000000002"
    shutil.copytree(two[0] / "checkpoints/step-000000002", directory)
    values = json.loads((directory / "state.json").read_text()) | change
    (directory / "state.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="has format version" if "format_version" in change else "is damaged"):
        read_checkpoint(directory)


# Moments


def trained(model: DOVE, steps: int):
    """Return an optimiser of all of a model's weights after `steps`, with their names."""
    named = list(model.named_parameters())
    optimizer = make_optimizer(named, OptimizerConfig(), 1e-3)
    for step in range(steps):
        take_step(named, optimizer, step)
    return named, optimizer


def take_step(named, optimizer, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=random))
    optimizer.step()


def test_moments_are_the_same_bits(tmp_path):
    model = micro_model()
    named, optimizer = trained(model, 3)
    kernels = [parameter for _, parameter in named if parameter.dim() == 4 and not parameter.is_contiguous()]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    tensors = optimizer_tensors(optimizer, named, "optimizer")
    assert len(tensors) == 3 * len(named)
    directory = write_checkpoint(tmp_path, model, None, tensors, RunState(3), keep=1)

    again = DOVE.from_pretrained(directory / "model")
    named_again, fresh = trained(again, 0)
    load_optimizer(fresh, named_again, "optimizer", read_checkpoint(directory)[0])
    for (name, old), (_, new) in zip(named, named_again, strict=True):
        was, found = optimizer.state[old], fresh.state[new]
        assert was.keys() == found.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in was:
            assert torch.equal(was[key], found[key]) and was[key].dtype == found[key].dtype, (name, key)
        # In the parameter's memory layout, which the kernels' speed hangs on.
        assert found["exp_avg"].stride() == new.stride() == old.stride(), name
    for step in (3, 4):
        take_step(named, optimizer, step)
        take_step(named_again, fresh, step)
    for (name, old), (_, new) in zip(named, named_again, strict=True):
        assert torch.equal(old, new), name


def test_moments_do_not_share_memory_with_the_file(tmp_path, model):
    named, optimizer = trained(copy.deepcopy(model), 1)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer, named, "judge").items()}
    fresh = make_optimizer(named, OptimizerConfig(), 1e-3)
    load_optimizer(fresh, named, "judge", tensors)
    for value in tensors.values():
        value.fill_(-7)
    for _, parameter in named:
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize(("prefix", "steps"), [("optimizer", 1), ("judge", 2)])
def test_two_optimisers_in_one_file(model, prefix, steps):
    left, right = trained(copy.deepcopy(model), 1), trained(copy.deepcopy(model), 2)
    tensors = optimizer_tensors(left[1], left[0], "optimizer") | optimizer_tensors(right[1], right[0], "judge")
    named, optimizer = left if prefix == "optimizer" else right
    fresh = make_optimizer(named, OptimizerConfig(), 1e-3)
    load_optimizer(fresh, named, prefix, tensors)
    for _, parameter in named:
        assert fresh.state[parameter]["step"] == steps
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_an_optimiser_that_did_no_step(model):
    named, optimizer = trained(copy.deepcopy(model), 0)
    assert optimizer_tensors(optimizer, named, "optimizer") == {}
    load_optimizer(optimizer, named, "optimizer", {"judge.step.x": torch.ones(())})
    assert not any(optimizer.state[parameter] for _, parameter in named)
    take_step(named, optimizer, 0)
