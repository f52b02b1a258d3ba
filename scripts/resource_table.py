"""Registers, spills, shared memory and tensor-core instructions of every GPU kernel, without a GPU; rules that fail.

    python scripts/resource_table.py [--slow] [--json FILE] [--markdown FILE]

Triton kernels are compiled ahead of time, for every case of every `dove_fast/ops/*/triton_kernel.py` and each of its
compute capabilities; CUDA kernels are read out of the built module. Exit 0: all within the rules; 1: not, with each
failure on a line; 2: nothing could be compiled, with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# The shared memory that one block may have, in bytes (CUDA C++ programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# HMMA, IMMA, DMMA and their like up to 8.9, HGMMA and its like on 9.0, UTCHMMA and its like on 10.0.
TENSOR_CORE = re.compile(r"(UTC)?[A-Z]+G?MMA")

# CUDA kernels whose products must run on them.
MATRIX_KERNELS = ("search_kernel",)

Row = dict[str, Any]


def failures(row: Row) -> list[str]:
    """Return which rules a row breaks: all the rules there are."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spill_bytes"] > row["spill_bytes_allowed"]:
        found.append(f"spills {row['spill_bytes']} bytes a thread, {row['spill_bytes_allowed']} are allowed")
    if row["spill_instructions"] and not row["spill_bytes_allowed"]:
        found.append(f"has {row['spill_instructions']} instructions that read or write local memory")
    if row["tensor_cores"] and not row["tensor_instructions"]:
        found.append("has no tensor-core instruction, and must")
    limit = SHARED_LIMIT[int(row["arch"].rstrip("a"))]
    if row["shared_bytes"] > limit:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, a block may have {limit}")
    return found


def cuobjdump() -> str | None:
    """Return the path of cuobjdump: the one that Triton brings, with its nvdisasm beside it, else that on PATH."""
    spec = importlib.util.find_spec("triton")
    beside = None
    if spec is not None and spec.origin is not None:
        beside = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return beside or shutil.which("cuobjdump")


def read_binary(tool: str, binary: Path) -> list[Row]:
    """Return what cuobjdump tells of every kernel in a cubin, or for every architecture in a library."""
    command = [tool, "--dump-resource-usage", "--dump-sass", str(binary)]
    rows: dict[tuple[str, str], Row] = {}
    opcodes: dict[tuple[str, str], Counter[str]] = {}
    # A cubin has no line for its only architecture.
    arch = kernel = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\S+):|\s+Function : (\S+)", line):
            kernel = found[1] or found[2]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            rows[arch, kernel] = {"arch": arch, "kernel": kernel, "registers": registers}
            rows[arch, kernel].update(spill_bytes=stack + local, shared_bytes=shared)
            opcodes[arch, kernel] = Counter()
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z]\w*)", line):
            opcodes[arch, kernel][found[1]] += 1
    for key, row in rows.items():
        counts = opcodes[key]
        row["instructions"] = counts.total()
        row["spill_instructions"] = counts["STL"] + counts["LDL"]
        row["tensor_instructions"] = {name: counts[name] for name in sorted(counts) if TENSOR_CORE.fullmatch(name)}
        row["ffma"] = counts["FFMA"] + counts["FFMA2"]
    return list(rows.values())


# CUDA kernels: what the module was built with.


def cuda_rows() -> tuple[list[Row], str | None]:
    """Return the rows of the CUDA kernels in the built module, or none and the reason."""
    from dove_fast import native

    reason = native.why_no_cuda()
    tool = cuobjdump()
    if reason is None and tool is None:
        reason = "cuobjdump is neither beside Triton nor on PATH"
    if reason is not None or tool is None:
        return [], reason
    rows = read_binary(tool, Path(str(native.load().__file__)))
    for row, name in zip(rows, _demangled([row["kernel"] for row in rows]), strict=True):
        row.update(
            name=name,
            backend="cuda",
            tensor_cores=any(kernel in row["kernel"] for kernel in MATRIX_KERNELS),
            spill_bytes_allowed=0,
        )
    return rows, None


def _demangled(names: list[str]) -> list[str]:
    """Turn symbols into names such as pack_kernel<uint4>; they stay as they are without c++filt."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    result = subprocess.run([tool, "--no-params"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |dove::cuda::|\(anonymous namespace\)::", "", line) for line in result.stdout.splitlines()]


# Triton kernels: compiled in processes of their own, each with a share of the cases.


def kernel_modules() -> list[str]:
    """Return the modules that hold Triton kernels: those of the package's ops."""
    from dove_fast import ops

    names = (f"{item.name}.triton_kernel" for item in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}.") if item[2])
    return [name for name in names if importlib.util.find_spec(name) is not None]


def work(share: int, shares: int, modules: list[str], slow: bool, cache: Path) -> Iterator[Row]:
    """Yield the rows of every `shares`th case, from the `share`th on."""
    tool = cuobjdump()
    cases = [case for name in modules or kernel_modules() for case in importlib.import_module(name).cases()]
    wanted = [(case, arch) for case in cases if slow or not case.slow for arch in case.archs]
    for case, arch in wanted[share::shares]:
        yield triton_row(case, arch, tool, cache)


