"""What every test needs: the GPU marker, Triton's interpreter, poisoned memory, a broken-torchvision guard."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from dove_fast import native
from dove_fast.ops import launch

# Where there is no GPU, Triton kernels run in the interpreter; triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# torch fills what `empty` and its kin return with NaN, or the largest integer, so that a kernel that leaves an element
# unwritten is found. The warnings that go with it are about operators that are not deterministic on a GPU.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

# Before any test imports transformers, diffusers or lpips, and not earlier: torchvision imports triton.
importlib.import_module("torchvision_guard")


@pytest.fixture(autouse=True, scope="session")
def outside_the_source_tree(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Work elsewhere: `python -c` and `-m` look into the working directory first and would find the sources there."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, visibly, what this machine cannot run."""
    for item in items:
        reason = _why_not(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not(item: pytest.Item) -> str | None:
    """Why a test cannot run here: by its `gpu` mark and its parameters `backend` and `device`."""
    on_gpu = "gpu" in item.keywords
    if on_gpu and not torch.cuda.is_available():
        return "needs a CUDA device; torch.cuda.is_available() is False"
    callspec = getattr(item, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend == "cuda":
        return native.why_no_cuda()
    if backend == "triton":
        return launch.why_no_triton() or (None if on_gpu or launch.interpreted() else "Triton is not interpreted here")
    return None
