"""Headless Chromium for pages that a person would open: what went wrong in it is collected, and it is offline.

    with open_page(path.as_uri()) as page:
        assert page.title() == "..."

`page` is playwright's `Page`. Where playwright or Chromium is missing, the test is skipped with the reason, and fails
with it where the environment variable CI is true: there the pages must have been tried.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

NAMES = ("chromium", "chromium-browser", "google-chrome")
# No sandbox: it does not start as root, as in most containers.
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
# Where `127.0.0.1` is all of the network, a request elsewhere fails by name, WebSockets and prefetches too.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


@contextlib.contextmanager
def open_page(
    address: str | None = None,
    *,
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
    may_fail: bool = False,
) -> Iterator[Page]:
    """Start a browser, open `address` (None: nothing yet, use `page.goto`), and close it all at the end.

    width, height: of the window, in CSS pixels. dark: the colour scheme that the page is told.
    Whatever went wrong in the page is collected in `page.problems`, a list of str: errors and warnings of the console,
    exceptions, requests that failed or got 400 or above, and requests that were blocked because they leave this
    machine (anything but file:, data:, blob: and http(s)://127.0.0.1). Unless `may_fail`, the end asserts that there
    are none.

    A browser of its own for each call: playwright's sync API keeps a loop of asyncio running in this thread while it is
    open, which code under test, and a second `open_page` inside the first, could not bear. Run a server in a thread or
    process of its own.
    """
    try:
        from playwright import sync_api
    except ImportError as error:
        do_without(f"needs playwright, pip install playwright ({error})")
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        do_without(f"needs Chromium on the PATH ({', '.join(NAMES)})")
    problems: list[str] = []

    def only_here(route: Route) -> None:
        if is_here(route.request.url):
            route.continue_()
        else:
            problems.append(f"blocked: {route.request.url}")
            route.abort()

    # Proxies would be asked for what is on this machine, too.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*ARGUMENTS, OFFLINE], env=environment)
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            page.problems = problems
            page.route("**/*", only_here)
            page.on(
                "console",
                lambda message: (
                    problems.append(f"console {message.type}: {message.text}")
                    if message.type in ("error", "warning")
                    else None
                ),
            )
            page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
            page.on("requestfailed", lambda request: problems.append(f"failed: {request.url} ({request.failure})"))
            page.on(
                "response",
                lambda response: (
                    problems.append(f"status {response.status}: {response.url}") if response.status >= 400 else None
                ),
            )
            if address is not None:
                page.goto(address)
            yield page
            if not may_fail:
                assert problems == []
        finally:
            browser.close()


def do_without(reason: str) -> NoReturn:
    """Skip the test, or fail it where the environment variable CI is true."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"CI is true, and this test would be skipped: {reason}", pytrace=False)
    pytest.skip(reason)


def is_here(url: str) -> bool:
    """Tell whether a request for `url` stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob", "about") or (
        parts.scheme in ("http", "https", "ws", "wss") and parts.hostname == "127.0.0.1"
    )


def broken_images(page: Page) -> list[str]:
    """Return the alternative texts of the images that did not load."""
    found: list[str] = page.evaluate(
        "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.alt)"
    )
    return found


def overflows(page: Page) -> bool:
    """Tell whether the page as a whole must be scrolled sideways."""
    found: bool = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    return found
