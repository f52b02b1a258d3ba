"""A hook of mkdocs: links from the pages to files outside docs/ work on the site as they do in the repository.

A Markdown file that is linked to becomes a page, a picture or another binary file is copied, any other text file is
shown as it is on a page of its own, and a folder stands for its README.md; all under repository/. A folder without one
has no page: the link's words are left, with its path. What is not there is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks.site_links")

ROOT = Path(__file__).parent.parent
DOCS = "docs"
# Where the site has what lies outside docs/.
OUTSIDE = "repository"
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash"}
COPIED = {".png", ".jpg", ".jpeg", ".svg", ".gif", ".html", ".json"}
# [words](target) and ![words](target), the target without a title or a fragment; words may have one level of brackets.
LINK = re.compile(
    r"(?P<picture>!?)\[(?P<words>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s#]+)(?P<fragment>#[^()\s]*)?\)"
)
FENCE = re.compile(r"^ *(```+|~~~+)")


def map_links(markdown: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Return `markdown` with `replace` applied to every link that is not in a fenced block of code."""
    lines = []
    fence = ""
    for line in markdown.split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        elif not fence:
            line = LINK.sub(replace, line)
        lines.append(line)
    return "\n".join(lines)


def source_of(page: str) -> str:
    """Return the path in the repository of the page at `page` in the site's sources."""
    if page.startswith(f"{OUTSIDE}/"):
        return page.removeprefix(f"{OUTSIDE}/").removesuffix(".source.md")
    return f"{DOCS}/{page}"


def page_of(path: str) -> str | None:
    """Return where the site's sources have the file or folder at `path` in the repository; None for nowhere."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    if (ROOT / path).is_dir():
        return page_of(f"{path}/README.md") if (ROOT / path / "README.md").exists() else None
    suffix = Path(path).suffix
    return f"{OUTSIDE}/{path}" if suffix in COPIED or suffix == ".md" else f"{OUTSIDE}/{path}.source.md"


def resolve(page: str, target: str) -> str | None:
    """Return the path in the repository that `target` on `page` leads to; None for a URL, or out of the repository."""
    if re.match(r"[a-z][a-z0-9+.-]*:|/", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), target))
    return None if path.startswith("..") else path


def rewrite(markdown: str, page: str, missing: Callable[[str], None]) -> str:
    """Return `markdown`, which is that of `page`, with its links as they are on the site.

    `missing` is called with each path in the repository that a link names and that is not there.
    """

    def replace(match: re.Match[str]) -> str:
        path = resolve(page, match["target"])
        # Links within docs/ are right as they are, and mkdocs checks them.
        if path is None or (path.startswith(f"{DOCS}/") and not page.startswith(f"{OUTSIDE}/")):
            return match[0]
        if not (ROOT / path).exists():
            missing(path)
            return match[0]
        place = page_of(path)
        if place is None:
            return match["words"] if path in match["words"] else f"{match['words']} (`{path}`)"
        link = posixpath.relpath(place, posixpath.dirname(page))
        return f"{match['picture']}[{match['words']}]({link}{match['fragment'] or ''})"

    return map_links(markdown, replace)


def outside_targets(markdown: str, page: str) -> set[str]:
    """Return the paths of the files outside docs/ that links on `page` lead to, and that are there."""
    found = set()

    def note(match: re.Match[str]) -> str:
        path = resolve(page, match["target"])
        if path is not None and not path.startswith(f"{DOCS}/"):
            if (ROOT / path).is_dir():
                path = f"{path}/README.md"
            if (ROOT / path).is_file():
                found.add(path)
        return match[0]

    map_links(markdown, note)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring in what the pages link to outside docs/, and what those files link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        file = files.get_file_from_path(page)
        assert file is not None
        for path in sorted(outside_targets(file.content_string, page)):
            place = page_of(path)
            if place is None or files.get_file_from_path(place) is not None:
                continue
            files.append(_file(path, place, config))
            if path.endswith(".md"):
                waiting.append(place)
    return files


def _file(path: str, place: str, config: MkDocsConfig) -> File:
    from mkdocs.structure.files import File

    if not place.endswith(".source.md"):
        return File.generated(config, place, abs_src_path=os.fspath(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    # More backquotes than any line of the file has.
    content = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n`````{language}\n{text}\n`````\n"
    return File.generated(config, place, content=content)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page's Markdown with links that lead out of docs/ as they are on the site."""
    name = page.file.src_uri

    def warn(path: str) -> None:
        LOG.warning(f"{source_of(name)} links to {path}, which is not in the repository")

    return rewrite(markdown, name, warn)
