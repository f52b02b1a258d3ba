"""The data sets of a run's file: each kind, what of it, and several as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_pictures import make_pictures

from dove_fast.data import ImageFolder, JoinedSamples
from dove_fast.training import TrainConfig
from dove_fast.training.data import open_samples


@pytest.fixture
def genome(tmp_path) -> dict[str, str]:
    """A description and a question of one picture, as Visual Genome lays them out."""
    folder = tmp_path / "genome"
    (folder / "VG_100K").mkdir(parents=True)
    (folder / "VG_100K" / "1.jpg").touch()
    box = {"x": 1, "y": 2, "w": 3, "h": 4}
    region = {"image_id": 1, "phrase": "a clock", "x": 1, "y": 2, "width": 3, "height": 4}
    question = {"image_id": 1, "question": "Where is it?", "a_objects": [box], "q_objects": []}
    for name, content in (
        ("image_data", [{"image_id": 1, "width": 80, "height": 60}]),
        ("region_descriptions", [{"id": 1, "regions": [region, {**region, "phrase": " "}]}]),
        ("question_answers", [{"id": 1, "qas": [question]}]),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {"kind": "visual-genome", "path": str(folder)}


@pytest.fixture
def images(tmp_path) -> dict[str, str]:
    """A relationship and a box of one picture, as Open Images lays them out."""
    folder = tmp_path / "images"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "a1.jpg").touch()
    for name, content in (
        ("class-descriptions-boxable.csv", "/m/04yx4,Man\n/m/0342h,Guitar\n"),
        ("oidv6-attributes-description.csv", "/m/083vt,Wooden\n"),
        ("oidv6-relationships-description.csv", "holds,holds\n"),
        (
            "oidv6-test-annotations-vrd.csv",
            "ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,RelationshipLabel\n"
            "a1,/m/04yx4,/m/0342h,0.25,0.5,0.125,1,0.375,0.75,0.5,0.625,holds\n",
        ),
        (
            "oidv6-test-annotations-bbox.csv",
            "ImageID,LabelName,Confidence,XMin,XMax,YMin,YMax\na1,/m/04yx4,1,0.25,0.5,0.125,1\n",
        ),
    ):
        (folder / name).write_text(content)
    return {"kind": "open-images", "path": str(folder), "split": "test"}


def opened(**data):
    return open_samples(TrainConfig.from_dict({"run": {"output": "o"}, "model": {"preset": "tiny"}, "data": data}).data)


def texts(samples) -> list[str]:
    return [samples[index].text for index in range(len(samples))]


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ("", ["a clock", "Where is it?"]),
        ("all", ["a clock", "Where is it?"]),
        ("descriptions", ["a clock"]),
        ("questions", ["Where is it?"]),
    ],
)
def test_regions_of_visual_genome(genome, regions, expected):
    assert texts(opened(**genome, regions=regions)) == expected


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ("", ["man holds guitar"]),
        ("relationships", ["man holds guitar"]),
        ("boxes", ["man"]),
        ("all", ["man holds guitar", "man"]),
    ],
)
def test_regions_of_open_images(images, regions, expected):
    assert texts(opened(**images, regions=regions)) == expected


def test_several_sets_are_one_behind_the_other(genome, images, tmp_path):
    folder = {"path": str(make_pictures(tmp_path / "pictures", 2))}
    joined = opened(**folder, more=[{**images, "regions": "all"}, genome])
    assert texts(joined) == ["", "", "man holds guitar", "man", "a clock", "Where is it?"]
    assert joined[3].boxes == ((0.25, 0.125, 0.5, 1.0),)
    assert joined.left_out == {"empty text": 1}
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"below 6, got {index}"):
            joined[index]
    assert isinstance(opened(**folder), ImageFolder)


def test_none_to_join():
    with pytest.raises(ValueError, match="no data sets to join"):
        JoinedSamples([])


def test_a_set_without_samples_is_passed_over(images, genome, tmp_path):
    (Path(images["path"]) / "test" / "a1.jpg").unlink()
    joined = opened(**genome, more=[images, genome])
    assert texts(joined) == ["a clock", "Where is it?"] * 2
