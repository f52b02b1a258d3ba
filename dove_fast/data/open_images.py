"""Open Images (Kuznetsova et al. 2020) as its publisher lays it out: relationships and boxes, a text for each."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dove_fast.data.listing import printable
from dove_fast.data.regions import MALFORMED, NO_PICTURE, RegionBuilder, RegionTable, jpegs_in, published_file

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

__all__ = ["NO_CONFIDENCE", "UNKNOWN_LABEL", "OpenImages"]

UNKNOWN_LABEL = "a label without a name"
NO_CONFIDENCE = "confidence 0"

SPLITS = ("train", "validation", "test")
CLASS_NAMES = (
    "oidv6-class-descriptions.csv",
    "oidv7-class-descriptions.csv",
    "class-descriptions-boxable.csv",
    "oidv7-class-descriptions-boxable.csv",
)
ATTRIBUTE_NAMES = ("oidv6-attributes-description.csv",)
RELATIONSHIP_NAMES = ("oidv6-relationships-description.csv",)

# The relationship whose second label is an attribute, not a class.
ATTRIBUTE_RELATIONSHIP = "is"

# Left, top, right, bottom.
BOX = ("XMin", "YMin", "XMax", "YMax")
BOX_1, BOX_2 = (tuple(f"{side}{which}" for side in BOX) for which in (1, 2))

# Bytes of a file that are turned into columns at a time.
BLOCK_SIZE = 1 << 26
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


class OpenImages(RegionTable):
    """The relationships of a split of Open Images, then its boxes, each in the order of its file.

    `root` holds the publisher's CSV files; `images`, by default `root`, holds the folder `split` with the pictures
    {ImageID}.jpg. Boxes are fractions of the picture, so the frame is (1, 1); a key is the path below `images`.

    A relationship (oidv6-{split}-annotations-vrd.csv) has the three names as text, in lower case, "man holds guitar",
    and both boxes as region; "is" joins an object and an attribute, "table is wooden", whose boxes are the same. Of
    the attribute "(made of)Leather" the text makes "made of leather".

    With `boxes` every box (oidv6-{split}-annotations-bbox.csv, or without oidv6-) is a sample with its class's name
    as text. Boxes around a group (IsGroupOf) and around a depiction (IsDepiction) are kept: they are what the name
    points at. Those of confidence 0, which the annotators did not confirm, are left out.

    Left out and counted in `left_out`: these, labels without a name, pictures without a file, lines of the wrong
    number of columns, and what `RegionBuilder.add` refuses; boxes are clipped to the frame.

    Raises `FileNotFoundError` for a file or the picture folder that is not there, and `ValueError` for another split
    than train, validation and test, for a file without the columns it should have, or if `relationships` and `boxes`
    are both False.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        relationships: bool = True,
        boxes: bool = False,
        images: str | os.PathLike[str] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if not (relationships or boxes):
            raise ValueError("relationships and boxes are both False: nothing is left of Open Images")
        root = os.fspath(root)
        # All are looked for before the first is read, which takes long.
        classes_file = _file(root, CLASS_NAMES)
        if relationships:
            relationships_file = _file(root, [f"oidv6-{split}-annotations-vrd.csv"])
            names_files = _file(root, ATTRIBUTE_NAMES), _file(root, RELATIONSHIP_NAMES)
        if boxes:
            boxes_file = _file(root, [f"oidv6-{split}-annotations-bbox.csv", f"{split}-annotations-bbox.csv"])
        folder = root if images is None else os.fspath(images)
        pictures = _pictures(folder, split)
        builder = RegionBuilder(folder, [f"{split}/{name}.jpg" for name in pictures], np.ones((len(pictures), 2)))
        classes = _names(classes_file)
        if relationships:
            attributes, relations = (_names(path) for path in names_files)
            _add_relationships(builder, relationships_file, pictures, classes, attributes, relations)
        if boxes:
            _add_boxes(builder, boxes_file, pictures, classes)
        super().__init__(builder)


def _file(root: str, names: Sequence[str]) -> str:
    return published_file(root, names, "download it from Open Images' page (storage.googleapis.com/openimages) there")


def _pictures(folder: str, split: str) -> list[str]:
    path = os.path.join(folder, split)
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"no folder {split} in {printable(folder)}: put the pictures of Open Images there, as {{ImageID}}.jpg, "
            "or say with images= which folder holds it"
        )
    return jpegs_in(path)


def _names(path: str) -> dict[str, str]:
    """Return the name of each label. Some releases have a line of headings: an entry that no label asks for."""
    names = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line in csv.reader(file):
                # Attributes may start with a remark in parentheses: "(made of)Leather".
                name = re.sub(r"^\((.*?)\)", r"\1 ", line[1].strip()) if len(line) >= 2 else ""
                words = name.replace("_", " ").lower().split()
                if words:
                    names[line[0].strip()] = " ".join(words)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{printable(path)} is not a CSV file of labels and names: {error}") from error
    if not names:
        raise ValueError(f"{printable(path)} has no line of a label and its name")
    return names


