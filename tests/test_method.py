"""docs/METHOD.md has the sections that the sources cite."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_cited_section_is_there():
    text = (ROOT / "docs" / "METHOD.md").read_text(encoding="utf-8")
    headings = {int(number) for number in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)}
    cited: dict[int, str] = {}
    for path in [*(ROOT / "dove_fast").rglob("*.py"), *(ROOT / "csrc").rglob("*.*"), ROOT / "tests" / "upstream.py"]:
        # A citation may go on in the next line; there is also "METHOD sections 1 to 3" and "METHOD sections 2 and 3".
        source = " ".join(path.read_text(encoding="utf-8").split())
        for first, joint, last in re.findall(r"METHOD sections? (\d+)(?: (to|and) (\d+))?", source):
            numbers = range(int(first), int(last) + 1) if joint == "to" else [int(n) for n in (first, last) if n]
            cited |= dict.fromkeys(numbers, str(path.relative_to(ROOT)))
    assert {1, 2, 3, 4} <= set(cited)
    missing = {f"section {number}": path for number, path in cited.items() if number not in headings}
    assert not missing, "docs/METHOD.md lacks what is cited"
