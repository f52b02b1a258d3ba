"""The documentation's site: links out of docs/, the performance page, docstrings as Markdown, and the built pages."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import performance_page
import pytest
import site_links
from browser import open_page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def rewritten(markdown, page="METHOD.md"):
    missing = []
    return site_links.rewrite(markdown, page, missing.append), missing


@pytest.mark.parametrize(
    ("page", "link", "place"),
    [
        ("METHOD.md", "../benchmarks/NOTES.md", "repository/benchmarks/NOTES.md"),
        ("METHOD.md", "../examples/tiny", "repository/examples/tiny/README.md"),
        ("METHOD.md", "../examples/tiny/report/strip.png", "repository/examples/tiny/report/strip.png"),
        ("howto/train.md", "../../examples/tiny/dove.toml", "../repository/examples/tiny/dove.toml.source.md"),
        ("repository/examples/tiny/README.md", "../photos/README.md", "../photos/README.md"),
        ("repository/CONTRIBUTING.md", "docs/METHOD.md", "../METHOD.md"),
        # Within docs/ nothing changes: mkdocs checks those.
        ("howto/train.md", "../TRAINING.md", "../TRAINING.md"),
        ("METHOD.md", "https://example.org/../x.md", "https://example.org/../x.md"),
    ],
)
def test_a_link(page, link, place):
    for before, after in (("[words](", ")"), ("![a [b] c](", ")"), ("x [words](", "#part) y")):
        assert rewritten(f"{before}{link}{after}", page) == (f"{before}{place}{after}", [])


def test_a_folder_without_a_page_is_named():
    assert rewritten("see [the sources](../csrc) here") == ("see the sources (`csrc`) here", [])
    assert rewritten("see [csrc](../csrc) here") == ("see csrc here", [])


def test_code_is_left_alone():
    text = "```python\ncall[0](../README.md)\n```\n~~~\n```\n[a](../README.md)\n~~~\n"
    assert rewritten(text) == (text, [])


def test_a_missing_file_is_reported():
    text = "[a](../nothing/here.md) and [b](../../outside.md)"
    assert rewritten(text) == (text, ["nothing/here.md"])


@pytest.mark.parametrize("page", PAGES)
def test_links_work_in_the_repository_too(page):
    def check(match):
        path = site_links.resolve(page, match["target"])
        assert path is None or (ROOT / path).exists(), f"docs/{page} links to {path}"
        return match[0]

    site_links.map_links((DOCS / page).read_text(encoding="utf-8"), check)


def test_the_performance_page_has_every_figure():
    text = performance_page.figures(RESULTS[0].parent)
    assert text.index(RESULTS[-1].stem) < text.index(RESULTS[0].stem)
    for path in RESULTS:
        content = json.loads(path.read_text(encoding="utf-8"))
        section = text[text.index(f"## {path.stem}\n") :].split("\n## ")[0]
        assert content["datetime"][:10] in section and content["machine_info"]["processor"] in section
        rows = section.splitlines()
        for case in content["benchmarks"]:
            info = case["extra_info"]
            if "facts" in info:
                start, end = f"| {info['row']} | {info['images_per_second']:.3g} | {info['ratio']:.2f} |", " |"
            elif "rival" in info:
                start, end = f"| `{case['name']}` | {info['rival']} |", f"| {info['ratio']:.2f} |"
            else:
                start, end = f"`{case['name']}`", f"`{json.dumps(info)}`"
            assert any(row.startswith(start) and row.endswith(end) for row in rows), case["name"]


def test_the_arithmetic_page_says_what_was_measured():
    """docs/OFFLINE.md reckons with what `bench_stages` measured of decoding and reading."""
    found = {}
    for path in RESULTS:
        for case in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
            if case["name"].startswith("bench_stages["):
                found[case["name"]] = case["extra_info"]
    small, reduced, large, both = (
        found[f"bench_stages[{case}]"]["stage_ms"]["decode"]
        for case in ("256-False", "256-True", "512-False", "512-True")
    )
    sizes = [found[f"bench_stages[{case}]"]["jpeg_bytes"] / 1e3 for case in ("256-False", "512-False")]
    text = (DOCS / "OFFLINE.md").read_text(encoding="utf-8")
    assert f"{small:.2g} ms of one core at 256x256, {large:.2g} ms at 512x512; " in text
    assert f"`--reduced` {reduced:.2g} and {both:.2g} ms" in text
    assert f"{sizes[0]:.0f} kB (256x256) to {sizes[1]:.0f} kB (512x512) of JPEG" in text


def test_rates():
    info = {"seconds": 0.0123, "rival_seconds": 2.5, "images_per_second": 81.234}
    assert performance_page.rate(info, "") == "12.3 ms"
    assert performance_page.rate(info, "rival_") == "2.5 s"
    assert performance_page.rate({"seconds": 4.2e-5}, "") == "42 us"
    assert performance_page.rate({"images_per_second": 81.234}, "") == "81.2 images/s"


def test_a_benchmark_is_described_by_its_docstring():
    assert performance_page.describe("benchmarks/bench_pack.py::bench_pack").endswith(".")
    assert performance_page.describe("benchmarks/bench_pack.py::bench_gone") == ""
    assert performance_page.describe("benchmarks/bench_gone.py::bench_pack[1]") == ""


def test_docstrings_as_markdown():
    pytest.importorskip("griffe", reason="needs mkdocstrings: pip install '.[docs]'")
    from docstring_lists import comment_above, to_markdown

    text = (
        "One sentence.\n\nimages: (B, 3, S, S), floating\nin [0, 1]. length: exactly so many.\nlow, high: a range.\n"
        "other: is no argument.\nReturns: no item.\n\nRaises `ValueError` for x. low: known."
    )
    assert to_markdown(text, {"images", "length", "low", "high"}) == (
        "One sentence.\n\n\n- `images`: (B, 3, S, S), floating\n  in [0, 1].\n- `length`: exactly so many.\n"
        "- `low`, `high`: a range.\n  other: is no argument.\n\nReturns: no item.\n\n\nRaises `ValueError` for x.\n\n"
        "- `low`: known."
    )
    lines = ["class A:", "    x: int = 1", "    # What y", "    # is.", "    y: int = 2"]
    assert comment_above(lines, 5) == "What y\nis." and comment_above(lines, 2) == ""


def identifiers(page):
    """What a page of the API shows: identifiers with the members that it names, None for all."""
    found = {}
    for name, options in re.findall(
        r"^::: (\S+)\n((?: +.*\n)*)", (DOCS / "api" / page).read_text("utf-8"), re.MULTILINE
    ):
        listed = re.findall(r"^ +- (\w+)$", options, re.MULTILINE)
        found[name] = listed or None
    return found


@pytest.mark.parametrize("package", ["ops", "generation", "losses", "training", "data", "store", "evaluation", "jobs"])
def test_every_public_name_is_on_its_page(package):
    """A name that is a submodule's too, such as `ops.pack`, is not shown with its package: the page has to name it."""
    module = importlib.import_module(f"dove_fast.{package}")
    shown = identifiers(f"{package}.md")
    submodules = {item.name for item in pkgutil.iter_modules(module.__path__)}
    for name in module.__all__:
        if module.__name__ not in shown or name in submodules:
            assert f"{getattr(module, name).__module__}.{name}" in shown, f"docs/api/{package}.md lacks {name}"


