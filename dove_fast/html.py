"""HTML pages of one file: their style and frame, tables, and pictures as data URLs. A page loads and runs nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from torch import Tensor

from dove_fast.atomic import replacing

__all__ = ["STYLE", "THUMBNAIL", "begin_page", "end_page", "png", "table", "write_page"]

# Pixels of a thumbnail's longer side, at most.
THUMBNAIL = 128

STYLE = """
:root { color-scheme: light dark; --line: #8886; --mark: #2a6fb0; --faint: #6b6b6b }
@media (prefers-color-scheme: dark) { :root { --mark: #6cb2f0; --faint: #a0a0a0 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600; width: 14rem }
td, figcaption { overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor }
rect { fill: var(--mark) }
polyline { fill: none; stroke: var(--mark); stroke-width: 1.5 }
.axis { stroke: var(--line) }
.images { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 8rem }
figure img { width: 8rem; height: auto; image-rendering: pixelated }
figcaption, .faint { font-size: .85rem; color: var(--faint) }
"""


def write_page(path: Path, lines: Iterable[str]) -> None:
    """Write a page's lines as UTF-8, by temporary file and rename. Raises `OSError`."""
    page = "\n".join(lines) + "\n"
    with replacing(path, durable=False) as file:
        # A name that the file system could not spell is shown as it came.
        file.write(page.encode("utf-8", "backslashreplace"))


def begin_page(title: str, style: str = STYLE) -> Iterator[str]:
    """Yield the head of a page and its heading; `title` is plain text, `style` CSS."""
    title = escape(title)
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>"


def end_page() -> Iterator[str]:
    """Yield the end of a page."""
    yield "</body>\n</html>"


def table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a heading and a table of names and values, plain text; nothing for no rows."""
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows]
    if lines:
        yield f"<h2>{escape(title)}</h2>\n<table>"
        yield from lines
        yield "</table>"


def png(pixels: Tensor, largest: int | None = THUMBNAIL) -> str:
    """Return a picture, uint8 (3, H, W) on the CPU, as a data URL, reduced to `largest` pixels a side where larger.

    None keeps its size.
    """
    from PIL import Image

    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if largest is not None:
        image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
