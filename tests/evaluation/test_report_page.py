"""The report: one file that loads nothing, with every picture and number, in a real browser too."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import broken_images, open_page, overflows
from made_evaluations import made_evaluation
from PIL import Image
from small_models import micro_model, sample_images

from dove_fast.atomic import is_temporary
from dove_fast.evaluation import laplacian_variance
from dove_fast.evaluation.portrait import answers, take_portrait
from dove_fast.evaluation.report_page import ReportPage, write_report
from dove_fast.evaluation.results import Evaluation
from dove_fast.evaluation.shown import ShownImages, ShownRegion
from dove_fast.store.records import InputError

NASTY = "a/<script>alert('x')</script>&\"ü猫.jpg"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(HTMLParser):
    """Elements by name with their attributes and all text inside; asserts that they are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self._open.append((tag, self.elements[-1][2]))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, text in self._open:
            text.append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def evaluation() -> Evaluation:
    """Return one with texts that look like markup, and without an rFID."""
    made = made_evaluation(warnings=("few images",))
    context = dataclasses.replace(made.context, data="photos/<b>", device_name="A & B")
    return dataclasses.replace(
        made, context=context, rows=tuple(dataclasses.replace(row, rfid=None) for row in made.rows)
    )


class Words:
    """A tokenizer of numbers."""

    def encode(self, text):
        return torch.tensor([int(word) for word in text.split()])


@pytest.fixture(scope="module")
def page() -> ReportPage:
    model = micro_model()
    model.tokenizer = Words()
    images = (sample_images(5) * 255).round().to(torch.uint8)
    complexity = laplacian_variance(images)
    order = complexity.argsort()
    keys = ("a.jpg", NASTY, "c.jpg", "d.jpg", "e.jpg")
    shown = ShownImages(keys, images[order], complexity[order], 99, (InputError("bad.jpg", "x", "<i>cut</i>"),))
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 4:8, 2:10] = True
    regions = [ShownRegion("r.jpg", "3 9", images[0], ((2, 4, 10, 8),), mask)]
    return ReportPage(
        title=f"Report {NASTY}",
        facts=[("checkpoint", "model/"), ("device", "cpu, float32")],
        shown=shown,
        portrait=take_portrait(model, shown.pixels),
        evaluation=evaluation(),
        regions=regions,
        with_text=answers(model, regions, with_text=True),
        without_text=answers(model, regions, with_text=False),
        notes=["Note <this>."],
    )


@pytest.fixture(scope="module")
def written(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, page)
    return path


@pytest.fixture(scope="module")
def parsed(written) -> Parsed:
    return Parsed(written.read_text(encoding="utf-8"))


def pixels_of(image: dict) -> np.ndarray:
    kind, _, content = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))


def by_alt(parsed: Parsed) -> dict[str, np.ndarray]:
    return {image["alt"]: pixels_of(image) for image in parsed.all("img")}


