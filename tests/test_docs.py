"""The documentation's code, run page by page as a reader would: python blocks, `dove-fast` commands, files, TOML.

A page's blocks run in order in one empty directory beside the samples in `examples`. Before a block may stand

    <!-- not run: REASON -->    it is shown as a skipped test, with its reason
    <!-- file: NAME -->         its text is written to that file, for the blocks behind it

A block that is neither run nor marked fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torchvision_guard  # noqa: F401 - before diffusers and transformers, which import torchvision

from dove_fast.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|file): (?P<note>[^>]+) -->\n\n?)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Blocks of the pages without marks, by page and language.
ELSEWHERE = {
    ("TRAINING.md", "python"): "run by tests/test_readme.py",
    ("TRAINING.md", "bash"): "installs packages; tests/training/test_train_command.py and .ci/run train",
    ("PLATFORMS.md", "bash"): "builds wheels",
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    file: str = ""
    # Why it is not run.
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: str, text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        language, note = match["language"], match["note"] or ""
        reason = note if match["mark"] == "not run" else ELSEWHERE.get((page, language), "")
        file = note if match["mark"] == "file" else ""
        line = text[: match.start("text")].count("\n") + 1
        found.append(Block(page, line, language, match["text"], file, reason))
    return found


PAGES = {
    page: read_blocks(page, (DOCS / page).read_text(encoding="utf-8"))
    for page in sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
}
RUN = [page for page, blocks in PAGES.items() if any(not block.reason for block in blocks)]
NOT_RUN = [block for blocks in PAGES.values() for block in blocks if block.reason]


def run_block(block: Block, names: dict[str, Any]) -> None:
    if block.file:
        Path(block.file).write_text(block.text, encoding="utf-8")
    if block.language == "python":
        # Line numbers of the page in a traceback.
        exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)
    elif block.language == "bash":
        for command in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words:
                assert words[0] == "dove-fast", f"{block.name}: {command!r} is no dove-fast command; mark the block"
                assert main(words[1:]) == 0, f"{block.name}: {command}"
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    else:
        assert block.language == "text", f"{block.name}: what is to be done with a block of {block.language!r}?"


@pytest.mark.parametrize("page", RUN)
def test_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Nothing of what a page uses is looked for on the network.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    os.symlink(ROOT / "examples", "examples")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in PAGES[page]:
        if not block.reason:
            run_block(block, names)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.name)
def test_what_is_not_run_says_why(block):
    pytest.skip(block.reason)


def test_no_block_is_overlooked():
    """A fence that the pattern does not see, in a list or of another kind, would be one."""
    for page, blocks in PAGES.items():
        fences = re.findall(r"^\s*(?:```|~~~)", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks), f"docs/{page}"


def test_the_pages_without_marks_still_need_their_entry():
    found = {(block.page, block.language) for blocks in PAGES.values() for block in blocks}
    assert set(ELSEWHERE) <= found


def test_marks_are_read():
    text = (
        "<!-- not run: a GPU -->\n```bash\nls\n```\n\n"
        "<!-- file: a.toml -->\n\n```toml\nx = 1\n```\n\n```python\n1\n```\n"
    )
    blocks = read_blocks("page.md", text)
    assert [(block.language, block.file, block.reason) for block in blocks] == [
        ("bash", "", "a GPU"),
        ("toml", "a.toml", ""),
        ("python", "", ""),
    ]
    assert [block.line for block in blocks] == [3, 9, 13]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```bash\nls\n```\n", "no dove-fast command"),
        ("```bash\ndove-fast info nothing-there\n```\n", "dove-fast info nothing-there"),
        ("```rust\nfn\n```\n", "what is to be done"),
        ("```python\nassert 1 == 2, 'more'\n```\n", "more"),
    ],
)
def test_what_fails_fails(text, error):
    (block,) = read_blocks("page.md", text)
    with pytest.raises(AssertionError, match=error):
        run_block(block, {})
