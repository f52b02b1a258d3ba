"""The outcome of an evaluation: frozen dataclasses, and the JSON file that holds them.

Every figure stands beside what it was measured with: a number that is `None` was not measured, and the `Measure` of
the same name in the context says why.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dove_fast.atomic import replacing

__all__ = [
    "ADAPTIVE",
    "EVALUATION_NAME",
    "FIXED",
    "FORMAT_VERSION",
    "VQGAN_ALONE",
    "CodebookUse",
    "Complexity",
    "Context",
    "Evaluation",
    "Grounding",
    "Lengths",
    "Measure",
    "Point",
    "ProbeRow",
    "QualityRow",
    "RegionRow",
    "Spread",
    "read_evaluation",
    "write_evaluation",
]

FORMAT_VERSION = 1
EVALUATION_NAME = "evaluation.json"

# The kinds of rows: the VQGAN without the tokens, so many tokens an image, and as many as EOS chooses.
VQGAN_ALONE, FIXED, ADAPTIVE = "vqgan", "fixed", "adaptive"


@dataclass(frozen=True)
class Spread:
    """The mean over the images of a measure, and its 5th, 50th and 95th percentile."""

    mean: float
    p5: float
    p50: float
    p95: float


@dataclass(frozen=True)
class QualityRow:
    """How good the reconstructions of one token count are.

    name: "VQGAN alone", "8 tokens", "adaptive". kind: `VQGAN_ALONE`, `FIXED` or `ADAPTIVE`. tokens: the mean an image;
    of the VQGAN alone its codes, N. psnr: in dB, of images in [0, 1]. lpips: None without a backbone's weights; rfid:
    None without Inception weights. gflop, token_bytes: from the image to the picture, and of the tokens (the codes) in
    a token store, means an image (`dove_fast.evaluation.cost`); None in files of before they were counted.
    """

    name: str
    kind: str
    tokens: float
    psnr: Spread
    ssim: Spread
    lpips: Spread | None
    rfid: float | None
    gflop: float | None = None
    token_bytes: float | None = None


@dataclass(frozen=True)
class Lengths:
    """What EOS chose. percentiles: percent to tokens. histogram: (T,) images with 1, 2, .. T tokens."""

    mean: float
    percentiles: dict[int, float]
    histogram: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The most tokens an image can have, T."""
        return len(self.histogram)


@dataclass(frozen=True)
class Point:
    """One image: the variance of its Laplacian, its tokens, and the PSNR in dB of what they decode to."""

    complexity: float
    length: int
    psnr: float


@dataclass(frozen=True)
class Complexity:
    """Whether lengths follow complexity.

    rank_correlation: Spearman's over all images; None where one side is constant. points: all images, or so many of
    them spread evenly over the data.
    """

    rank_correlation: float | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class CodebookUse:
    """How a codebook is used. name: the row whose codes these are. codes: how many were looked up over all images.

    used: codewords that came at all, of `size`. perplexity: the exponential of the entropy of their shares.
    """

    name: str
    codes: int
    used: int
    size: int
    perplexity: float


@dataclass(frozen=True)
class RegionRow:
    """Errors inside and outside the asked-for regions, means over the samples that have the side.

    name, kind: as in `QualityRow`. with_text: whether the generator read the text. tokens: the mean. psnr: in dB.
    """

    name: str
    kind: str
    with_text: bool
    tokens: float
    mse_inside: float
    mse_outside: float
    psnr_inside: float
    psnr_outside: float


@dataclass(frozen=True)
class Grounding:
    """What a text does: over `samples` of a text and its region. set_aside: samples that could not be used, by reason.

    region_share: the mean share of the picture that the region is. length_with_text, length_without: mean adaptive
    lengths. rows: a pair, with the text and without it, for every token count, the adaptive one last.
    """

    samples: int
    set_aside: dict[str, int]
    region_share: float
    length_with_text: float
    length_without: float
    rows: tuple[RegionRow, ...]


@dataclass(frozen=True)
class ProbeRow:
    """A linear probe: the accuracy in [0, 1] on `test_images` of a classifier of `features`, trained on `train_images`.

    dataset: its name. features: what was probed, as "pooled tokens". dimension: numbers an image.
    """

    dataset: str
    features: str
    accuracy: float
    train_images: int
    test_images: int
    dimension: int


