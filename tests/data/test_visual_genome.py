"""Visual Genome's files, as it lays them out and broken."""

from __future__ import annotations

import json

import pytest

from dove_fast.data.regions import EMPTY_TEXT, MALFORMED, NO_AREA, NO_PICTURE, NOT_A_BOX, OUTSIDE
from dove_fast.data.visual_genome import MALFORMED_IMAGE_DATA, NO_BOXES, NO_IMAGE_DATA, VisualGenome

IMAGE_DATA = [
    {"image_id": 1, "width": 800, "height": 600, "url": "https://example.org/1.jpg", "coco_id": None},
    {"image_id": 2, "width": 500, "height": 281, "url": "https://example.org/2.jpg", "coco_id": 7},
    {"image_id": 3, "width": 10, "height": 10, "url": "https://example.org/3.jpg", "coco_id": None},
]


def region(**changes):
    return {"region_id": 9, "image_id": 1, "phrase": "a clock", "x": 10, "y": 20, "width": 30, "height": 40, **changes}


def question(a_objects=(), q_objects=(), **changes):
    return {
        "qa_id": 5,
        "image_id": 1,
        "question": "Where is it?",
        "answer": "Here.",
        "a_objects": list(a_objects),
        "q_objects": list(q_objects),
        **changes,
    }


def thing(x, y, w, h):
    return {"object_id": 4, "x": x, "y": y, "w": w, "h": h, "names": ["thing"], "synsets": ["thing.n.01"]}


@pytest.fixture
def made(tmp_path):
    """Returns a function that lays out Visual Genome with these entries and reads it."""

    def make(regions=(), questions=(), image_data=IMAGE_DATA, **options):
        for name in ("VG_100K/1.jpg", "VG_100K_2/2.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        for name, content in (
            ("image_data", image_data),
            ("region_descriptions", [{"id": 1, "regions": regions}]),
            ("question_answers", [{"id": 1, "qas": questions}]),
        ):
            content = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(content)
        return VisualGenome(tmp_path, **options)

    return make


def test_descriptions_come_before_questions_each_with_its_region(made, tmp_path):
    genome = made(
        [region(), region(image_id=2, phrase="Trees ", x=0.5)],
        [question([thing(1, 2, 3, 4)], [thing(5, 6, 7, 8), thing(1, 2, 3, 4)])],
    )
    assert [(sample.text, sample.boxes, sample.frame) for sample in genome] == [
        ("a clock", ((10, 20, 40, 60),), (800, 600)),
        ("Trees", ((0.5, 20, 30.5, 60),), (500, 281)),
        ("Where is it?", ((1, 2, 4, 6), (5, 6, 12, 14)), (800, 600)),
    ]
    assert [sample.picture.key for sample in genome] == ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/1.jpg"]
    assert genome[1].picture.path == str(tmp_path / "VG_100K_2/2.jpg")
    assert genome.left_out == {}


def test_one_part_needs_no_file_of_the_other(made, tmp_path):
    made([region()], [question([thing(1, 2, 3, 4)])])
    (tmp_path / "question_answers.json").rename(tmp_path / "elsewhere.json")
    assert [sample.text for sample in VisualGenome(tmp_path, questions=False)] == ["a clock"]
    (tmp_path / "elsewhere.json").rename(tmp_path / "question_answers.json")
    (tmp_path / "region_descriptions.json").unlink()
    assert [sample.text for sample in VisualGenome(tmp_path, descriptions=False)] == ["Where is it?"]
    with pytest.raises(ValueError, match="both False"):
        VisualGenome(tmp_path, questions=False, descriptions=False)


