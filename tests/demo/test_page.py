"""The demo's page in a real browser: a picture in, a slider that moves, and what goes wrong said clearly."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browser import broken_images, open_page, overflows
from PIL import Image
from small_models import NUM_TOKENS

from dove_fast import DOVE
from dove_fast.demo import Gallery
from dove_fast.demo import server as demo_server

PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "chelsea.jpg"


@pytest.fixture(scope="module")
def tiny() -> DOVE:
    return DOVE.from_pretrained("tiny")


def give(page, file) -> None:
    """Give the page a file, and wait for its result."""
    page.wait_for_selector("body[data-ready]")
    page.set_input_files("#file", file)
    page.wait_for_selector("#result:not([hidden])")


def pixels_of(url: str) -> np.ndarray:
    """Decode a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).astype(int)


def until(page, holds: Callable[[], bool]) -> None:
    """Wait, half a minute at most; the page's policy does not let playwright's own `wait_for_function` in."""
    for _ in range(1500):
        if holds():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it does not come to hold")


def fetched(page, count: int) -> None:
    """Wait until so many reconstructions are there."""
    until(page, lambda: page.evaluate("shown.made.size") >= count)


def slide(page, length: int) -> str:
    """Move the slider; return the picture's address once it is that of `length` tokens."""
    page.fill("#slider", str(length))
    page.wait_for_selector("#made-figure[aria-busy=false]")
    assert page.text_content("#slider-value") == str(length)
    assert page.text_content("#about-made") == ("From 1 token" if length == 1 else f"From {length} tokens")
    return page.get_attribute("#made", "src")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), pytest.param(400, True, marks=pytest.mark.slow)])
def test_a_photograph_with_the_shipped_model(tiny, serve, width, dark):
    gallery = Gallery(tiny)
    reading = gallery.read(PHOTO.read_bytes())
    made = {one.length: one for one in gallery.reconstruct(reading.id, [1, 13, reading.length])}
    server = serve(gallery, name="tiny")
    with open_page(server.url, width=width, dark=dark) as page:
        give(page, PHOTO)
        assert page.text_content("#count") == f"{reading.length} of 64 tokens."
        assert page.input_value("#slider") == str(reading.length)
        assert page.get_attribute("#original", "src") == reading.original
        for length in (1, 13, reading.length):
            # Other lengths in the batch may round differently.
            assert np.abs(pixels_of(slide(page, length)) - pixels_of(made[length].picture)).max() <= 1
            assert page.text_content("#made-psnr") == f"{made[length].psnr:.1f} dB"
        assert np.abs(pixels_of(made[1].picture) - pixels_of(made[13].picture)).max() > 10
        assert broken_images(page) == [] and not overflows(page)
        # Ahead of the slider, all of them are fetched.
        fetched(page, 64)
        assert page.evaluate("document.querySelector('#psnr-plot polyline').points.length") == 64
        assert page.evaluate("document.querySelector('#eos-plot polyline').points.length") == 64


def test_everything_by_keyboard(model, serve):
    with open_page(serve(model).url) as page:
        give(page, PHOTO)
        page.focus("#slider")
        page.keyboard.press("Home")
        assert page.text_content("#slider-value") == "1"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.text_content("#slider-value") == "3"
        assert page.get_attribute("#slider", "aria-valuetext") == f"3 of {NUM_TOKENS} tokens"
        page.keyboard.press("End")
        assert page.text_content("#slider-value") == str(NUM_TOKENS)
        page.focus("#to-kept")
        page.keyboard.press("Enter")
        assert page.text_content("#slider-value") == page.text_content("#count").split()[0]
        # A drawn picture, with Space.
        before = page.get_attribute("#original", "src")
        page.focus("#samples button[aria-label=Checks]")
        page.keyboard.press("Space")
        until(page, lambda: page.get_attribute("#original", "src") != before)


def test_the_threshold_moves_the_end(model, serve):
    """The end is where the curve first lies above the threshold, as METHOD section 3 has it."""
    gallery = Gallery(model)
    eos = gallery.read(PHOTO.read_bytes()).eos
    with open_page(serve(gallery).url) as page:
        give(page, PHOTO)
        ends = set()
        for threshold in (0.01, 0.3, 0.5, 0.7, 0.99):
            page.fill("#threshold", str(threshold))
            end = next((step for step, p in enumerate(eos, start=1) if p > threshold), NUM_TOKENS)
            assert page.text_content("#count") == f"{end} of {NUM_TOKENS} tokens."
            assert page.text_content("#slider-value") == str(end)
            stopped = eos[end - 1] > threshold
            assert ("stopped here" in page.text_content("#why")) == stopped
            ends.add(end)
        assert len(ends) > 1, "the thresholds must give different ends for this test to say anything"


@pytest.mark.slow
def test_the_models_threshold_holds_until_it_is_moved(model, serve):
    """It need not be one of the slider's steps, nor within its range."""
    eos = Gallery(model).read(PHOTO.read_bytes()).eos
    for threshold, text in ((0.5, "0.50"), (0.4567, "0.4567"), (0.9995, "0.9995"), (0.0004, "0.0004")):
        with open_page(serve(Gallery(model, eos_threshold=threshold)).url) as page:
            give(page, PHOTO)
            end = next((step for step, p in enumerate(eos, start=1) if p > threshold), NUM_TOKENS)
            assert page.text_content("#count") == f"{end} of {NUM_TOKENS} tokens."
            assert page.evaluate("shown.threshold") == threshold
            assert page.text_content("#threshold-value") == page.text_content("#eos-plot .of-level") == text
            assert f"{text} or below" in page.text_content("#why") or f"above {text}" in page.text_content("#why")
            page.fill("#threshold", "0.3")
            assert page.evaluate("shown.threshold") == 0.3 and page.text_content("#threshold-value") == "0.30"


