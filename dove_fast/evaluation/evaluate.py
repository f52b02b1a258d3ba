"""All of an evaluation, from a model and a place with images to the figures."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dove_fast.data import ShortSideCenterCrop, Source, WebDataset, open_source, read_ahead
from dove_fast.evaluation.extractors import PUBLISHED, InceptionFeatures, load_inception, load_lpips
from dove_fast.evaluation.grounding import GroundingMeter
from dove_fast.evaluation.lengths import check_lengths, default_lengths
from dove_fast.evaluation.measures import PSNR, SSIM, WINDOW
from dove_fast.evaluation.quality import QualityMeter
from dove_fast.evaluation.reading import SetAside, image_batches, region_batches
from dove_fast.evaluation.results import (
    FIXED,
    VQGAN_ALONE,
    Context,
    Evaluation,
    Grounding,
    Measure,
    ProbeRow,
    QualityRow,
)
from dove_fast.failures import stopping
from dove_fast.jobs.loading import LoadedModel, load_model
from dove_fast.jobs.progress import OnProgress, Progress
from dove_fast.losses.perceptual import BACKBONES
from dove_fast.models.dove import DOVE
from dove_fast.models.inputs import check_length_options
from dove_fast.store.layout import DTYPES
from dove_fast.store.records import InputError

__all__ = ["EvaluateOptions", "Outcome", "evaluate"]

# Batches that are decoded while one is measured.
AHEAD = 2
CODEBOOK = Measure(
    "codebook", "nearest codewords of all images; the perplexity is e to the entropy of their shares, in nats"
)
COMPLEXITY = Measure(
    "complexity",
    "variance of the Laplacian (four neighbours, inside the border) of the grey image in [0, 255] after the transform; "
    "Spearman's rank correlation with the adaptive length, equal values having their mean rank",
)
REGIONS = Measure(
    "grounding",
    "squared error and PSNR inside and outside the union of a text's boxes, means over the samples; the tokens with "
    "the text and without it, of the same images",
)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`.

    images: the first so many that can be read, and of regions too; None for all. lengths: token counts; None for 1/8,
    2/8, .. 8/8 of T. eos_threshold: as in `DOVE.tokenize`. max_errors: stop when more inputs cannot be read.
    lpips_weights, lpips_net, inception_weights: as in `load_lpips` and `load_inception`; without them the measure is
    left out, or with `allow_download` its library downloads them. vqgan: a checkpoint whose VQGAN is the one to compare
    with, such as what this model was trained from; None for the model's own. probes: labelled data sets as
    `open_labelled` takes them. probe_images: so many of each; None for all.
    """

    images: int | None = None
    lengths: tuple[int, ...] | None = None
    batch_size: int = 32
    eos_threshold: float | None = None
    max_errors: int | None = None
    lpips_weights: str | None = None
    lpips_net: str = "vgg"
    inception_weights: str | None = None
    allow_download: bool = False
    vqgan: str | None = None
    probes: tuple[str, ...] = ()
    probe_images: int | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of range, or an unknown net."""
        for name, least in (("images", 1), ("batch_size", 1), ("max_errors", 0), ("probe_images", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.lpips_net not in BACKBONES:
            raise ValueError(f"lpips_net must be one of {', '.join(BACKBONES)}, got {self.lpips_net!r}")


@dataclass(frozen=True)
class Outcome:
    """What `evaluate` found, and the inputs that it could not read."""

    evaluation: Evaluation
    errors: list[InputError] = field(default_factory=list)


def evaluate(
    loaded: LoadedModel,
    checkpoint: str,
    data: str | os.PathLike[str],
    options: EvaluateOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Measure a model on the images that `data` stands for (see `open_source`); nothing is written.

    checkpoint: how the model was named, for the record. Where `data` are WebDataset shards with texts and boxes, and
    the model has a tokenizer, it is also measured what the texts do. `on_progress` sees how far it is, after every
    batch; of the probes, which come first, too.

    Raises, before anything is computed, `FileNotFoundError`, `ValueError`, `CheckpointError` and `ImportError` for what
    cannot be used; then `JobError` when the disk or the memory fails or too many inputs cannot be read, and
    `ValueError` where none can.
    """
    options = options or EvaluateOptions()
    start = time.perf_counter()
    model, config = loaded.model, loaded.model.config
    check_length_options(config, None, None, options.eos_threshold, None)
    wanted = default_lengths(config.num_tokens) if options.lengths is None else options.lengths
    lengths = check_lengths(wanted, config.num_tokens)
    if config.image_size < WINDOW:
        raise ValueError(f"SSIM needs images of {WINDOW} pixels a side at least, this model's have {config.image_size}")
    source = open_source(data)
    _check_probes(options)
    lpips, lpips_measure = load_lpips(
        options.lpips_weights,
        net=options.lpips_net,
        allow_download=options.allow_download,
        device=model.device,
        image_size=config.image_size,
    )
    inception, rfid_measure = load_inception(
        options.inception_weights, allow_download=options.allow_download, device=model.device
    )
    quality = QualityMeter(
        model,
        lengths=lengths,
        eos_threshold=options.eos_threshold,
        lpips=lpips,
        inception=inception,
        vqgan=None if options.vqgan is None else _baseline(options.vqgan, model),
    )
    # Before the long work, because they may refuse their data when they have read it.
    of_probes = SetAside(options.max_errors)
    probes, probe_measures = _probes(loaded, options, of_probes, on_progress)
    set_aside = SetAside(options.max_errors)
    with stopping("run the same command again"), _quiet_pillow():
        _measure(quality, source, options, set_aside, on_progress)
    if not quality.images:
        reason = f", the last one for: {set_aside.errors[-1].reason}" if set_aside.errors else ""
        raise ValueError(f"{os.fspath(data)}: no image could be read{reason}")
    with stopping("run the same command again"), _quiet_pillow():
        grounding, why_no_texts = _grounding(source, data, model, options, lengths)
        rows = quality.rows()
        texts = [REGIONS] if grounding is not None else []
        evaluation = Evaluation(
            context=_context(
                loaded,
                checkpoint,
                os.fspath(data),
                options,
                images=quality.images,
                set_aside=len(set_aside.errors),
                measures=(PSNR, SSIM, lpips_measure, rfid_measure, CODEBOOK, COMPLEXITY, *texts, *probe_measures),
                warnings=(*_warnings(quality.images, inception, rows), *why_no_texts),
                seconds=time.perf_counter() - start,
            ),
            rows=rows,
            lengths=quality.lengths(),
            complexity=quality.complexity(),
            codebooks=quality.codebooks(),
            grounding=grounding,
            probes=probes,
        )
    return Outcome(evaluation, [*of_probes.errors, *set_aside.errors])


