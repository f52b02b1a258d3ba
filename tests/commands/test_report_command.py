"""`dove-fast report`: the page it writes, and what it refuses before anything is computed."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import broken_images, open_page
from made_evaluations import made_evaluation
from made_pictures import add_bad, make_pictures
from made_shards import write_tar
from PIL import Image
from small_models import micro_model
from small_tokenizer import write_tokenizer

from dove_fast import DOVE
from dove_fast.cli import main
from dove_fast.evaluation.results import EVALUATION_NAME, Evaluation, write_evaluation
from dove_fast.text import TextTokenizer

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "micro"
    model = micro_model()
    model.tokenizer = TextTokenizer(write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def report(tmp_path, checkpoint, capsys):
    """Run the command on pictures; returns (exit code, stdout, stderr)."""
    photos = make_pictures(tmp_path / "photos", 4)

    def run(*arguments, model=checkpoint, data=photos, output=tmp_path / "out.html"):
        code = main(["report", *map(str, (model, data, output, "--device", "cpu", *arguments))])
        return code, *capsys.readouterr()

    return run


def test_the_shipped_model_on_photographs(tmp_path, report):
    output = tmp_path / "out.html"
    code, out, err = report("--images", 3, model="tiny", data=PHOTOS)
    assert (code, err) == (0, "")
    assert out.startswith(f"{output}: 3 of 7 images, ")
    text = output.read_text(encoding="utf-8")
    assert DOVE.from_pretrained("tiny").fingerprint() in text
    # The simplest and the most complex one are among them.
    assert {"original: rocket.jpg", "original: astronaut.jpg"} <= set(re.findall(r'alt="(original: [^"]*)"', text))
    # The tiny model's decoder was trained on with the tokens.
    assert "no baseline" in text
    with open_page(output.as_uri(), width=1280) as page:
        assert broken_images(page) == [] and page.title() == "What the tokens of tiny hold"


def shards(folder: Path) -> Path:
    """Write pictures with a text and a box that the tokenizer reads, and one whose text it cannot."""
    members = []
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        region = {"text": "a red cat" if index else " ".join(["cat"] * 40), "boxes": [[8, 4, 16, 12]]}
        members += [(f"{index}.png", buffer.getvalue()), (f"{index}.json", json.dumps(region).encode())]
    write_tar(folder / "r.tar", members)
    return folder


def test_texts_and_their_regions(tmp_path, report, checkpoint):
    data = shards(tmp_path / "shards")
    assert report("--images", 4, data=data)[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert text.count('with the region: a red cat"') == 3
    assert "cat cat" not in text
    # The same pictures without shards: there are no texts, and the page says so.
    assert report()[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "no text with a region was found" in text and "with the region" not in text
    assert DOVE.from_pretrained(checkpoint).tokenizer is not None


@pytest.mark.parametrize("named", ["pattern", "list", "pipe"])
def test_texts_of_shards_however_they_are_named(tmp_path, report, named):
    path = shards(tmp_path / "shards") / "r.tar"
    (tmp_path / "list.txt").write_text(f"{path}\n")
    data = {"pattern": path.with_name("*.tar"), "list": tmp_path / "list.txt", "pipe": f"pipe:cat {path}"}[named]
    assert report("--images", 4, data=data)[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert text.count('with the region: a red cat"') == (0 if named == "pipe" else 3)
    assert ("regions are read from shards that lie here, not from pipes and URLs" in text) == (named == "pipe")


def test_an_eos_threshold(tmp_path, report, checkpoint):
    write_evaluation(tmp_path / EVALUATION_NAME, evaluation_of(DOVE.from_pretrained(checkpoint).fingerprint()))
    assert report("--images", 2)[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "above a probability of 0.5" in text and "figures of the whole data were measured with" not in text
    assert report("--images", 2, "--eos-threshold", 0.25)[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "EOS above a probability of 0.5, the pictures are made with 0.25" in text
    assert "<td>above a probability of 0.25</td>" in text and "11.5 to 31.8" in text
    assert report("--eos-threshold", 2)[0] == 2


def test_a_page_has_so_many_images_at_most(report):
    code, _, err = report("--images", 65, model="nowhere")
    assert code == 2 and "a page shows at most 64 images, got 65" in err


def test_a_tokenizer_that_cannot_be_used_is_found_first(tmp_path, report, monkeypatch):
    monkeypatch.setattr("dove_fast.evaluation.report.choose_images", lambda *_, **__: pytest.fail("the work has begun"))
    data = shards(tmp_path / "shards")
    (tmp_path / "bad.json").write_text("{}")
    model = micro_model()
    model.tokenizer = TextTokenizer(tmp_path / "bad.json")
    model.save_pretrained(tmp_path / "model")
    code, _, err = report(data=data, model=tmp_path / "model")
    assert code == 2 and "no file of the tokenizers library" in err


def evaluation_of(fingerprint: str) -> Evaluation:
    made = made_evaluation()
    return dataclasses.replace(made, context=dataclasses.replace(made.context, fingerprint=fingerprint))


def test_an_evaluation_beside_the_page_or_named(tmp_path, report, checkpoint):
    fingerprint = DOVE.from_pretrained(checkpoint).fingerprint()
    (tmp_path / "figures").mkdir()
    write_evaluation(tmp_path / "figures" / EVALUATION_NAME, evaluation_of(fingerprint))
    assert report("--evaluation", tmp_path / "figures")[0] == 0
    assert "13.5 to 33.8" in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert report(output=tmp_path / "figures" / "r.html")[0] == 0
    assert "13.5 to 33.8" in (tmp_path / "figures" / "r.html").read_text(encoding="utf-8")
    # Another checkpoint's is left out where nobody named it, and refused where somebody did.
    write_evaluation(tmp_path / EVALUATION_NAME, evaluation_of("sha256:other"))
    assert report()[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "13.5 to 33.8" not in text and "is of another checkpoint" in text
    code, _, err = report("--evaluation", tmp_path)
    assert code == 2 and "sha256:other" in err and fingerprint in err
    # A file that is none does no harm where it merely lies there.
    (tmp_path / EVALUATION_NAME).write_text("{}")
    assert report()[0] == 0
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "beside this page is not shown, it cannot be read" in text and "not an evaluation" in text
    code, _, err = report("--evaluation", tmp_path)
    assert code == 2 and "not an evaluation" in err


def test_what_cannot_be_read_is_named(tmp_path, report):
    add_bad(tmp_path / "photos")
    code, out, err = report()
    assert code == 1 and "2 inputs could not be read" in err and "4 of 4 images" in out
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "05-cut.jpg" in text and "deep/zz-text.png" in text


def test_another_vqgan(tmp_path, report):
    micro_model(seed=5).save_pretrained(tmp_path / "other")
    assert report("--images", 2)[0] == 0
    own = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert report("--images", 2, "--vqgan", tmp_path / "other")[0] == 0
    other = (tmp_path / "out.html").read_text(encoding="utf-8")

    def alone(text):
        return re.findall(r'src="([^"]*)" alt="[^"]* through the VQGAN alone"', text)

    assert len(alone(own)) == 2 and alone(own) != alone(other)
    code, _, err = report("--vqgan", "tiny")
    assert code == 2 and "images" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "page.txt"}, "must end in .html, got 'page.txt'"),
        ({"output": "none/page.html"}, "no folder none"),
        ({"data": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_exit_2_for_what_cannot_be_used(report, arguments, message):
    code, _, err = report(**arguments)
    assert code == 2 and message in err


def test_refused_before_the_model_is_loaded(tmp_path, report):
    (tmp_path / "folder.html").mkdir()
    code, _, err = report(output=tmp_path / "folder.html", model="nowhere")
    assert code == 2 and "is a folder" in err
    code, _, err = report("--evaluation", tmp_path / "none", model="nowhere")
    assert code == 2 and "no evaluation at" in err
    assert report("--images", 0)[0] == 2


def test_help(capsys):
    assert main(["report", "--help"]) == 0
    out = capsys.readouterr().out
    assert "at its end; there is no errors.jsonl" in out
    assert "OUT.html" in out and "examples:" in out and "exit codes:" in out
