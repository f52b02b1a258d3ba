"""The table of regions that Visual Genome and Open Images share."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from dove_fast.data.regions import (
    EMPTY_TEXT,
    NO_AREA,
    NOT_A_BOX,
    OUTSIDE,
    RegionBuilder,
    RegionTable,
    Strings,
    jpegs_in,
    published_file,
)
from dove_fast.data.samples import Picture, Sample

NAN, INF = float("nan"), float("inf")


def table(boxes, counts=None):
    builder = RegionBuilder("root", ["a.jpg"], [(100, 50)])
    counts = [1] * len(boxes) if counts is None else counts
    texts = [builder.text(f"text {n}") for n in range(len(counts))]
    builder.add([0] * len(counts), texts, counts, boxes)
    return RegionTable(builder)


def test_a_sample_has_its_picture_its_text_its_boxes_and_its_frame():
    builder = RegionBuilder("root", ["in/a.jpg", "b.jpg"], [(100, 50), (1, 1)])
    man, dog = builder.text("a man"), builder.text(" un  chien\tété \n")
    builder.add([1], [dog], [1], [(0, 0, 0.5, 1)])
    builder.add([0, 1], [man, dog], [2, 1], [(1, 2, 3, 4), (5, 6, 7, 8), (0.25, 0, 1, 1)])
    samples = list(RegionTable(builder))
    a, b = Picture("in/a.jpg", os.path.join("root", "in/a.jpg")), Picture("b.jpg", os.path.join("root", "b.jpg"))
    assert samples == [
        Sample(b, "un chien été", ((0, 0, 0.5, 1),), (1, 1)),
        Sample(a, "a man", ((1, 2, 3, 4), (5, 6, 7, 8)), (100, 50)),
        Sample(b, "un chien été", ((0.25, 0, 1, 1),), (1, 1)),
    ]
    assert {type(value) for sample in samples for box in (*sample.boxes, sample.frame) for value in box} == {float}


def test_boxes_are_clipped_to_the_frame():
    regions = table([(-5, -6, 10, 10), (90, 40, 120, 60)])
    assert [sample.boxes for sample in regions] == [((0, 0, 10, 10),), ((90, 40, 100, 50),)]
    assert regions.left_out == {}


def test_boxes_that_are_none_are_left_out_by_reason():
    bad = {
        NOT_A_BOX: [(NAN, 0, 1, 1), (0, 0, INF, 1), (0, 0, 1, 1e300)],
        NO_AREA: [(5, 5, 5, 9), (9, 5, 5, 9), (5, 9, 9, 5)],
        OUTSIDE: [(100, 0, 110, 10), (-9, 0, 0, 5), (0, 50, 9, 60), (0, -9, 9, -1)],
    }
    regions = table([(1, 1, 2, 2), *(box for boxes in bad.values() for box in boxes), (3, 3, 4, 4)])
    assert [(sample.text, sample.boxes) for sample in regions] == [
        ("text 0", ((1, 1, 2, 2),)),
        ("text 11", ((3, 3, 4, 4),)),
    ]
    assert regions.left_out == {reason: len(boxes) for reason, boxes in bad.items()}


def test_a_box_that_is_none_takes_its_region_with_it_and_no_other():
    regions = table([(1, 1, 2, 2), (0, 0, 9, 9), (5, 5, 5, 5), (3, 3, 4, 4), (7, 7, 8, 8)], [1, 2, 2])
    assert [(sample.text, sample.boxes) for sample in regions] == [
        ("text 0", ((1, 1, 2, 2),)),
        ("text 2", ((3, 3, 4, 4), (7, 7, 8, 8))),
    ]
    assert regions.left_out == {NO_AREA: 1}


def test_a_box_that_comes_twice_is_given_once():
    (sample,) = table([(5, 5, 9, 9), (1, 1, 2, 2), (5, 5, 9, 9)], [3])
    assert sample.boxes == ((5, 5, 9, 9), (1, 1, 2, 2))


def test_an_index_beyond_either_end_is_an_error():
    regions = table([(1, 1, 2, 2)])
    assert regions[np.int64(0)].text == "text 0"
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"at least 0 and below 1, got {index}"):
            regions[index]


def test_a_table_of_nothing_is_empty():
    assert list(table([])) == []


def test_a_table_goes_through_pickle_for_the_workers_of_a_loader():
    regions = table([(1, 1, 2, 2)])
    assert list(pickle.loads(pickle.dumps(regions))) == list(regions)


def test_blank_text_is_no_text():
    builder = RegionBuilder("root", [], [])
    assert [builder.text(text) for text in ("", " \n", "x")] == [None, None, 0]
    builder.leave_out(EMPTY_TEXT, 2)
    builder.leave_out(NO_AREA, 0)
    assert RegionTable(builder).left_out == {EMPTY_TEXT: 2}


def test_counts_and_frames_must_match():
    with pytest.raises(ValueError, match="2 pictures need as many frames, got 1"):
        RegionBuilder("root", ["a", "b"], [(1, 1)])
    for counts in ([2], [0, 1]):
        with pytest.raises(ValueError, match="add up to the 1 boxes"):
            table([(1, 1, 2, 2)], counts)


def test_strings_come_back_whatever_they_hold():
    strings = Strings(["", "a", "été"])
    assert strings.append("\ud800!") == 3
    assert [strings[n] for n in range(len(strings))] == ["", "a", "été", "?!"]


def test_jpegs_are_listed_by_name(tmp_path):
    for name in ("2.jpg", "10.jpg", "1.png", "été.jpg", "3.JPG"):
        (tmp_path / name).touch()
    assert jpegs_in(str(tmp_path)) == ["10", "2"]


def test_the_first_of_the_published_names_is_taken_and_none_is_an_error(tmp_path):
    (tmp_path / "b.csv").touch()
    (tmp_path / "c.csv").touch()
    assert published_file(str(tmp_path), ["a.csv", "b.csv", "c.csv"], "") == str(tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError, match=r"no x.csv or y.csv in .*: look there"):
        published_file(str(tmp_path), ["x.csv", "y.csv"], "look there")