def test_ids_of_older_releases_and_of_the_entry_are_read(made):
    older = [{"id": entry["image_id"], **entry} for entry in IMAGE_DATA]
    for entry in older:
        del entry["image_id"]
    item = region()
    del item["image_id"]
    assert [sample.frame for sample in made([item], image_data=older)] == [(800, 600)]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (region(phrase=" "), EMPTY_TEXT),
        (region(phrase=None), MALFORMED),
        (region(image_id="1"), MALFORMED),
        (region(image_id=True), MALFORMED),
        (region(image_id=77), NO_IMAGE_DATA),
        (region(image_id=3), NO_PICTURE),
        (region(width=0), NO_AREA),
        (region(height=-3), NO_AREA),
        (region(x=800), OUTSIDE),
        (region(x=float("nan")), NOT_A_BOX),
        (region(y=float("inf")), NOT_A_BOX),
        (region(y="20"), NOT_A_BOX),
        (region(y=True), NOT_A_BOX),
        (region(width=None), NOT_A_BOX),
        (region(x=10**400), NOT_A_BOX),
        ("a clock", MALFORMED),
        (None, MALFORMED),
    ],
)
def test_descriptions_that_say_no_region_are_left_out(made, item, reason):
    genome = made([region(phrase="before"), item, region(phrase="after")])
    assert [sample.text for sample in genome] == ["before", "after"]
    assert genome.left_out == {reason: 1}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (question(), NO_BOXES),
        (question([thing(1, 2, 3, 4)], question=""), EMPTY_TEXT),
        (question([thing(1, 2, 3, 4)], question=3), MALFORMED),
        (question([thing(1, 2, 3, 4)], [thing(1, 2, 0, 4)]), NO_AREA),
        (question([thing(1, 2, 3, 4)], ["thing"]), NOT_A_BOX),
        (question([thing(1, 2, 3, 4)], [{"object_id": 4}]), NOT_A_BOX),
        ({**question([thing(1, 2, 3, 4)]), "q_objects": "none"}, NOT_A_BOX),
    ],
)
def test_questions_that_say_no_region_are_left_out(made, item, reason):
    kept = question([thing(1, 2, 3, 4)], question="Kept?")
    genome = made(questions=[kept, item, kept])
    assert [sample.text for sample in genome] == ["Kept?", "Kept?"]
    assert genome.left_out == {reason: 1}


def test_entries_that_are_not_of_the_layout_are_counted(made, tmp_path):
    broken = [*IMAGE_DATA, {"image_id": 4, "width": 0, "height": 5}, {"width": 5, "height": 5}, 7]
    made([region()], image_data=broken)
    entries = [{"id": 1}, {"id": 1, "regions": None}, 3, {"id": 1, "regions": [region()]}]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(entries))
    genome = VisualGenome(tmp_path)
    assert len(genome) == 1
    assert genome.left_out == {MALFORMED_IMAGE_DATA: 3, MALFORMED: 3}


@pytest.mark.parametrize("name", ["image_data", "region_descriptions", "question_answers"])
@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"regions": []}', "[", "[{}", "[{},]", "[{}] []", "[] 1", "[{}]", "[1, 2]", "[" * 100_000, b"[\xff]"],
)
def test_a_file_of_another_shape_is_named(made, tmp_path, name, content):
    made([region()], [question()])
    path = tmp_path / f"{name}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name}\.json (is not a JSON list|has no entry)"):
        VisualGenome(tmp_path)


def test_lists_are_read_however_they_are_spaced(made, tmp_path):
    made([region()])
    entries = json.dumps([{"id": 1, "regions": [region(), region()]}] * 3, indent=2)
    (tmp_path / "region_descriptions.json").write_bytes(b"\xef\xbb\xbf\r\n " + entries.encode() + b"\n")
    (tmp_path / "question_answers.json").write_text(" [ ] ")
    assert len(VisualGenome(tmp_path)) == 6


@pytest.mark.parametrize("name", ["image_data.json", "region_descriptions.json", "question_answers.json"])
def test_a_file_that_is_not_there_is_named(made, tmp_path, name):
    made()
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {name} in .*: unpack {name}\.zip"):
        VisualGenome(tmp_path)


def test_pictures_may_lie_elsewhere_and_in_one_folder(made, tmp_path):
    made([region()])
    with pytest.raises(FileNotFoundError, match=r"no VG_100K or VG_100K_2 in .*: unpack .*images\.zip"):
        VisualGenome(tmp_path, images=tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "VG_100K").rename(tmp_path / "pictures/VG_100K")
    (sample,) = VisualGenome(tmp_path, images=tmp_path / "pictures")
    assert sample.picture.key == "VG_100K/1.jpg"
    assert sample.picture.path == str(tmp_path / "pictures/VG_100K/1.jpg")