def _measure(
    quality: QualityMeter,
    source: Source,
    options: EvaluateOptions,
    set_aside: SetAside,
    on_progress: OnProgress | None,
) -> None:
    """Give every image to `quality`."""
    start = time.perf_counter()
    transform = ShortSideCenterCrop(quality.image_size)
    batches = image_batches(source, transform, options.batch_size, most=options.images, set_aside=set_aside)
    totals = [total for total in (source.inputs, options.images) if total is not None]
    with contextlib.closing(read_ahead(batches, depth=AHEAD)) as ready:
        for images in ready:
            quality.add(images)
            if on_progress is not None:
                progress = Progress(
                    quality.images,
                    min(totals, default=None),
                    quality.images,
                    quality.tokens,
                    errors=len(set_aside.errors),
                    elapsed=time.perf_counter() - start,
                )
                on_progress(progress)


def _check_probes(options: EvaluateOptions) -> None:
    """Refuse data sets that cannot be opened before the work."""
    if options.probes:
        from dove_fast.evaluation.labelled import open_labelled

        for name in options.probes:
            open_labelled(name, allow_download=options.allow_download)


def _probes(
    loaded: LoadedModel, options: EvaluateOptions, set_aside: SetAside, on_progress: OnProgress | None
) -> tuple[tuple[ProbeRow, ...], tuple[Measure, ...]]:
    if not options.probes:
        return (), ()
    from dove_fast.evaluation.probing import probe, probe_measure

    seed = 0
    rows: list[ProbeRow] = []
    for name in options.probes:
        rows += probe(
            loaded.model,
            name,
            batch_size=options.batch_size,
            seed=seed,
            images=options.probe_images,
            eos_threshold=options.eos_threshold,
            allow_download=options.allow_download,
            on_progress=on_progress,
            on_set_aside=partial(_put_aside, set_aside, name),
        )
    return tuple(rows), (probe_measure(seed),)