def _add_relationships(
    builder: RegionBuilder,
    path: str,
    pictures: list[str],
    classes: dict[str, str],
    attributes: dict[str, str],
    relations: dict[str, str],
) -> None:
    relations = {ATTRIBUTE_RELATIONSHIP: ATTRIBUTE_RELATIONSHIP, **relations}
    subject_names, relation_names = list(classes.values()), list(relations.values())
    # What comes second: a class, or after all classes an attribute.
    object_names = subject_names + list(attributes.values())
    is_attribute = list(relations).index(ATTRIBUTE_RELATIONSHIP)
    subjects, relation_labels, attribute_labels = _texts(classes), _texts(relations), _texts(attributes)
    ids = _texts(pictures)
    texts: dict[int, int | None] = {}
    for batch in _batches(builder, path, ("ImageID", "LabelName1", "LabelName2", "RelationshipLabel", *BOX_1, *BOX_2)):
        subject = _index(batch, "LabelName1", subjects)
        relation = _index(batch, "RelationshipLabel", relation_labels)
        attribute = _index(batch, "LabelName2", attribute_labels)
        attribute[attribute >= 0] += len(classes)
        object_ = np.where(relation == is_attribute, attribute, _index(batch, "LabelName2", subjects))
        labelled = (subject >= 0) & (relation >= 0) & (object_ >= 0)
        pictured = _index(batch, "ImageID", ids)
        kept = _known(builder, labelled, pictured)
        triples = (subject * len(relation_names) + relation) * len(object_names) + object_
        different, which = np.unique(triples[kept], return_inverse=True)
        for triple in different.tolist():
            if triple not in texts:
                start, last = divmod(triple, len(object_names))
                first, middle = divmod(start, len(relation_names))
                texts[triple] = builder.text(f"{subject_names[first]} {relation_names[middle]} {object_names[last]}")
        text = np.array([texts[triple] for triple in different.tolist()], np.int32)[which]
        both = np.concatenate([_numbers(batch, BOX_1), _numbers(batch, BOX_2)], axis=1)
        builder.add(pictured[kept], text, np.full(len(text), 2), both[kept].reshape(-1, 4))


def _add_boxes(builder: RegionBuilder, path: str, pictures: list[str], classes: dict[str, str]) -> None:
    import pyarrow

    labels, ids = _texts(classes), _texts(pictures)
    texts = np.array([builder.text(name) for name in classes.values()], np.int32)
    for batch in _batches(builder, path, ("ImageID", "LabelName", "Confidence", *BOX)):
        confidence = _numbers(batch, ("Confidence",))[:, 0]
        builder.leave_out(MALFORMED, int(np.count_nonzero(np.isnan(confidence))))
        builder.leave_out(NO_CONFIDENCE, int(np.count_nonzero(confidence == 0)))
        batch = batch.filter(pyarrow.array(np.abs(confidence) > 0))
        label = _index(batch, "LabelName", labels)
        pictured = _index(batch, "ImageID", ids)
        kept = _known(builder, label >= 0, pictured)
        builder.add(pictured[kept], texts[label[kept]], np.ones(kept.sum()), _numbers(batch, BOX)[kept])


def _known(builder: RegionBuilder, labelled: NDArray[np.bool_], pictured: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows have names and a picture, and count the others."""
    builder.leave_out(UNKNOWN_LABEL, int(np.count_nonzero(~labelled)))
    builder.leave_out(NO_PICTURE, int(np.count_nonzero(labelled & (pictured < 0))))
    return labelled & (pictured >= 0)


def _batches(builder: RegionBuilder, path: str, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Yield `columns` of a CSV file as text, in record batches; lines with too few or many values are counted."""
    import pyarrow
    import pyarrow.csv

    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        headings = next(csv.reader(file), [])
    missing = [name for name in columns if name not in headings]
    if missing:
        raise ValueError(f"{printable(path)} lacks the columns {', '.join(missing)}: it is not the publisher's file")

    def skip(row: object) -> str:
        builder.leave_out(MALFORMED)
        return "skip"

    try:
        yield from pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(block_size=BLOCK_SIZE),
            parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=list(columns), column_types=dict.fromkeys(columns, pyarrow.string())
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{printable(path)} cannot be read as CSV: {error}") from error


def _texts(values: Iterable[str]) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(list(values), pyarrow.string())


def _index(batch: pyarrow.RecordBatch, column: str, values: pyarrow.Array) -> NDArray[np.int64]:
    """Return where in `values` each text of the column is; -1 if it is not there."""
    import pyarrow.compute

    index = pyarrow.compute.index_in(batch[column], value_set=values)
    return index.fill_null(-1).to_numpy().astype(np.int64)


def _numbers(batch: pyarrow.RecordBatch, columns: Sequence[str]) -> NDArray[np.float64]:
    """Return the columns as numbers (rows, columns); NaN for what is no number."""
    import pyarrow
    import pyarrow.compute

    numbers = []
    for column in columns:
        texts = batch[column]
        try:
            values = texts.cast(pyarrow.float64())
        except pyarrow.ArrowInvalid:
            texts = pyarrow.compute.utf8_trim_whitespace(texts)
            is_number = pyarrow.compute.match_substring_regex(texts, NUMBER)
            values = pyarrow.compute.if_else(is_number, texts, None).cast(pyarrow.float64())
        numbers.append(values.to_numpy(zero_copy_only=False))
    return np.stack(numbers, axis=1)
