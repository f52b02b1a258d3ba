"""Open Images' files, as it lays them out and broken."""

from __future__ import annotations

import pickle

import pytest

from dove_fast.data import open_images
from dove_fast.data.open_images import NO_CONFIDENCE, UNKNOWN_LABEL, OpenImages
from dove_fast.data.regions import MALFORMED, NO_AREA, NO_PICTURE, NOT_A_BOX, OUTSIDE

VRD = "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,RelationshipLabel"
BBOX = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CLASSES = '/m/04yx4,Man\n/m/0342h,Guitar\n/m/04bcr3,Table\n/m/01h44,Bat (Animal)\n/m/0x,"Snow, ice"\n/m/0y,\n'

HOLDS = "a1,/m/04yx4,/m/0342h,0.25,0.5,0.125,1,0.375,0.75,0.5,0.625,holds"
WOODEN = "b2,/m/04bcr3,/m/083vt,0,0.5,0,1,0,0.5,0,1,is"
MAN = "a1,xclick,/m/04yx4,1,0.25,0.5,0.125,1,0,0,0,0,0"


@pytest.fixture
def made(tmp_path):
    """Returns a function that lays out Open Images with these lines and reads it."""

    def make(relationships=(HOLDS,), boxes=(MAN,), split="train", read_boxes=False):
        (tmp_path / split).mkdir(exist_ok=True)
        for name in ("a1", "b2"):
            (tmp_path / split / f"{name}.jpg").touch()
        for name, content in (
            ("class-descriptions-boxable.csv", CLASSES),
            ("oidv6-attributes-description.csv", "/m/083vt,Wooden\n/m/04lbp,(made of)Leather\n"),
            ("oidv6-relationships-description.csv", "at,at\nholds,holds\ninside_of,inside_of\n"),
            (f"oidv6-{split}-annotations-vrd.csv", "\n".join([VRD, *relationships, ""])),
            (f"oidv6-{split}-annotations-bbox.csv", "\n".join([BBOX, *boxes, ""])),
        ):
            (tmp_path / name).write_text(content)
        return OpenImages(tmp_path, split, boxes=read_boxes)

    return make


def test_a_relationship_has_its_three_names_and_both_boxes(made, tmp_path):
    images = made([HOLDS, WOODEN])
    assert [(sample.text, sample.boxes, sample.frame) for sample in images] == [
        ("man holds guitar", ((0.25, 0.125, 0.5, 1), (0.375, 0.5, 0.75, 0.625)), (1, 1)),
        ("table is wooden", ((0, 0, 0.5, 1),), (1, 1)),
    ]
    assert [sample.picture.key for sample in images] == ["train/a1.jpg", "train/b2.jpg"]
    assert images[0].picture.path == str(tmp_path / "train/a1.jpg")
    assert images.left_out == {}


@pytest.mark.parametrize(
    ("first", "relation", "second", "text"),
    [
        ("/m/01h44", "inside_of", "/m/0x", "bat (animal) inside of snow, ice"),
        ("/m/04bcr3", "is", "/m/04lbp", "table is made of leather"),
        ("/m/04bcr3", "at", "/m/04bcr3", "table at table"),
    ],
)
def test_names_are_made_words(made, first, relation, second, text):
    images = made([f"a1,{first},{second},0,1,0,1,0,1,0,1,{relation}"])
    assert [sample.text for sample in images] == [text]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (HOLDS.replace("/m/04yx4", "/m/none"), UNKNOWN_LABEL),
        (HOLDS.replace("/m/0342h", "/m/none"), UNKNOWN_LABEL),
        (HOLDS.replace("/m/0342h", "/m/0y"), UNKNOWN_LABEL),
        (HOLDS.replace("/m/0342h", "/m/083vt"), UNKNOWN_LABEL),
        (WOODEN.replace("/m/083vt", "/m/0342h"), UNKNOWN_LABEL),
        (HOLDS.replace("holds", "LabelName"), UNKNOWN_LABEL),
        (HOLDS.replace("a1", "c3"), NO_PICTURE),
        (HOLDS.replace("0.25", "0.5"), NO_AREA),
        (HOLDS.replace("0.375,0.75", "1,1.5"), OUTSIDE),
        (HOLDS.replace("0.25", "left"), NOT_A_BOX),
        (HOLDS.replace("0.25", ""), NOT_A_BOX),
        (HOLDS.replace("0.25", "nan"), NOT_A_BOX),
        (HOLDS.replace("0.75", "inf"), NOT_A_BOX),
        (HOLDS.replace("0.75", "1e999"), NOT_A_BOX),
        (HOLDS + ",more", MALFORMED),
        ("a1,/m/04yx4", MALFORMED),
    ],
)
def test_relationships_that_say_no_region_are_left_out(made, line, reason):
    images = made([WOODEN, line, WOODEN])
    assert [sample.text for sample in images] == ["table is wooden", "table is wooden"]
    assert images.left_out == {reason: 1}


def test_boxes_partly_outside_are_clipped_and_odd_numbers_are_read(made):
    # The last value is no number, so that all values of the column are looked at one by one.
    images = made([WOODEN.replace("0,0.5,0,1,is", "-0.5, .5 ,-1e-3,1.25,is"), WOODEN.replace("1,is", "x,is")])
    assert images[0].boxes == ((0, 0, 0.5, 1),)
    assert images.left_out == {NOT_A_BOX: 1}


