"""A hook of mkdocs: the tables of docs/performance.md, made from benchmarks/results when the site is built.

Nothing is chosen and nothing is averaged over files: each file has its section with device, date and versions, each
benchmark its range of ratios and, folded, all of its cases.
"""

from __future__ import annotations

import ast
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
# Where mkdocs runs there is nothing else that finds it.
sys.path.append(str(ROOT / "benchmarks"))

import tokenizer_table  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

RESULTS = ROOT / "benchmarks" / "results"
PAGE = "performance.md"
MARKER = "<!-- figures -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the tables into the page."""
    from mkdocs.structure.files import File

    page = files.get_file_from_path(PAGE)
    assert page is not None
    text = page.content_string
    if MARKER not in text:
        raise ValueError(f"docs/{PAGE} has no line {MARKER}")
    files.remove(page)
    files.append(File.generated(config, PAGE, content=text.replace(MARKER, figures(RESULTS))))
    return files


def figures(results: Path) -> str:
    """Return the tables of all files of `results` as Markdown, the latest file first."""
    read = [(json.loads(path.read_text(encoding="utf-8")), path) for path in sorted(results.glob("*.json"))]
    read.sort(key=lambda item: item[0]["datetime"], reverse=True)
    return "\n".join(section(content, path.name) for content, path in read)


def section(content: dict[str, Any], name: str) -> str:
    """Return the section of one file, which pytest-benchmark wrote, as Markdown."""
    machine = content["machine_info"]
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items() if version)
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    # The rows of the speed table are no comparison of ours with theirs: they have a table of their own.
    comparisons = [benchmark for benchmark in content["benchmarks"] if "facts" not in benchmark["extra_info"]]
    lines = [
        f"## {name.removesuffix('.json')}",
        "",
        f"{device}, {machine['cpu_capability']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)} of "
        f"{machine['cores']} cores, {machine['system']} {machine['machine']}; {content['datetime'][:10]}; "
        f"Python {machine['python']}, {versions}. File: [{name}](../benchmarks/results/{name}).",
        "",
        *_tokenizers(content),
        *_overview(comparisons),
        *_cases(comparisons),
    ]
    return "\n".join(lines)


def _tokenizers(content: dict[str, Any]) -> list[str]:
    rows, machine = tokenizer_table.rows_of(content)
    return [tokenizer_table.table(rows, machine), ""] if rows else []


def _by_function(benchmarks: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(benchmark["name"].split("[")[0] for benchmark in benchmarks)
    for name in names:
        yield name, [benchmark for benchmark in benchmarks if benchmark["name"].split("[")[0] == name]


def _overview(benchmarks: list[dict[str, Any]]) -> list[str]:
    lines = ["| benchmark | measures | against | cases | ratio: least, median, most |", "|---|---|---|---|---|"]
    for name, cases in _by_function(benchmarks):
        for rival in dict.fromkeys(case["extra_info"].get("rival") for case in cases):
            ratios = [
                case["extra_info"]["ratio"]
                for case in cases
                if case["extra_info"].get("rival") == rival and rival is not None
            ]
            if ratios:
                spread = " &nbsp; ".join(f"{ratio:.2f}" for ratio in _spread(ratios))
                measures = _words(describe(cases[0]["fullname"]))
                lines.append(f"| `{name}` | {measures} | {_words(rival)} | {len(ratios)} | {spread} |")
    return [*lines, ""] if len(lines) > 2 else []


def _spread(ratios: list[float]) -> list[float]:
    return [min(ratios), statistics.median(ratios), max(ratios)] if len(ratios) > 1 else ratios


def _cases(benchmarks: list[dict[str, Any]]) -> list[str]:
    compared = [case for case in benchmarks if case["extra_info"].get("rival") is not None]
    lines = []
    if compared:
        count = f"All {len(compared)} cases" if len(compared) > 1 else "The case"
        lines += [f'<details markdown="1"><summary>{count}</summary>', ""]
        lines += ["| case | against | ours | theirs | ratio |", "|---|---|---|---|---|"]
        for case in compared:
            info = case["extra_info"]
            ours, theirs = rate(info, ""), rate(info, "rival_")
            lines.append(f"| `{case['name']}` | {_words(info['rival'])} | {ours} | {theirs} | {info['ratio']:.2f} |")
        lines += ["", "</details>", ""]
    for case in benchmarks:
        if case not in compared:
            measured = json.dumps(case["extra_info"])
            lines += [f"`{case['name']}`: {_words(describe(case['fullname']))} `{measured}`", ""]
    return lines


def rate(info: dict[str, Any], side: str) -> str:
    """Return the time of a call of one side, "" ours and "rival_" the other; images a second where no time was kept."""
    seconds = info.get(f"{side}seconds")
    if seconds is None:
        return f"{info[f'{side}images_per_second']:.3g} images/s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def describe(fullname: str) -> str:
    """Return the first sentence of a benchmark's docstring, "" where it is not there any more."""
    file, _, name = fullname.partition("::")
    if not (ROOT / file).exists():
        return ""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name.split("[")[0]:
            return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    return ""


def _words(text: str) -> str:
    return text.replace("|", "\\|")