def test_the_last_picture_given_is_read_again(model, serve):
    """Although an earlier one takes longer to be at hand."""
    with open_page(serve(model).url) as page:
        page.wait_for_selector("body[data-ready]")
        page.evaluate(
            """async () => {
            const draw = (colour) => new Promise((done) => {
                const canvas = document.createElement("canvas");
                canvas.width = canvas.height = 16;
                const context = canvas.getContext("2d");
                context.fillStyle = colour;
                context.fillRect(0, 0, 16, 16);
                canvas.toBlob(done);
            });
            const slow = await draw("#f00"), quick = await draw("#00f"), arrayBuffer = slow.arrayBuffer.bind(slow);
            slow.arrayBuffer = () => new Promise((done) => setTimeout(() => done(arrayBuffer()), 300));
            await Promise.all([give(slow), give(quick)]);
            await give(content);
        }"""
        )
        assert (pixels_of(page.get_attribute("#original", "src")) == [0, 0, 255]).all()


def test_the_tokens_and_where_they_look(model, serve):
    gallery = Gallery(model)
    reading = gallery.read(PHOTO.read_bytes())
    with open_page(serve(gallery).url) as page:
        give(page, PHOTO)
        size = page.evaluate("[document.querySelector('#tokens').width, document.querySelector('#tokens').height]")
        assert size == [NUM_TOKENS, reading.width_of_token]
        width = page.locator("#tokens").bounding_box()["width"]
        # The fifth column.
        page.click("#tokens", position={"x": width * 4.5 / NUM_TOKENS, "y": 10})
        assert page.text_content("#slider-value") == "5"
        assert page.is_hidden("#looks")
        page.check("#looking")
        shade = page.evaluate(
            "(({width, height}) => [...document.querySelector('#looks').getContext('2d')"
            ".getImageData(0, 0, width, height).data].filter((_, i) => i % 4 === 3))(document.querySelector('#looks'))"
        )
        weights = base64.b64decode(reading.attention)[4 * 16 : 5 * 16]
        assert shade == pytest.approx([0.85 * (255 - weight) for weight in weights], abs=1)


def test_dropped_and_pasted(model, serve):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (200, 30, 30)).save(buffer, "PNG")
    event = """(([type, key, data]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "a.png"));
        document.body.dispatchEvent(
            type === "paste" ? new ClipboardEvent(type, {bubbles: true, clipboardData: transfer})
            : new DragEvent(type, {bubbles: true, dataTransfer: transfer}));
    })"""
    data = base64.b64encode(buffer.getvalue()).decode()
    for kind in ("drop", "paste"):
        with open_page(serve(model).url) as page:
            page.wait_for_selector("body[data-ready]")
            page.evaluate(event, [kind, "", data])
            page.wait_for_selector("#result:not([hidden])")
            assert page.text_content("#about-original").startswith("from 20 \u00d7 30; complexity 0")


def test_queries(reading_model, model, serve):
    with open_page(serve(model).url) as page:
        page.wait_for_selector("body[data-ready]")
        assert page.is_hidden("#query")
    gallery = Gallery(reading_model)
    with open_page(serve(gallery).url) as page:
        give(page, PHOTO)
        before = page.evaluate("shown.reading.eos")
        page.fill("#query", "red cat")
        page.keyboard.press("Enter")
        until(page, lambda: page.evaluate("shown.reading.eos") != before)
        assert page.evaluate("shown.reading.eos") == pytest.approx(gallery.read(PHOTO.read_bytes(), "red cat").eos)


def test_what_goes_wrong_is_said(model, serve, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_text("hello")
    (tmp_path / "large.png").write_bytes(bytes(2 << 20))
    monkeypatch.setattr(demo_server, "MAX_BYTES", 1 << 20)
    gallery = Gallery(model, keep=1)
    server = serve(gallery)
    with open_page(server.url, may_fail=True) as page:
        page.wait_for_selector("body[data-ready]")
        page.set_input_files("#file", tmp_path / "a.jpg")
        page.wait_for_selector("#error:not([hidden])")
        assert re.match("this picture cannot be read: not an image", page.text_content("#error"))
        assert page.is_hidden("#result") and page.get_attribute("#error", "role") == "alert"
        assert [problem for problem in page.problems if "422" not in problem] == []
        page.set_input_files("#file", tmp_path / "large.png")
        page.wait_for_selector("#error:has-text('more than the 1 that are taken')")
        # The next good picture takes the message away.
        give(page, PHOTO)
        assert page.is_hidden("#error") and page.text_content("#status") == ""
        fetched(page, NUM_TOKENS)
        # An older picture, once it is no longer kept.
        gallery.read(PHOTO.read_bytes())
        page.evaluate("shown.made.delete(7)")
        page.fill("#slider", "7")
        page.wait_for_selector("#error:has-text('no longer kept')")
        server.close()
        page.set_input_files("#file", PHOTO)
        page.wait_for_selector("#error:has-text('The demo does not answer')")