def test_boxes_have_the_names_of_their_classes(made):
    lines = [
        MAN,
        "b2,activemil,/m/0342h,1,0,0.5,0,0.25,0,0,1,1,0",
        MAN.replace(",1,0.25", ",0,0.25"),
        MAN.replace(",1,0.25", ",sure,0.25"),
        MAN.replace("a1", "c3"),
        MAN.replace("/m/04yx4", "/m/083vt"),
        MAN.replace("0.25", "0.75"),
    ]
    images = made([WOODEN], lines, read_boxes=True)
    assert [(sample.text, sample.boxes) for sample in images] == [
        ("table is wooden", ((0, 0, 0.5, 1),)),
        ("man", ((0.25, 0.125, 0.5, 1),)),
        ("guitar", ((0, 0, 0.5, 0.25),)),
    ]
    assert images.left_out == {NO_CONFIDENCE: 1, MALFORMED: 1, NO_PICTURE: 1, UNKNOWN_LABEL: 1, NO_AREA: 1}


def test_boxes_alone_need_no_file_of_the_relationships_and_may_have_the_older_name(made, tmp_path):
    made(split="validation")
    for path in tmp_path.glob("oidv6-*"):
        if "bbox" not in path.name:
            path.unlink()
    (tmp_path / "oidv6-validation-annotations-bbox.csv").rename(tmp_path / "validation-annotations-bbox.csv")
    (sample,) = OpenImages(tmp_path, "validation", relationships=False, boxes=True)
    assert sample.text == "man"
    with pytest.raises(ValueError, match="both False"):
        OpenImages(tmp_path, "validation", relationships=False)


def test_class_names_with_headings_are_read_and_come_first(made, tmp_path):
    made()
    (tmp_path / "oidv6-class-descriptions.csv").write_text(
        "LabelName,DisplayName\n" + CLASSES.replace("Man", "Male person"), encoding="utf-8-sig"
    )
    (sample,) = OpenImages(tmp_path)
    assert sample.text == "male person holds guitar"


def test_columns_are_found_by_name_and_others_passed_over(made, tmp_path):
    made()
    lines = [VRD.replace("ImageID,", "Extra,ImageID,"), "0.5," + HOLDS]
    (tmp_path / "oidv6-train-annotations-vrd.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    (sample,) = OpenImages(tmp_path)
    assert sample.text == "man holds guitar"


def test_a_file_that_is_read_in_pieces_gives_the_same_samples(made, monkeypatch):
    lines = [HOLDS, WOODEN, HOLDS.replace("a1", "c3"), HOLDS.replace("0.25", "left")] * 50
    whole = made(lines)
    monkeypatch.setattr(open_images, "BLOCK_SIZE", 1000)
    pieces = made(lines)
    assert len(pieces) == 100
    assert list(pieces) == list(whole)
    # No text is kept once more for each piece.
    assert len(pickle.dumps(pieces)) == len(pickle.dumps(whole))
    assert pieces.left_out == whole.left_out == {NO_PICTURE: 50, NOT_A_BOX: 50}


def test_files_without_lines_give_no_samples(made):
    assert list(made([], [], read_boxes=True)) == []


@pytest.mark.parametrize("name", ["oidv6-train-annotations-vrd.csv", "oidv6-train-annotations-bbox.csv"])
@pytest.mark.parametrize("content", [b"", b"\n", b"ImageID,LabelName1\na1,/m/04yx4\n", b"\xff\xfe\x00"])
def test_annotations_without_their_columns_are_named(made, tmp_path, name, content):
    made()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} lacks the columns .*Label"):
        OpenImages(tmp_path, boxes=True)


def test_annotations_that_are_not_text_are_named(made, tmp_path):
    made()
    path = tmp_path / "oidv6-train-annotations-vrd.csv"
    path.write_bytes(path.read_bytes().replace(b"holds", b"hold\xff"))
    with pytest.raises(ValueError, match=r"oidv6-train-annotations-vrd\.csv cannot be read as CSV"):
        OpenImages(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has no line of a label"), (b"/m/04yx4\n", "has no line of a label"), (b"/m/1,\xff", "is not a CSV file")],
)
def test_names_that_cannot_be_read_are_an_error(made, tmp_path, content, message):
    made()
    (tmp_path / "class-descriptions-boxable.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"class-descriptions-boxable\.csv {message}"):
        OpenImages(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "class-descriptions-boxable.csv",
        "oidv6-attributes-description.csv",
        "oidv6-relationships-description.csv",
        "oidv6-train-annotations-vrd.csv",
        "oidv6-train-annotations-bbox.csv",
    ],
)
def test_a_file_that_is_not_there_is_named(made, tmp_path, name):
    made()
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no .*{name}.* in .*: download it from Open Images' page"):
        OpenImages(tmp_path, boxes=True)


def test_pictures_may_lie_elsewhere(made, tmp_path):
    made()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder train in .*pictures: put the pictures .*\{ImageID\}\.jpg"):
        OpenImages(tmp_path, images=tmp_path / "pictures")
    (tmp_path / "train").rename(tmp_path / "pictures/train")
    (sample,) = OpenImages(tmp_path, images=tmp_path / "pictures")
    assert sample.picture.path == str(tmp_path / "pictures/train/a1.jpg")


def test_an_unknown_split_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'val'"):
        OpenImages(tmp_path, "val")