def test_the_page_loads_and_runs_nothing(written, parsed):
    text = written.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r'src="data:image/png;base64,[^"]*"', "", text))
    names = {name for name, _, _ in parsed.elements}
    assert not names & {"script", "link", "iframe", "object", "base", "i", "b"}
    for _, attributes, _ in parsed.elements:
        assert not any(name.startswith("on") or name in ("srcset", "style") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert "prefers-color-scheme: dark" in text


def test_links_lead_to_sections_and_every_picture_has_a_text(parsed):
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"].removeprefix("#") for link in parsed.all("a")]
    assert set(links) <= set(ids) and {"strip", "eos", "figures", "features", "attention", "regions"} <= set(links)
    assert all(image["alt"] for image in parsed.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in parsed.all("svg"))
    assert parsed.texts("h1") == parsed.texts("title")[:1] == [f"Report {NASTY}"]


def test_pictures_are_what_the_model_made(page, parsed):
    shown = by_alt(parsed)
    portrait = page.portrait

    def pixels(picture):
        return (picture * 255).round().byte().permute(1, 2, 0).numpy()

    for index, key in enumerate(page.shown.keys):
        np.testing.assert_array_equal(shown[f"original: {key}"], page.shown.pixels[index].permute(1, 2, 0).numpy())
        for count in (2, 4, 8, 16):
            made = shown[f"{key} from {count} tokens"]
            np.testing.assert_array_equal(made, pixels(portrait.frames[count].pictures[index]))
        np.testing.assert_array_equal(shown[f"{key} through the VQGAN alone"], pixels(portrait.vqgan[index]))
        length = portrait.adaptive.lengths[index]
        name = f"{key} from the {length} token{'s' if length > 1 else ''} that EOS chooses"
        np.testing.assert_array_equal(shown[name], pixels(portrait.adaptive.pictures[index]))
        assert shown[f"features of {key} with 16 tokens"].shape == (4, 4, 3)
    assert shown["where token 16 of a.jpg looks in layer 2"].shape == (128, 128, 3)
    assert sum("who reads token" in name for name in shown) == 2 * 5
    np.testing.assert_array_equal(shown["r.jpg with the text"], pixels(page.with_text[0].picture))
    np.testing.assert_array_equal(shown["r.jpg without the text"], pixels(page.without_text[0].picture))


def test_large_pictures_are_whole(page, tmp_path):
    """Of a model of more than 128 pixels a side no detail is lost; heads of later sections are thumbnails."""
    large = torch.rand(5, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    images = (sample_images(5, image_size=160) * 255).round().to(torch.uint8)

    def enlarged(frame):
        return dataclasses.replace(frame, pictures=large)

    portrait = dataclasses.replace(
        page.portrait,
        frames={count: enlarged(frame) for count, frame in page.portrait.frames.items()},
        adaptive=enlarged(page.portrait.adaptive),
        vqgan=large,
    )
    shown = dataclasses.replace(page.shown, keys=tuple("abcde"), pixels=images)
    regions = [dataclasses.replace(page.regions[0], key="r", pixels=images[0], boxes=((20, 40, 100, 80),))]
    both = [[dataclasses.replace(side[0], picture=large[0])] for side in (page.with_text, page.without_text)]
    write_report(tmp_path / "r.html", ReportPage("Large", [], shown, portrait, None, regions, *both))
    pictures = Parsed((tmp_path / "r.html").read_text(encoding="utf-8")).all("img")
    found = [(image["alt"], pixels_of(image)) for image in pictures]
    made = dict(found)["a from 2 tokens"]
    expected = (portrait.frames[2].pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(made, expected)
    assert dict(found)["r with the region: 3 9"].shape == dict(found)["r with the text"].shape == (160, 160, 3)
    originals = [pixels.shape[0] for alt, pixels in found if alt == "original: a"]
    assert originals[0] == 160 and set(originals[1:]) == {128}


def test_captions_have_the_numbers(page, parsed):
    captions = parsed.texts("figcaption")
    portrait = page.portrait
    for index, length in enumerate(portrait.adaptive.lengths):
        assert f"{length} token{'s' if length > 1 else ''}{portrait.adaptive.psnr[index]:.1f} dB" in captions
        stopped = bool(portrait.eos[index, length - 1] > portrait.threshold)
        assert (f"stops at token {length}" if stopped else "does not stop: all 16 tokens") in captions
    answer = page.with_text[0]
    tokens = f"{answer.length} token{'s' if answer.length > 1 else ''}"
    assert f"with the text{tokens}inside {answer.psnr_inside:.1f} dBoutside {answer.psnr_outside:.1f} dB" in captions
    share = portrait.attention.on_image[1, 0, 15]
    assert f"{share:.0%}" in captions
    text = "".join(parsed.texts("body"))
    for part in ("Note <this>.", "bad.jpg", "<i>cut</i>", "cpu, float32"):
        assert part in text


def test_curves_stop_where_eos_is(page, parsed):
    curves = [drawing for drawing in parsed.all("svg") if drawing["aria-label"].startswith("EOS probability of")]
    assert len(curves) == 5
    lines = [line["points"].split() for line in parsed.all("polyline") if line["class"] == "line"][:5]
    # A line of the steps that are kept, in the order of the images.
    assert [len(line) for line in lines] == list(page.portrait.adaptive.lengths)


def test_figures_of_the_evaluation(parsed):
    text = "".join(parsed.texts("body"))
    for part in (
        *("1,234 images of photos/<b>", "A & B", "Few images.", "20.00", "21.00", "22.00", "23.00", "13.5 to 33.8"),
        *("2.8 of 4 tokens", "5%: 1, 50%: 3, 95%: 4", "correlation of all: 0.72", "3.5 tokens with the text"),
        *("pooled tokens", "left out: no backbone weights", "sha256 0123abcd", "path/to/vqgan, sha256:def"),
        "N = 1,234",
    ):
        assert part in text, part
    cells = parsed.texts("td")
    assert {"29.03", "26.02", "1,400", "397"} <= set(cells)
    # A row of quality: tokens, measures, the spread, what it costs, its codewords.
    expected = ["2.0", "21.00", "0.8100", "0.2200", "11.5 to 31.8", "2.62", "256", "28 of 32", "22.8"]
    start = cells.index("21.00") - 1
    assert cells[start : start + len(expected)] == expected
    # Of regions: without the text.
    assert cells[(at := cells.index("28.24")) - 2 : at + 2] == ["without", "4.2", "28.24", "25.61"]
    heads = parsed.texts("th")
    # Nobody measured the rFID, so that it has no column.
    columns = [head for head, item in zip(heads, parsed.all("th"), strict=True) if item.get("scope") == "col"]
    assert "LPIPS, lower is better" in columns and not any("rFID" in head for head in columns) and "rFID" in heads
    # Of five images, of three measures at two fixed lengths and the adaptive one, and of three points.
    assert len(parsed.all("circle")) == 5 + 3 * 3 + 3
    bars = [float(bar["height"]) for bar in parsed.all("rect")]
    assert [bar / max(bars) for bar in bars] == pytest.approx([0.5, 0.25, 1, 0.75], abs=1e-3)


def test_without_an_evaluation_and_without_regions(page, tmp_path):
    shown = dataclasses.replace(page.shown, errors=())
    bare = dataclasses.replace(
        page, evaluation=None, regions=(), with_text=(), without_text=(), notes=(), shown=shown
    )  # fmt: skip
    write_report(tmp_path / "r.html", bare)
    parsed = Parsed((tmp_path / "r.html").read_text(encoding="utf-8"))
    heads = ["Summary", "Pictures by tokens", "Where to stop", "Features of the token decoder", "Where tokens look"]
    assert parsed.texts("h2") == heads
    assert any("dove-fast evaluate" in text for text in parsed.texts("p"))


def test_a_vqgan_that_is_no_baseline_is_called_so(page, tmp_path):
    def warned(level: float, *, own: bool = True) -> bool:
        portrait = dataclasses.replace(page.portrait, vqgan_psnr=torch.full((5,), level))
        write_report(tmp_path / "r.html", dataclasses.replace(page, portrait=portrait, own_vqgan=own))
        return "no baseline" in (tmp_path / "r.html").read_text(encoding="utf-8")

    assert warned(1.0) and not warned(99.0)
    # One that somebody named is as it is.
    assert not warned(1.0, own=False)


def test_one_image(page, tmp_path):
    model = micro_model()
    image = page.shown.pixels[:1]
    shown = ShownImages(("a",), image, torch.zeros(1), 1)
    write_report(tmp_path / "r.html", ReportPage("One", [], shown, take_portrait(model, image)))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    Parsed(text)
    assert "nan" not in re.sub(r'src="[^"]*"', "", text).lower()


def test_an_earlier_report_is_replaced_whole(page, tmp_path):
    (tmp_path / "r.html").write_text("what was here")
    with pytest.raises(AttributeError):
        write_report(tmp_path / "r.html", dataclasses.replace(page, evaluation="none"))
    assert (tmp_path / "r.html").read_text() == "what was here"
    write_report(tmp_path / "r.html", page)
    assert "what was here" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not any(is_temporary(path.name) for path in tmp_path.iterdir())


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_in_a_browser(written, page, width, dark):
    with open_page(written.as_uri(), width=width, dark=dark) as opened:
        assert broken_images(opened) == [] and not overflows(opened)
        assert opened.evaluate("document.images.length") > 100
        assert opened.title() == page.title
        # A picture and its text can be seen, and a link leads to it.
        opened.click("nav a[href='#attention']")
        assert opened.locator("#attention").is_visible()
        background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) is dark
        opened.locator("summary").last.click()
        assert opened.locator("img[alt='layer 2: who reads token 16']").is_visible()
