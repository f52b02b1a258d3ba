"""The report: one file that loads nothing, whose drawings and tables have the right numbers."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from made_stores import write
from PIL import Image

from dove_fast.atomic import is_temporary
from dove_fast.jobs.report import Curve, Extreme, Extremes, ReportData, RunFigures, store_report, write_report
from dove_fast.store.records import InputError

NASTY = "a/<script>alert('x')</script>&\"ü猫.jpg"
# Elements that have no end.
VOID = {"meta", "img", "br", "rect", "line", "polyline"}
LENGTHS = np.array([1, 1, 2, 3, 5, 16], np.int32)


class Page(HTMLParser):
    """What a page consists of: `elements`, each a name, its attributes and the text directly in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID or not self.get_starttag_text().endswith("/>"):
            self._open.append((tag, self.elements[-1][2]))
        if tag in ("meta", "img", "br"):
            self._open.pop()

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][1].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def rows(self) -> dict[str, str]:
        return dict(zip(self.texts("th"), self.texts("td"), strict=True))


def figures(**changes) -> RunFigures:
    values = {
        "computed": 6,
        "seconds": 4.0,
        "device": "cpu",
        "shares": {"decode": 0.351, "write": 0.01},
        "throughput": [(1.0, 2.0), (2.0, 4.0), (4.0, 1.0)],
        "longest": [Extreme("a", 16, pixels(0))],
        "shortest": [Extreme("b", 1, pixels(1))],
    }
    return RunFigures(**(values | changes))


def data(**changes) -> ReportData:
    """Return what a report shows; changes of the run's figures are found by their names."""
    values = {
        "title": "photos",
        "lengths": LENGTHS,
        "num_tokens": 16,
        "settings": {"length": None, "transform": {"name": "crop", "size": 64}, "eos_threshold": 0.5},
        "run": figures(**{name: changes.pop(name) for name in [*changes] if name in RunFigures.__dataclass_fields__}),
    }
    return ReportData(**(values | changes))


