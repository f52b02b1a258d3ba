"""What a report on a checkpoint shows, gathered: images that are chosen, and what the model makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dove_fast.data import open_source
from dove_fast.evaluation.portrait import answers, take_portrait
from dove_fast.evaluation.regions import check_tokenizer, has_regions, open_regions, text_ids
from dove_fast.evaluation.report_page import ReportPage
from dove_fast.evaluation.results import EVALUATION_NAME, Evaluation, read_evaluation
from dove_fast.evaluation.shown import ShownRegion, choose_images, choose_regions
from dove_fast.jobs.loading import LoadedModel, load_model
from dove_fast.models.dove import DOVE
from dove_fast.models.inputs import check_length_options

__all__ = ["MOST_IMAGES", "FoundEvaluation", "OnStage", "check_output", "find_evaluation", "make_page"]

# What is being done, how much of it is done, and of how much.
OnStage = Callable[[str, int, int], None]

ENDINGS = (".html", ".htm")
# Each is decoded at many lengths in one batch, and shown at each of them.
MOST_IMAGES = 64
OTHER_CHECKPOINT = (
    f"The {EVALUATION_NAME} beside this page is of another checkpoint, or of this one before it was trained on: its "
    "figures are not shown."
)
OTHER_THRESHOLD = (
    "The figures of the whole data were measured with EOS above a probability of {:g}, the pictures are made with "
    "{:g}: adaptive lengths, and what was measured at them, are not the same in both."
)
NO_REGIONS = "The model reads texts, but no text with a region was found in these data to show it with."


def check_output(path: str | os.PathLike[str]) -> Path:
    """Return the page's path. Raises `ValueError` for one that is no page, `FileNotFoundError` for a missing folder."""
    output = Path(path)
    if output.suffix.lower() not in ENDINGS:
        raise ValueError(f"the page's name must end in .html, got {str(output)!r}")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name a file to write the page to")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write the page to")
    return output


@dataclass(frozen=True)
class FoundEvaluation:
    """An evaluation, and whether somebody named it or it lay beside the page. problem: why that one cannot be read."""

    evaluation: Evaluation | None
    named: bool
    problem: str = ""


def find_evaluation(output: Path, named: str | os.PathLike[str] | None) -> FoundEvaluation | None:
    """Read the evaluation that is `named`, or else the one in the page's folder, None where there is none.

    Raises what `read_evaluation` raises of one that was named.
    """
    if named is not None:
        return FoundEvaluation(read_evaluation(named), named=True)
    beside = output.parent / EVALUATION_NAME
    if not beside.is_file():
        return None
    try:
        return FoundEvaluation(read_evaluation(beside), named=False)
    except (ValueError, OSError) as error:
        return FoundEvaluation(None, named=False, problem=str(error))