def triton_row(case: Any, arch: int, tool: str, cache: Path) -> Row:
    """Compile one case for one compute capability, or take it from the cache, and measure it."""
    start = time.perf_counter()
    row: Row = {"name": case.name, "backend": "triton", "arch": str(arch), "kernel": case.kernel.__name__}
    row.update(tensor_cores=case.tensor_cores, spill_bytes_allowed=case.spill_bytes, num_warps=case.tile.num_warps)
    try:
        compiled = _compile(case, arch)
    except Exception as error:  # the compiler's errors have no common class
        text = f"{type(error).__name__}: {error}"
        return {**row, "error": " ".join(text.split())[:500]}
    # Triton's cache has the binary by the source with its callees, signature, constants, options, architecture and
    # Triton's version; here the binary itself is the key of what was read from it.
    binary = compiled.asm["cubin"]
    kept = cache / "measured" / f"{hashlib.sha256(binary).hexdigest()}.json"
    if kept.exists():
        measured = json.loads(kept.read_bytes())
    else:
        measured = _measure(tool, binary, cache)
        _replace(kept, json.dumps(measured))
    # The arch and the symbol are the binary's own.
    row.update({key: value for key, value in measured.items() if key not in row})
    row["shared_bytes"] = compiled.metadata.shared
    row["binary"] = kept.stem
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


def _compile(case: Any, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    given = set(case.types) | set(case.tile.constants)
    if given != set(names):
        raise ValueError(f"the case and the kernel's arguments differ: {sorted(given ^ set(names))}")
    types = {name: case.types[name].partition(":") for name in names if name in case.types}
    signature = {name: types[name][0] if name in types else "constexpr" for name in names}
    multiples = {
        (index,): [["tt.divisibility", int(types[name][2])]]
        for index, name in enumerate(names)
        if name in types and types[name][2]
    }
    source = ASTSource(case.kernel, signature, dict(case.tile.constants), multiples)
    options = {"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _measure(tool: str, binary: bytes, cache: Path) -> Row:
    path = cache / f"{os.getpid()}.cubin"
    path.write_bytes(binary)
    try:
        (row,) = read_binary(tool, path)
    finally:
        path.unlink()
    return row


def _replace(path: Path, text: str) -> None:
    """Write a file that another process may be reading or writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def triton_rows(modules: list[str], slow: bool, cache: Path, jobs: int) -> tuple[list[Row], str | None]:
    """Return the rows of the Triton kernels, or none and the reason."""
    if importlib.util.find_spec("triton") is None:
        return [], "Triton is not installed: run `pip install triton`"
    if cuobjdump() is None:
        return [], "cuobjdump is neither beside Triton nor on PATH"
    cache.mkdir(parents=True, exist_ok=True)
    # Under the interpreter nothing is compiled.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache / "triton")
    command = [sys.executable, str(Path(__file__).resolve()), "--cache", str(cache), *(["--slow"] if slow else [])]
    command += [f"--module={name}" for name in modules]
    workers = [
        subprocess.Popen([*command, "--share", str(job), str(jobs)], stdout=subprocess.PIPE, text=True, env=environment)
        for job in range(jobs)
    ]
    rows = []
    for job, worker in enumerate(workers):
        lines, _ = worker.communicate()
        # A line a row; what the compiler prints goes there too.
        rows += [json.loads(line) for line in lines.splitlines() if line.startswith('{"name": ')]
        if worker.returncode != 0:
            error = f"process {job + 1} of {jobs} ended with {worker.returncode}; its rows before that are here"
            rows.append({"name": "(none)", "backend": "triton", "arch": "", "kernel": "", "error": error})
    return sorted(rows, key=lambda row: (row["name"], len(row["arch"]), row["arch"])), None


# The result.


def table(modules: list[str], slow: bool, cache: Path, jobs: int) -> dict[str, Any]:
    """Return all rows with the rules they break, and what could not be looked at."""
    missing = {}
    found, missing["triton"] = triton_rows(modules, slow, cache, jobs)
    if not modules:
        compiled, missing["cuda"] = cuda_rows()
        found += compiled
    for row in found:
        row["failures"] = failures(row)
    broken = [f"{row['name']} (sm_{row['arch']}) {text}" for row in found for text in row["failures"]]
    return {"rows": found, "failures": broken, "missing": {key: why for key, why in missing.items() if why}}


def markdown(result: dict[str, Any]) -> str:
    """Return the table as a reader wants it."""
    lines = ["| kernel | arch | registers | spilled bytes | shared bytes | tensor-core instructions | FFMA |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        if "error" not in row:
            tensor = ", ".join(f"{count} {name}" for name, count in row["tensor_instructions"].items())
            cells = (f"{row['name']}", f"sm_{row['arch']}", row["registers"], row["spill_bytes"], row["shared_bytes"])
            lines.append("| " + " | ".join(map(str, (*cells, tensor, row["ffma"]))) + " |")
    lines += [f"\n{key}: not looked at, {why}" for key, why in result["missing"].items()]
    lines += [f"\nFAILED: {text}" for text in result["failures"]]
    return "\n".join(lines) + "\n"


def default_cache() -> Path:
    """Return the directory under the user's caches."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "dove_fast" / "resource_table"


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="also the cases that are marked slow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, else on the screen")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="directory of binaries (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (%(default)s)")
    parser.add_argument("--module", action="append", default=[], help="the cases of this module, and no CUDA kernels")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.share:
        for row in work(*options.share, options.module, options.slow, options.cache):
            print(json.dumps(row), flush=True)
        return 0
    result = table(options.module, options.slow, options.cache, options.jobs)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(result), encoding="utf-8")
    else:
        print(markdown(result), end="")
    for name, why in result["missing"].items():
        print(f"{name}: {why}", file=sys.stderr)
    for text in result["failures"]:
        print(f"FAILED: {text}", file=sys.stderr)
    if not result["rows"]:
        return 2
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