def written(tmp_path, **changes) -> Page:
    write_report(tmp_path / "report.html", data(**changes))
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def pixels(seed: int, size: int = 16) -> torch.Tensor:
    return torch.randint(256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_error_of_int8_is_said(tmp_path):
    assert "1.23e-02" in written(tmp_path, quantization_error=0.0123).texts("td")
    assert "int8 error" not in written(tmp_path).texts("th")


def test_the_tables_say_what_was_done(tmp_path):
    page = written(tmp_path)
    assert page.texts("h1") == page.texts("title")[:1] == ["photos"]
    assert page.rows() == {
        "images": "6",
        "tokens": "28",
        "mean length": "4.67",
        "errors": "0",
        "computed": "6",
        "seconds": "4.0",
        "images/s": "1.5",
        "decode busy": "35.1%",
        "write busy": "1.0%",
        "device": "cpu",
        "transform.name": "crop",
        "transform.size": "64",
        "eos_threshold": "0.5",
    }


def test_what_is_the_runs_is_not_taken_for_the_stores(tmp_path):
    page = written(tmp_path, computed=2)
    of_store, of_run = (
        ["Summary", "Lengths"],
        [
            *("This run", "Throughput of this run", "Most tokens of this run", "Fewest tokens of this run"),
        ],
    )
    assert page.texts("h2") == [*of_store, *of_run, "Settings"]
    assert page.texts("p")[1:] == []
    rows = page.rows()
    assert (rows["images"], rows["computed"], rows["images/s"]) == ("6", "2", "0.5")
    assert "images/s" not in written(tmp_path, computed=0, seconds=0.0).rows()


def test_bars_are_as_high_as_their_counts(tmp_path):
    page = written(tmp_path)
    bars = page.attributes("rect")
    heights = [float(bar["height"]) for bar in bars]
    assert [height / heights[0] for height in heights[:6]] == pytest.approx([1, 0.5, 0.5, 0, 0.5, 0], abs=1e-3)
    assert heights[15] == heights[1] and sum(heights[6:15]) == 0
    _, _, wide, high = (float(value) for value in page.attributes("svg")[0]["viewbox"].split())
    assert heights[0] > high / 2
    for bar in bars:
        x, y, width, height = (float(bar[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0 and x + width <= wide
        assert y + height == pytest.approx(float(bars[0]["y"]) + heights[0], abs=0.02)
    titles = page.texts("title")[1:]
    assert (titles[0], titles[3], titles[15]) == ("length 1: 2", "length 4: 0", "length 16: 1")


def test_bars_may_stand_for_several_lengths(tmp_path):
    page = written(tmp_path, num_tokens=64)
    assert page.texts("title")[1:4] == ["length 1-4: 4", "length 5-8: 1", "length 9-12: 0"]
    assert len(page.attributes("rect")) == 16


def test_the_line_is_the_throughput(tmp_path):
    page = written(tmp_path)
    (line,) = page.attributes("polyline")
    points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
    assert len(points) == 3
    (axis,) = {float(item["y1"]) for item in page.attributes("line")} - {points[1][1]}
    # 2, 4 and 1 images/s, of which 4 is at the top.
    heights = [(axis - y) / (axis - points[1][1]) for _, y in points]
    assert heights == pytest.approx([0.5, 1, 0.25], abs=1e-3)
    left = float(page.attributes("line")[0]["x1"])
    assert [(x - left) / (points[2][0] - left) for x, _ in points] == pytest.approx([0.25, 0.5, 1], abs=1e-3)
    assert "4.0" in page.texts("text") and "4 s" in page.texts("text")
    assert written(tmp_path, throughput=[(1.0, 2.0)]).attributes("polyline") == []


def test_images_are_in_the_page(tmp_path):
    longest = [Extreme(NASTY, 16, pixels(0)), Extreme("b.jpg", 5, pixels(1, 200))]
    page = written(tmp_path, longest=longest, shortest=[Extreme("c.jpg", 1, pixels(2))])
    assert page.texts("figcaption") == [f"{NASTY}16 tokens", "b.jpg5 tokens", "c.jpg1 token"]
    assert [image["alt"] for image in page.attributes("img")] == [NASTY, "b.jpg", "c.jpg"]
    shown = []
    for image in page.attributes("img"):
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True)))))
    np.testing.assert_array_equal(shown[0], pixels(0).permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(shown[2], pixels(2).permute(1, 2, 0).numpy())
    assert shown[1].shape == (128, 128, 3)


def test_the_first_errors_are_named(tmp_path):
    errors = [InputError(f"{index}.jpg", f"photos/{index}.jpg", f"reason {index}") for index in range(1234)]
    page = written(tmp_path, errors=errors)
    rows = page.rows()
    assert rows["errors"] == "1,234"
    assert [rows.get(f"{index}.jpg") for index in (0, 99, 100)] == ["reason 0", "reason 99", None]
    assert "and 1,134 more, see errors.jsonl" in page.texts("p")
    page = written(tmp_path, errors=errors[:100])
    assert page.rows()["99.jpg"] == "reason 99"
    assert not any("more" in text for text in page.texts("p"))


def test_nothing_is_taken_for_markup(tmp_path):
    error = InputError(NASTY, "x", "<b>broken</b> & 'cut' \udcff")
    page = written(tmp_path, title=NASTY, device=NASTY, settings={NASTY: NASTY}, errors=[error], shares={"<i>": 0.5})
    assert page.texts("h1") == [NASTY]
    rows = page.rows()
    assert rows["device"] == NASTY
    assert "<i> busy" in rows
    # The setting comes last, behind the error of the same name.
    assert rows[NASTY] == NASTY
    assert "<b>broken</b> & 'cut' \\udcff" in page.texts("td")
    names = {name for name, _, _ in page.elements}
    assert not names & {"script", "b", "i", "link", "iframe", "object", "base"}


def test_the_page_loads_and_runs_nothing(tmp_path):
    page = written(tmp_path, longest=[Extreme("a", 1, pixels(0))], shortest=[], errors=[InputError("k", "s", "r")])
    for _, attributes, _ in page.elements:
        assert not any(name.startswith("on") or name in ("href", "srcset", "style") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    for part in ("http", "url(", "@import", "//"):
        assert part not in text.replace(page.attributes("img")[0]["src"], "")
    assert page.attributes("meta")[0] == {"charset": "utf-8"}
    assert "prefers-color-scheme: dark" in text


def test_no_images_and_no_errors(tmp_path):
    page = written(
        tmp_path,
        lengths=np.zeros(0, np.int32),
        computed=0,
        throughput=[],
        shares={},
        settings={},
        longest=[],
        shortest=[],
    )
    rows = {"images": "0", "tokens": "0", "errors": "0", "computed": "0", "seconds": "4.0", "device": "cpu"}
    assert page.rows() == rows
    assert page.texts("h2") == ["Summary", "This run"]
    assert page.texts("p") == []
    assert page.attributes("svg") == page.attributes("img") == []
    assert "nan" not in (tmp_path / "report.html").read_text(encoding="utf-8").lower()


def test_a_run_without_speed_is_drawn_flat(tmp_path):
    (line,) = written(tmp_path, throughput=[(0.0, 0.0), (0.0, 0.0)]).attributes("polyline")
    assert len(set(line["points"].split())) == 1


def test_an_earlier_report_is_replaced_whole(tmp_path):
    (tmp_path / "report.html").write_text("earlier" * 100000, encoding="utf-8")
    assert written(tmp_path).rows()["images"] == "6"
    assert not any(is_temporary(path.name) for path in tmp_path.iterdir())
    with pytest.raises(AttributeError):
        written(tmp_path, longest=[None])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "none" / "report.html", data())


NO_PICTURES = "The longest and the shortest images are not shown: the process that wrote this page did not see them."


def test_a_page_without_pictures_says_so(tmp_path):
    page = written(tmp_path, longest=[], shortest=[])
    assert page.texts("p")[1:] == [NO_PICTURES]
    assert page.texts("h2") == ["Summary", "Lengths", "This run", "Throughput of this run", "Settings"]


def test_a_page_without_a_run_tells_of_the_store(tmp_path):
    page = written(tmp_path, run=None)
    assert page.texts("h2") == ["Summary", "Lengths", "Settings"]
    assert page.texts("p")[1:] == [NO_PICTURES]
    assert not {"computed", "seconds", "device"} & page.rows().keys()


def test_a_report_on_a_store(tmp_path):
    found = store_report(write(tmp_path / "s", bad=frozenset({2})), None)
    assert (found.title, len(found.lengths), found.run) == ("Token store s", 7, None)
    assert [error.key for error in found.errors] == ["k2"]
    assert found.settings["fingerprint"] == "sha256:0"
    # Hundreds of numbers, which `info` shows.
    assert "config" not in found.settings


def test_a_curve_has_a_point_for_every_second():
    curve = Curve()
    for tenth in range(35):
        curve.add(tenth / 10, tenth)
    assert curve.rates() == [(1.0, 10.0), (2.0, 10.0), (3.0, 10.0)]


def test_a_curve_of_weeks_is_thinned_and_keeps_its_images():
    curve = Curve(most=100)
    for second in range(1, 100_001):
        # Twice as fast in the second half.
        curve.add(float(second), second + max(second - 50_000, 0))
    rates = curve.rates()
    assert 50 <= len(rates) <= 100
    # As far apart everywhere, and to the end.
    steps = {end - start for (start, _), (end, _) in pairwise([(0.0, 0.0), *rates])}
    assert len(steps) == 1
    assert rates[-1][0] > 98_000
    assert (rates[0][1], rates[-1][1]) == (1.0, 2.0)
    assert sum(rate * steps.copy().pop() for _, rate in rates) == rates[-1][0] * 2 - 50_000


def test_extremes_are_those_of_a_sort():
    lengths = np.random.default_rng(0).integers(1, 9, 200).tolist()
    extremes = Extremes(5)
    for index, length in enumerate(lengths):
        extremes.add(str(index), length, torch.full((3, 2, 2), index, dtype=torch.uint8))
    # Python's sort keeps equal ones in order of arrival.
    by_length = sorted(range(200), key=lambda index: lengths[index])
    longest = sorted(range(200), key=lambda index: -lengths[index])
    for found, expected in ((extremes.shortest, by_length[:5]), (extremes.longest, longest[:5])):
        assert [(extreme.key, extreme.length) for extreme in found] == [(str(i), lengths[i]) for i in expected]
        assert all((extreme.pixels == int(extreme.key)).all() for extreme in found)


def test_fewer_images_than_places_are_in_both():
    extremes = Extremes()
    assert extremes.longest == extremes.shortest == []
    for key, length in (("a", 2), ("b", 7)):
        extremes.add(key, length, pixels(0))
    assert [extreme.key for extreme in extremes.longest] == ["b", "a"]
    assert [extreme.key for extreme in extremes.shortest] == ["a", "b"]


def test_kept_pixels_are_copies_of_their_own():
    batch = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    extremes = Extremes(1)
    extremes.add("a", 3, batch[1])
    batch.fill_(255)
    (kept,) = extremes.longest
    assert kept.pixels.max() == 0
    assert kept.pixels.untyped_storage().nbytes() == 3 * 8 * 8
    assert extremes.shortest[0].pixels is kept.pixels


def test_extremes_refuse_what_is_no_picture():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Extremes(0)
    with pytest.raises(TypeError, match=r"pixels must be uint8, got torch\.float32"):
        Extremes().add("a", 1, torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"pixels must be \(3, S, S\), got \(4, 4\)"):
        Extremes().add("a", 1, torch.zeros(4, 4, dtype=torch.uint8))
