"""The browser of the tests: it finds what is wrong with a page, and does not reach the network."""

from __future__ import annotations

import asyncio

import pytest
from browser import broken_images, is_here, open_page, overflows

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def test_a_good_page(tmp_path):
    (tmp_path / "a.html").write_text(f'<!DOCTYPE html><title>good</title><img alt="p" src="{PIXEL}"><p>text')
    with open_page((tmp_path / "a.html").as_uri(), width=400, dark=True) as page:
        assert page.title() == "good" and broken_images(page) == [] and not overflows(page)
        assert page.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [400, True]
    # No loop is left behind.
    assert asyncio.run(asyncio.sleep(0, "done")) == "done"


def test_what_is_wrong_is_found(tmp_path):
    (tmp_path / "b.html").write_text(
        '<!DOCTYPE html><title>bad</title><img alt="none" src="none.png"><img alt="away" src="http://example.com/a.png">'
        '<div style="width: 3000px">wide</div><script>console.error("said"); undefined.x</script>'
    )
    with open_page((tmp_path / "b.html").as_uri(), may_fail=True) as page:
        assert broken_images(page) == ["none", "away"] and overflows(page)
    text = "\n".join(page.problems)
    for part in ("console error: said", "exception: ", "none.png", "blocked: http://example.com/a.png"):
        assert part in text
    with pytest.raises(AssertionError), open_page((tmp_path / "b.html").as_uri()):
        pass


def test_what_is_here():
    assert all(map(is_here, ("file:///a", "data:,a", "http://127.0.0.1:8000/a", "ws://127.0.0.1:1/")))
    assert not any(map(is_here, ("http://example.com", "https://127.0.0.1.example.com", "http://10.0.0.1/")))