def _put_aside(set_aside: SetAside, source: str, key: str, reason: str) -> None:
    set_aside.add(InputError(key, source, reason))


def _grounding(
    source: Source, data: str | os.PathLike[str], model: DOVE, options: EvaluateOptions, lengths: tuple[int, ...]
) -> tuple[Grounding | None, tuple[str, ...]]:
    """Return what texts do, None for a model or data without them; and why not, where that needs to be said."""
    if model.tokenizer is None or source.to_dict()["kind"] != "webdataset":
        return None, ()
    try:
        samples = WebDataset(data)
    except (ValueError, FileNotFoundError) as error:
        # Pipes, URLs, and shards that are damaged.
        return None, (f"texts were not measured: {error}",)
    meter = GroundingMeter(model, lengths=lengths, eos_threshold=options.eos_threshold)
    set_aside = Counter(samples.left_out)
    batches = region_batches(
        samples, model.tokenizer, model.config, options.batch_size, most=options.images, set_aside=set_aside
    )
    with contextlib.closing(read_ahead(batches, depth=AHEAD)) as ready:
        for batch in ready:
            meter.add(batch.images, batch.queries, batch.mask)
    if not meter.samples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in set_aside.items())
        return None, (f"texts were not measured, none could be used: {reasons or 'there are no samples'}",)
    return meter.result(dict(set_aside)), ()


def _warnings(images: int, inception: InceptionFeatures | None, rows: Sequence[QualityRow]) -> tuple[str, ...]:
    found = []
    if inception is not None and images <= inception.dimension:
        found.append(
            f"rFID of {images} images, not more than the {inception.dimension} features: their covariance has not full "
            "rank, and the number is biased upwards; compare it only with others of as many images"
        )
    if inception is not None and not inception.published:
        found.append(
            f"rFID by weights that are not the published file, whose SHA-256 begins with {PUBLISHED}: unless they are "
            "the same in another file, compare it with nothing published"
        )
    alone = next(row for row in rows if row.kind == VQGAN_ALONE)
    if any(row.psnr.mean > alone.psnr.mean for row in rows if row.kind == FIXED):
        found.append(
            "the tokens are better than the VQGAN alone: its decoder seems to have learnt to decode them, so it is not "
            "the VQGAN that the model was made from; --vqgan names that one"
        )
    return tuple(found)


def _baseline(checkpoint: str, model: DOVE) -> DOVE:
    """Load the model whose VQGAN is to be compared with."""
    return load_model(checkpoint, device=model.device).model.to(model.dtype)


def _context(
    loaded: LoadedModel,
    checkpoint: str,
    data: str,
    options: EvaluateOptions,
    *,
    images: int,
    set_aside: int,
    measures: tuple[Measure, ...],
    warnings: tuple[str, ...],
    seconds: float,
) -> Context:
    from dove_fast import __version__

    model, config = loaded.model, loaded.model.config
    transform = ShortSideCenterCrop(config.image_size).to_dict()
    return Context(
        version=__version__,
        checkpoint=checkpoint,
        fingerprint=loaded.fingerprint,
        data=data,
        images=images,
        set_aside=set_aside,
        image_size=config.image_size,
        transform=transform["name"],
        resample=transform["resample"],
        eos_threshold=config.eos_threshold if options.eos_threshold is None else options.eos_threshold,
        device=model.device.type,
        device_name=_device_name(model.device),
        dtype=next((name for name, dtype in DTYPES.items() if dtype == model.dtype), str(model.dtype)),
        threads=torch.get_num_threads(),
        batch_size=options.batch_size,
        torch=torch.__version__,
        seconds=seconds,
        measures=measures,
        warnings=warnings,
        vqgan=options.vqgan,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: what cannot be used is set aside with its reason."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