@dataclass(frozen=True)
class Measure:
    """How a measure was computed, or why it was not.

    name: "PSNR", "SSIM", "LPIPS", "rFID", .. parameters: all that decides the number, in words. extractor: the network
    whose features it compares; sha256: of its weights' file; resize: how images reach its size. All three None where
    it has none. left_out: why there is no number; None where there is one. images: N, how many went into the number.
    """

    name: str
    parameters: str
    extractor: str | None = None
    sha256: str | None = None
    resize: str | None = None
    left_out: str | None = None
    images: int | None = None


@dataclass(frozen=True)
class Context:
    """What was evaluated, on what, and how.

    checkpoint, data: the paths as they were given; fingerprint: `DOVE.fingerprint` before a cast to `dtype`. images:
    how many were measured, N; set_aside: inputs that could not be read, those of probes too. transform: the name of the
    one from an image to `image_size` pixels a side. seconds: of the whole evaluation; measuring_seconds: of the images'
    measures alone. warnings: what a reader of the figures must know. vqgan: the checkpoint whose VQGAN is the one that
    stands alone, and vqgan_fingerprint its `DOVE.fingerprint`; None for the evaluated model's own.
    """

    version: str
    checkpoint: str
    fingerprint: str
    data: str
    images: int
    set_aside: int
    image_size: int
    transform: str
    resample: str
    eos_threshold: float
    device: str
    device_name: str
    dtype: str
    threads: int
    batch_size: int
    torch: str
    seconds: float
    measures: tuple[Measure, ...]
    warnings: tuple[str, ...] = ()
    vqgan: str | None = None
    vqgan_fingerprint: str | None = None
    measuring_seconds: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """All that `evaluate` found. rows: the VQGAN alone, then fixed lengths from short to long, the adaptive one last.

    codebooks: the VQGAN's codes and, where the model looks the token decoder's grid up in the codebook, those of every
    other row, under the row's name.
    grounding: None for data without texts or a model without a tokenizer. probes: empty where none was asked for.
    """

    context: Context
    rows: tuple[QualityRow, ...]
    lengths: Lengths
    complexity: Complexity
    codebooks: tuple[CodebookUse, ...]
    grounding: Grounding | None = None
    probes: tuple[ProbeRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON's types, with `format_version` in front."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Build an evaluation from `to_dict`'s form. Raises `ValueError` for another version, or what is not one."""
        if not isinstance(data, Mapping) or "format_version" not in data:
            raise ValueError("not an evaluation: it must be a JSON object with a format_version")
        values = dict(data)
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version!r}: written by another dove_fast")
        built: Evaluation = _build(cls, values, "evaluation")
        return built


def write_evaluation(path: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Write an evaluation as JSON, by temporary file and rename. Raises `OSError`, `ValueError` for NaN or infinity."""
    text = json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)
    with replacing(Path(path)) as file:
        file.write(text.encode() + b"\n")


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read what `write_evaluation` wrote: a file, or the directory with `EVALUATION_NAME` in it.

    Raises `FileNotFoundError` for no such file, `ValueError` for one that is no evaluation.
    """
    place = Path(path)
    if place.is_dir():
        place /= EVALUATION_NAME
    if not place.is_file():
        raise FileNotFoundError(f"no evaluation at {place}; `dove-fast evaluate` writes one")
    try:
        return Evaluation.from_dict(json.loads(place.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _build(kind: Any, value: Any, where: str) -> Any:
    """Return `value`, of JSON's types, as `kind`: a dataclass, tuple[X, ...], dict[K, X], X | None or a plain type."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        inner = next(option for option in get_args(kind) if option is not type(None))
        return None if value is None else _build(inner, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_build(get_args(kind)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        key, inner = get_args(kind)
        return {key(name): _build(inner, item, f"{where}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r:.80}")


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {value!r:.80}")
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    missing = [item.name for item in fields if item.name not in value and item.default is dataclasses.MISSING]
    unknown = sorted(set(value) - set(hints))
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has no field {', '.join(unknown)}"
        raise ValueError(f"{where} {problem}")
    return kind(**{name: _build(hints[name], value[name], f"{where}.{name}") for name in value})