def make_page(
    loaded: LoadedModel,
    checkpoint: str,
    data: str | os.PathLike[str],
    evaluation: FoundEvaluation | None = None,
    *,
    images: int = 8,
    eos_threshold: float | None = None,
    vqgan: str | None = None,
    on_stage: OnStage | None = None,
) -> ReportPage:
    """Choose images of `data` (see `open_source`), let the model reconstruct them, and return the page.

    checkpoint: how the model was named. evaluation: what `find_evaluation` found. One of another checkpoint is refused
    where it was named, or else left out, which the page says. images: how many are shown, and regions at most; from 1
    to `MOST_IMAGES`. eos_threshold: the probability that ends an image, None for the checkpoint's. vqgan: a checkpoint
    whose VQGAN is the one that stands alone; None for the model's own.
    Raises what `choose_images` raises, `ValueError` for an evaluation of another checkpoint, what a tokenizer raises
    that cannot be used, and `JobError` for pictures that hold NaN or infinity.
    """
    model = loaded.model
    if not 1 <= images <= MOST_IMAGES:
        raise ValueError(f"images must be from 1 to {MOST_IMAGES}, got {images}")
    check_length_options(model.config, None, None, eos_threshold, None)
    threshold = model.config.eos_threshold if eos_threshold is None else eos_threshold
    with_regions = model.tokenizer is not None and has_regions(open_source(data))
    if model.tokenizer is not None and with_regions:
        check_tokenizer(model.tokenizer)
    figures, notes = _figures(loaded, evaluation, threshold)

    def stage(name: str) -> Callable[[int, int], None] | None:
        return None if on_stage is None else partial(on_stage, name)

    baseline = None if vqgan is None else load_model(vqgan, device=model.device).model.to(model.dtype)
    shown = choose_images(data, model.config.image_size, images, on_image=stage("images"))
    portrait = take_portrait(
        model, shown.pixels, eos_threshold=threshold, vqgan=baseline, on_stage=stage("reconstruct")
    )
    regions: list[ShownRegion] = []
    if model.tokenizer is not None:
        found = open_regions(data) if with_regions else ""
        if isinstance(found, str):
            notes.append(f"The model reads texts, but {found}." if found else NO_REGIONS)
        else:
            regions = choose_regions(found, model.config.image_size, images, readable=partial(_reads, model))
            notes += [] if regions else [NO_REGIONS]
    return ReportPage(
        title=f"What the tokens of {Path(checkpoint).name or checkpoint} hold",
        facts=_facts(loaded, checkpoint, threshold, vqgan, os.fspath(data), len(shown.keys), shown.looked_at),
        shown=shown,
        portrait=portrait,
        evaluation=figures,
        regions=regions,
        with_text=answers(model, regions, with_text=True, eos_threshold=threshold),
        without_text=answers(model, regions, with_text=False, eos_threshold=threshold),
        notes=notes,
        own_vqgan=vqgan is None,
    )


def _figures(
    loaded: LoadedModel, found: FoundEvaluation | None, threshold: float
) -> tuple[Evaluation | None, list[str]]:
    if found is None:
        return None, []
    if found.evaluation is None:
        return None, [f"The {EVALUATION_NAME} beside this page is not shown, it cannot be read: {found.problem}."]
    figures = found.evaluation
    if figures.context.fingerprint == loaded.fingerprint:
        theirs = figures.context.eos_threshold
        return figures, [] if theirs == threshold else [OTHER_THRESHOLD.format(theirs, threshold)]
    if found.named:
        raise ValueError(
            f"the evaluation is of another checkpoint: {figures.context.checkpoint}, {figures.context.fingerprint}; "
            f"this one is {loaded.fingerprint}"
        )
    return None, [OTHER_CHECKPOINT]


def _reads(model: DOVE, text: str) -> bool:
    """Tell whether the model can read a text."""
    return model.tokenizer is not None and not isinstance(text_ids(text, model.config, model.tokenizer), str)


def _facts(
    loaded: LoadedModel,
    checkpoint: str,
    threshold: float,
    baseline: str | None,
    data: str,
    shown: int,
    looked_at: int,
) -> list[tuple[str, str]]:
    from dove_fast import __version__

    model, config = loaded.model, loaded.model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    vqgan = config.vqgan
    return [
        ("checkpoint", checkpoint),
        ("fingerprint", loaded.fingerprint),
        (
            "images",
            f"{config.image_size} x {config.image_size} pixels, {config.grid_size} x {config.grid_size} features",
        ),
        ("tokens", f"1 to {config.num_tokens} an image, width {config.generator.hidden_size}"),
        (
            "layers",
            f"{config.generator.num_hidden_layers} of the generator, {config.token_decoder.num_hidden_layers} of the "
            "token decoder",
        ),
        ("codebook", f"{vqgan.num_vq_embeddings:,} codewords of {vqgan.vq_embed_dim} channels"),
        ("weights", f"{parameters:,}"),
        ("VQGAN alone", baseline or "this checkpoint's own"),
        ("EOS", f"above a probability of {threshold:g}"),
        ("texts", "read" if model.tokenizer is not None else "not read: the model has no tokenizer"),
        ("data", f"{data}: {shown} of {looked_at} images, spread by complexity (variance of the Laplacian)"),
        ("device", f"{model.device}, {str(model.dtype).removeprefix('torch.')}"),
        ("versions", f"dove_fast {__version__}, torch {torch.__version__}"),
    ]