def test_the_package_names_its_public_names():
    import dove_fast

    shown = set(identifiers("dove_fast.md")["dove_fast"])
    assert shown == set(dove_fast.__all__) - {"__version__", "ops"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with warnings as errors."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install '.[docs]'")
    directory = tmp_path_factory.mktemp("site")
    # Not --quiet, which drops warnings before they are counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_pages_open_without_a_network(site):
    """On a wide window and a phone's: nothing is fetched, no picture is missing, nothing sticks out."""
    broken = "pictures => pictures.filter((picture) => !picture.naturalWidth).map((picture) => picture.src)"
    with open_page() as opened:
        for page in ("index", "concepts", "faq", "api/dove_fast", "performance", "repository/benchmarks/NOTES"):
            opened.goto((site / f"{page}.html").as_uri())
            assert opened.locator("h1").count() == 1, page
            assert opened.locator("article img").evaluate_all(broken) == [], page
            for width in (390, 1280):
                opened.set_viewport_size({"width": width, "height": 900})
                # Wide tables and code scroll by themselves.
                assert opened.evaluate("document.documentElement.scrollWidth") <= width, page


def test_search_works_from_a_folder(site):
    with open_page((site / "METHOD.html").as_uri()) as opened:
        opened.fill("input[name=query]", "length_batches")
        result = opened.locator(".md-search-result__link").first
        result.wait_for()
        assert "store" in result.get_attribute("href") or "dove_fast" in result.get_attribute("href")
