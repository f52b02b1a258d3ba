"""What a report on a checkpoint shows, gathered: images that are chosen, and what the model makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dove_fast.data import Samples, WebDataset, open_source
from dove_fast.evaluation.portrait import answers, take_portrait
from dove_fast.evaluation.report_page import ReportPage
from dove_fast.evaluation.results import EVALUATION_NAME, Evaluation, read_evaluation
from dove_fast.evaluation.shown import choose_images, choose_regions
from dove_fast.jobs.loading import LoadedModel, load_model
from dove_fast.models.dove import DOVE

__all__ = ["OnStage", "check_output", "find_evaluation", "make_page"]

# What is being done, how much of it is done, and of how much.
OnStage = Callable[[str, int, int], None]

ENDINGS = (".html", ".htm")
OTHER_CHECKPOINT = (
    f"The {EVALUATION_NAME} beside this page is of another checkpoint, or of this one before it was trained on: its "
    "figures are not shown."
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


def find_evaluation(output: Path, named: str | os.PathLike[str] | None) -> tuple[Evaluation, bool] | None:
    """Read the evaluation that is `named`, or else the one in the page's folder, None where there is none.

    The second value: whether it was named. Raises what `read_evaluation` raises.
    """
    if named is not None:
        return read_evaluation(named), True
    beside = output.parent / EVALUATION_NAME
    return (read_evaluation(beside), False) if beside.is_file() else None


def make_page(
    loaded: LoadedModel,
    checkpoint: str,
    data: str | os.PathLike[str],
    evaluation: tuple[Evaluation, bool] | None = None,
    *,
    images: int = 8,
    vqgan: str | None = None,
    on_stage: OnStage | None = None,
) -> ReportPage:
    """Choose images of `data` (see `open_source`), let the model reconstruct them, and return the page.

    checkpoint: how the model was named. evaluation: what `find_evaluation` found. One of another checkpoint is refused
    where it was named, or else left out, which the page says. images: how many are shown, and regions at most.
    vqgan: a checkpoint whose VQGAN is the one that stands alone; None for the model's own.
    Raises what `choose_images` raises, and `ValueError` for an evaluation of another checkpoint.
    """
    model = loaded.model
    figures, notes = _figures(loaded, evaluation)

    def stage(name: str) -> Callable[[int, int], None] | None:
        return None if on_stage is None else partial(on_stage, name)

    baseline = None if vqgan is None else load_model(vqgan, device=model.device).model.to(model.dtype)
    shown = choose_images(data, model.config.image_size, images, on_image=stage("images"))
    portrait = take_portrait(model, shown.pixels, vqgan=baseline, on_stage=stage("reconstruct"))
    regions = []
    if model.tokenizer is not None:
        samples = _samples(data)
        if samples is not None:
            regions = choose_regions(samples, model.config.image_size, images, readable=partial(_reads, model))
        if not regions:
            notes.append(NO_REGIONS)
    return ReportPage(
        title=f"What the tokens of {Path(checkpoint).name or checkpoint} hold",
        facts=_facts(loaded, checkpoint, vqgan, os.fspath(data), len(shown.keys), shown.looked_at),
        shown=shown,
        portrait=portrait,
        evaluation=figures,
        regions=regions,
        with_text=answers(model, regions, with_text=True),
        without_text=answers(model, regions, with_text=False),
        notes=notes,
        own_vqgan=vqgan is None,
    )


def _figures(loaded: LoadedModel, evaluation: tuple[Evaluation, bool] | None) -> tuple[Evaluation | None, list[str]]:
    if evaluation is None:
        return None, []
    figures, named = evaluation
    if figures.context.fingerprint == loaded.fingerprint:
        return figures, []
    if named:
        raise ValueError(
            f"the evaluation is of another checkpoint: {figures.context.checkpoint}, {figures.context.fingerprint}; "
            f"this one is {loaded.fingerprint}"
        )
    return None, [OTHER_CHECKPOINT]


def _samples(data: str | os.PathLike[str]) -> Samples | None:
    """Return the texts and boxes of WebDataset shards that lie here; None for other data."""
    if open_source(data).to_dict()["kind"] != "webdataset":
        return None
    try:
        return WebDataset(data)
    except (ValueError, FileNotFoundError):
        # Pipes, URLs and lists of shards, which it does not take; `open_source` took what is not broken.
        return None


def _reads(model: DOVE, text: str) -> bool:
    """Tell whether the generator has positions for a text, and the tokenizer ids."""
    if model.tokenizer is None:
        return False
    try:
        count = len(model.tokenizer.encode(text))
    except ValueError:
        return False
    config = model.config
    return 0 < count <= config.generator.max_position_embeddings - config.num_features - config.num_tokens


def _facts(
    loaded: LoadedModel, checkpoint: str, baseline: str | None, data: str, shown: int, looked_at: int
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
        ("EOS", f"above a probability of {config.eos_threshold:g}"),
        ("texts", "read" if model.tokenizer is not None else "not read: the model has no tokenizer"),
        ("data", f"{data}: {shown} of {looked_at} images, spread by complexity (variance of the Laplacian)"),
        ("device", f"{model.device}, {str(model.dtype).removeprefix('torch.')}"),
        ("versions", f"dove_fast {__version__}, torch {torch.__version__}"),
    ]
