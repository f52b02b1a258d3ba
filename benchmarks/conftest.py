"""How the benchmarks measure: two sides in turn, correctness first, medians, and a record of the machine."""

from __future__ import annotations

import ctypes
import gc
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
import torchvision_guard  # noqa: F401  # before diffusers and transformers

import dove_fast
from dove_fast.generation.linear import PackedLinears

# A side is timed for at least so long or so often, and never fewer than three times.
MIN_SECONDS, MAX_ROUNDS, MIN_ROUNDS = 2.0, 20, 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that say where the benchmarks run."""
    group = parser.getgroup("dove_fast benchmarks")
    group.addoption("--device", default="cpu", help="device to measure on, such as cpu or cuda (default: cpu)")
    group.addoption("--batch", type=int, default=None, help="images in a batch (default: 2 on a CPU, 32 on a GPU)")
    group.addoption("--threads", type=int, default=None, help="threads of torch and of our kernels (default: torch's)")
    group.addoption("--seconds", type=float, default=None, help="time a side for so long (default: 2)")
    group.addoption("--cuda-graphs", action="store_true", help="let the engine replay CUDA graphs (bench_generator.py)")
    group.addoption("--quick", action="store_true", help="small sizes, few rounds: shows that everything runs")


def pytest_configure(config: pytest.Config) -> None:
    """Set the number of threads, and shorten the measurement where that was asked for."""
    global MIN_SECONDS, MIN_ROUNDS
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--seconds"):
        MIN_SECONDS = config.getoption("--seconds")
    if config.getoption("--quick"):
        MIN_SECONDS, MIN_ROUNDS = 0.1, 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `large`, visibly, where --quick was asked for."""
    if config.getoption("--quick"):
        for item in items:
            if "large" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="large; --quick leaves it out"))


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
    packages = ("torch", "triton", "diffusers", "transformers", "numpy")
    machine_info.clear()
    machine_info.update(
        {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
            "dove_fast": dove_fast.__version__,
            "versions": {name: _version(name) for name in packages},
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "device": _device_name(torch.device(config.getoption("--device"))),
        }
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the processor's name, and its numbers, which tell its generation where the name does not."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = file.read().partition("\n\n")[0]
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = ", ".join(f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields)
    return f"{fields['model name']} ({numbers})" if "model name" in fields else platform.processor()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


Compare = Callable[..., None]

# One line a comparison, printed behind pytest-benchmark's own table, which knows nothing of rivals.
_COMPARISONS: list[str] = []

# Ours and the rival's seconds of the stages that a benchmark named, for Amdahl's table.
_STAGES: dict[str, tuple[float, float]] = {}
# What a job runs one after the other.
_JOBS = {"tokenize": ("encoder", "generator"), "decode": ("token decoder", "quantizer", "decoder")}


def _amdahl(stages: dict[str, tuple[float, float]]) -> list[str]:
    """Return, for every job whose stages were all measured, each stage's share and what it could still give.

    "if free" is the job's speed-up were the stage to cost nothing: 1 / (1 - its share), which is all that work on it
    can bring.
    """
    lines = []
    for job, parts in _JOBS.items():
        if not all(part in stages for part in parts):
            continue
        ours, theirs = (sum(stages[part][side] for part in parts) for side in (0, 1))
        lines.append(f"{job:16} {ours * 1e3:10.1f} ms   rival {theirs * 1e3:10.1f} ms   ratio {theirs / ours:.2f}")
        for part in parts:
            mine, rivals = stages[part]
            share = mine / ours
            free = f"{1 / (1 - share):.2f}" if share < 1 else "-"
            lines.append(
                f"  {part:14} {mine * 1e3:10.1f} ms   rival {rivals * 1e3:10.1f} ms   ratio {rivals / mine:.2f}"
                f"   share {100 * share:5.1f} % (rival's {100 * rivals / theirs:5.1f} %)   if free {free}"
            )
    return lines


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print every comparison's medians and their ratio."""
    if _COMPARISONS:
        terminalreporter.section("ours against the rival, medians of runs in turn")
        for line in _COMPARISONS:
            terminalreporter.write_line(line)
    if table := _amdahl(_STAGES):
        terminalreporter.section("where the time goes, stage by stage")
        for line in table:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> dict[str, float]:
    """Return what the device reaches in this run: `gflops` of an fp32 matrix product, `gbytes` a second of a copy.

    The product's sizes are those where the libraries do best, and on a CPU it is the better of two libraries'; a copy
    reads and writes, and both are counted. On a GPU `gflops_tf32` is the product's in TF32, `gflops_16bit` that of
    bf16.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    products = {"gflops": (torch.float32, "highest")}
    if cuda:
        products |= {"gflops_tf32": (torch.float32, "high"), "gflops_16bit": (torch.bfloat16, "highest")}
    found = {}
    before = torch.get_float32_matmul_precision()
    for name, (dtype, precision) in products.items():
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        torch.set_float32_matmul_precision(precision)
        found[name] = 2 * size**3 / _median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) / 1e9
    torch.set_float32_matmul_precision(before)
    if not cuda:
        layer, x = torch.nn.Linear(size, size), torch.randn(size, size)
        linears = PackedLinears()
        with torch.no_grad():
            packed = 2 * size**3 / _median(lambda: linears(layer, x), device) / 1e9
        found["gflops"] = max(found["gflops"], packed)
    # Larger than every cache.
    source = torch.randn((1 << 30) // 4 if cuda else (1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    found["gbytes"] = 2 * source.nbytes / _median(lambda: target.copy_(source), device) / 1e9
    return found


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _median(function: Callable[[], Any], device: torch.device) -> float:
    _timed(function, device)
    return statistics.median(_timed(function, device) for _ in range(5))


def _peak_extra(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call holds at its peak beyond what was held before; None where it cannot be measured.

    On the CPU that is the process's resident memory, once the allocator has given back what it held (glibc).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        # Linux: makes the high-water mark what is resident now.
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, device: torch.device, batch: int) -> Compare:
    """Return a function that times `ours` against `rival` in turn: A B A B.

    It fills `extra_info` with both medians in seconds, their ratio (above 1: ours is faster) and both peaks of extra
    memory in bytes. `rate`: the ceiling of products on a GPU, a name of `ceilings`. `images`: how many a call works on,
    for images a second. `flop`, `moved`: what the problem needs in
    floating-point operations and in bytes read and written, whoever does it; then ours is also given in GFLOP/s and
    GB/s, and as a share of the larger floor that the device's measured ceilings set.
    `stage`: the call is this stage of a job, for Amdahl's table at the end.
    `memory`: whether to measure the peaks; not for what runs in another process.
    Call it once the results were compared: a figure for a wrong result is worth nothing.
    """

    def run(
        ours: Callable[[], Any],
        rival: Callable[[], Any],
        *,
        rival_name: str,
        images: int | None = None,
        flop: float | None = None,
        moved: float | None = None,
        rate: str = "gflops",
        stage: str | None = None,
        memory: bool = True,
        **info: Any,
    ) -> None:
        _timed(rival, device)
        _timed(ours, device)
        start = time.perf_counter()
        peaks = {
            name: _peak_extra(side, device) if memory else None
            for name, side in (("peak_bytes", ours), ("rival_peak_bytes", rival))
        }
        slower = time.perf_counter() - start
        if slower < 1:  # what measuring the memory costs counts there
            slower = max(_timed(ours, device), _timed(rival, device))
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(MIN_SECONDS / slower)))
        # A call of a few microseconds is timed many at a time.
        inner = max(1, math.ceil(MIN_SECONDS / (4 * MAX_ROUNDS * slower)))
        ours_seconds: list[float] = []
        rival_seconds: list[float] = []

        def repeated(function: Callable[[], Any]) -> float:
            return _timed(lambda: [function() for _ in range(inner)], device) / inner

        benchmark.pedantic(
            lambda: ours_seconds.append(repeated(ours)),
            setup=lambda: rival_seconds.append(repeated(rival)),
            rounds=rounds,
        )
        seconds, rival_median = statistics.median(ours_seconds), statistics.median(rival_seconds)
        figures: dict[str, Any] = {
            "rival": rival_name,
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "calls_a_round": inner,
            "seconds": seconds,
            "rival_seconds": rival_median,
            "ratio": rival_median / seconds,
            **peaks,
        }
        line = f"{benchmark.name:44} {seconds * 1e3:10.3f} ms   {rival_name}: {rival_median * 1e3:10.3f} ms"
        line += f"   ratio {rival_median / seconds:.2f}"
        if images is not None:
            figures |= {"images_per_second": images / seconds, "rival_images_per_second": images / rival_median}
            line += f"   {images / seconds:.2f} images/s"
        if flop is not None or moved is not None:
            ceilings = request.getfixturevalue("ceilings")
            rate = rate if device.type == "cuda" else "gflops"
            floor = max((flop or 0) / ceilings[rate], (moved or 0) / ceilings["gbytes"]) / 1e9
            figures |= {"ceilings": ceilings, "share_of_ceiling": floor / seconds}
            for name, amount, unit in (("gflops", flop, "GFLOP/s"), ("gbytes", moved, "GB/s")):
                if amount is not None:
                    figures[name] = amount / seconds / 1e9
                    line += f"   {figures[name]:.1f} {unit}"
            line += f"   {100 * floor / seconds:.0f} % of the ceiling"
        if peaks["peak_bytes"] is not None:
            line += "   peak {:.1f} against {:.1f} MiB".format(*(peak / 2**20 for peak in peaks.values()))
        if stage is not None:
            figures["stage"] = stage
            _STAGES[stage] = seconds, rival_median
        benchmark.extra_info.update(figures | info)
        _COMPARISONS.append(line)

    return run
