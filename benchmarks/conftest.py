"""How the benchmarks measure: two sides in turn, correctness first, medians, and a record of the machine."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch

# A side is timed for at least so long or so often, and never fewer than three times.
MIN_SECONDS, MAX_ROUNDS, MIN_ROUNDS = 2.0, 20, 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that say where the benchmarks run."""
    group = parser.getgroup("dove_fast benchmarks")
    group.addoption("--device", default="cpu", help="device to measure on, such as cpu or cuda (default: cpu)")
    group.addoption("--batch", type=int, default=None, help="images in a batch (default: 2 on a CPU, 32 on a GPU)")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device to measure on."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def batch(request: pytest.FixtureRequest, device: torch.device) -> int:
    """Return the number of images in a batch."""
    return request.config.getoption("--batch") or (2 if device.type == "cpu" else 32)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Record what decides the figures beside the processor: versions, threads and the device."""
    packages = ("dove-fast", "torch", "diffusers", "transformers", "numpy")
    machine_info.clear()
    machine_info.update(
        {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in packages},
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "device": _device_name(torch.device(config.getoption("--device"))),
        }
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


Compare = Callable[..., None]

# One line a comparison, printed behind pytest-benchmark's own table, which knows nothing of rivals.
_COMPARISONS: list[str] = []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print every comparison's medians and their ratio."""
    if _COMPARISONS:
        terminalreporter.section("ours against the rival, medians of runs in turn")
        for line in _COMPARISONS:
            terminalreporter.write_line(line)


@pytest.fixture
def compare(benchmark: Any, device: torch.device, batch: int) -> Compare:
    """Return a function that times `ours` against `rival` in turn: A B A B.

    It fills `extra_info` with both medians in images a second and their ratio (above 1: ours is faster).
    Call it once the results were compared: a figure for a wrong result is worth nothing.
    """

    def timed(function: Callable[[], Any]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def run(ours: Callable[[], Any], rival: Callable[[], Any], *, rival_name: str, **info: Any) -> None:
        timed(rival)
        slower = max(timed(ours), timed(rival))
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(MIN_SECONDS / slower)))
        ours_seconds: list[float] = []
        rival_seconds: list[float] = []
        benchmark.pedantic(
            lambda: ours_seconds.append(timed(ours)),
            setup=lambda: rival_seconds.append(timed(rival)),
            rounds=rounds,
        )
        ours_median, rival_median = statistics.median(ours_seconds), statistics.median(rival_seconds)
        benchmark.extra_info.update(
            {
                "rival": rival_name,
                "batch": batch,
                "device": _device_name(device),
                "images_per_second": batch / ours_median,
                "rival_images_per_second": batch / rival_median,
                "ratio": rival_median / ours_median,
                **info,
            }
        )
        _COMPARISONS.append(
            f"{benchmark.name:32} {batch / ours_median:10.2f} images/s   {rival_name}: {batch / rival_median:10.2f}"
            f"   ratio {rival_median / ours_median:.2f}"
        )

    return run
