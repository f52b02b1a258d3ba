"""An extension of griffe: our docstrings, which are prose, as Markdown that keeps their parts apart.

A sentence that begins with the name of an argument or attribute and a colon ("images: (B, 3, S, S) ..", or several
names with commas) becomes an item of a list, to the next one or the end of the paragraph. Lines that begin with
Returns, Raises, Yields or Source become paragraphs. The comment above a dataclass's field is shown as its docstring.
Methods that only Python calls are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

NAMES = r"`?[A-Za-z_]\w*`?(?:(?:, | and )`?[A-Za-z_]\w*`?)*"
ITEM = re.compile(rf"^({NAMES}): (.*)$")
# Where another sentence of that kind may begin in a line.
SECOND = re.compile(rf"(?<=[.;]) (?={NAMES}: )")
PARAGRAPH = re.compile(r"^(Returns?|Raises|Yields|Source:|Safe to|Arguments as) ?")
HIDDEN = {"__post_init__", "__repr__", "__getstate__", "__setstate__"}


def to_markdown(text: str, names: set[str]) -> str:
    """Return a docstring as Markdown; `names` are those that begin an item."""
    lines: list[str] = []
    in_item = False
    for line in _one_name_a_line(text, names):
        item = _item(line, names)
        if item:
            if not in_item:
                lines.append("")
            bold = re.sub(r"`?(\w+)`?", r"`\1`", item[1].replace(" and ", ", "))
            lines.append(f"- {bold}: {item[2]}")
            in_item = True
        elif in_item and line.strip() and not line.startswith("    ") and not PARAGRAPH.match(line):
            lines.append(f"  {line}")
        else:
            if in_item or PARAGRAPH.match(line):
                lines.append("")
            lines.append(line)
            in_item = False
    return "\n".join(lines)


def _item(line: str, names: set[str]) -> re.Match[str] | None:
    item = ITEM.match(line)
    return item if item and set(re.findall(r"\w+", item[1].replace(" and ", ", "))) <= names else None


def _one_name_a_line(text: str, names: set[str]) -> list[str]:
    lines = []
    for line in text.split("\n"):
        first, *others = SECOND.split(line)
        parts = [first]
        for other in others:
            if _item(other, names):
                parts[-1] = parts[-1].removesuffix(";")
                parts.append(other)
            else:
                parts[-1] += f" {other}"
        lines += parts
    return lines


def comment_above(lines: list[str], number: int) -> str:
    """Return the comment directly above line `number`, counted from 1, without its hashes; "" for none."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#"):
            break
        found.insert(0, line.strip().removeprefix("#").strip())
    return "\n".join(found)


class DocstringLists(griffe.Extension):
    """Rewrites every docstring when its package is loaded."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Give a dataclass's field the comment above it."""
        parent = attr.parent
        if attr.docstring is None and parent is not None and "dataclass" in parent.labels and attr.lineno is not None:
            assert isinstance(attr.filepath, Path)
            comment = comment_above(attr.filepath.read_text(encoding="utf-8").split("\n"), attr.lineno)
            if comment:
                attr.docstring = griffe.Docstring(comment, parent=attr)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute; the hidden methods of a class go."""
        for name in HIDDEN.intersection(obj.members if obj.is_class else ()):
            obj.del_member(name)
        if obj.docstring is None:
            return
        names = set(obj.members) if obj.is_class or obj.is_module else set()
        if isinstance(obj, griffe.Function):
            names = {parameter.name for parameter in obj.parameters}
        initializer = obj.members.get("__init__") if obj.is_class else None
        if isinstance(initializer, griffe.Function):
            names |= {parameter.name for parameter in initializer.parameters}
        obj.docstring.value = to_markdown(obj.docstring.value, names)
