"""All of an evaluation, from a model and a place with images to the figures."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from dove_fast.data import Samples, ShortSideCenterCrop, Source, open_source, read_ahead
from dove_fast.errors import DoveError
from dove_fast.evaluation.context import CODEBOOK, COMPLEXITY, COST, REGIONS, describe_model, warnings_of
from dove_fast.evaluation.extractors import load_inception, load_lpips
from dove_fast.evaluation.grounding import GroundingMeter
from dove_fast.evaluation.lengths import check_lengths, default_lengths
from dove_fast.evaluation.measures import PSNR, SSIM, WINDOW
from dove_fast.evaluation.quality import QualityMeter
from dove_fast.evaluation.reading import SetAside, image_batches, region_batches
from dove_fast.evaluation.regions import check_tokenizer, has_regions, open_regions
from dove_fast.evaluation.results import Context, Evaluation, Grounding, Measure, ProbeRow
from dove_fast.failures import stopping
from dove_fast.jobs.loading import LoadedModel, load_model
from dove_fast.jobs.progress import Progress
from dove_fast.losses.perceptual import BACKBONES
from dove_fast.models.dove import DOVE
from dove_fast.models.inputs import check_length_options
from dove_fast.store.records import InputError
from dove_fast.text import TextTokenizer

__all__ = ["EvaluateOptions", "OnStage", "Outcome", "evaluate"]

logger = logging.getLogger(__name__)

AGAIN = "run the same command again"

# Batches that are decoded while one is measured.
AHEAD = 2
# What is being done, and how much of it.
OnStage = Callable[[str, Progress], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`.

    images: the first so many that can be read, and of regions too; None for all. lengths: token counts; None for 1/8,
    2/8, .. 8/8 of T. eos_threshold: as in `DOVE.tokenize`. max_errors: stop when more inputs cannot be read, those of
    the probes counted with the others.
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
    on_stage: OnStage | None = None,
    on_set_aside: Callable[[InputError], None] | None = None,
) -> Outcome:
    """Measure a model on the images that `data` stands for (see `open_source`); nothing is written.

    checkpoint: how the model was named, for the record. Where `data` are WebDataset shards with texts and boxes, and
    the model has a tokenizer, it is also measured what the texts do; if that fails, the rest is kept, with a warning.
    on_stage: called with what is being done and how far it is, after every batch and every classifier; the probes come
    first. on_set_aside: called with each input that cannot be read, also where that ends in an error.

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
    if model.tokenizer is not None and has_regions(source):
        check_tokenizer(model.tokenizer)
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
    baseline = None if options.vqgan is None else load_model(options.vqgan, device=model.device)
    quality = QualityMeter(
        model,
        lengths=lengths,
        eos_threshold=options.eos_threshold,
        lpips=lpips,
        inception=inception,
        vqgan=None if baseline is None else baseline.model.to(model.dtype),
    )
    set_aside = SetAside(options.max_errors, on_set_aside)
    # Before the long work, because they may refuse their data when they have read it.
    with _quiet_pillow():
        probes, probe_measures = _probes(loaded, options, set_aside, on_stage)
    measuring = time.perf_counter()
    with stopping(AGAIN), _quiet_pillow():
        _measure(quality, source, options, set_aside, on_stage)
    measuring = time.perf_counter() - measuring
    if not quality.images:
        reason = f", the last one for: {set_aside.errors[-1].reason}" if set_aside.errors else ""
        raise ValueError(f"{os.fspath(data)}: no image could be read{reason}")
    with stopping(AGAIN), _quiet_pillow():
        rows = quality.rows()
        if inception is not None and quality.images < 2:
            rfid_measure = replace(rfid_measure, left_out="a covariance needs two images at least")
        grounding, why_no_texts = _grounding(source, data, model, options, lengths, on_stage)
        of_images = (PSNR, SSIM, lpips_measure, rfid_measure, COST, CODEBOOK, COMPLEXITY)
        measures = [
            measure if measure.left_out is not None else replace(measure, images=quality.images)
            for measure in of_images
        ]
        if grounding is not None:
            measures.append(replace(REGIONS, images=grounding.samples))
        evaluation = Evaluation(
            context=Context(
                **describe_model(model),
                version=_version(),
                checkpoint=checkpoint,
                fingerprint=loaded.fingerprint,
                data=os.fspath(data),
                images=quality.images,
                set_aside=len(set_aside.errors),
                eos_threshold=config.eos_threshold if options.eos_threshold is None else options.eos_threshold,
                batch_size=options.batch_size,
                seconds=time.perf_counter() - start,
                measures=(*measures, *probe_measures),
                warnings=(
                    *warnings_of(quality.images, inception, rows, own_vqgan=baseline is None),
                    *why_no_texts,
                ),
                vqgan=options.vqgan,
                vqgan_fingerprint=None if baseline is None else baseline.fingerprint,
                measuring_seconds=measuring,
            ),
            rows=rows,
            lengths=quality.lengths(),
            complexity=quality.complexity(),
            codebooks=quality.codebooks(),
            grounding=grounding,
            probes=probes,
        )
    return Outcome(evaluation, set_aside.errors)


def _version() -> str:
    from dove_fast import __version__

    return __version__


def _measure(
    quality: QualityMeter,
    source: Source,
    options: EvaluateOptions,
    set_aside: SetAside,
    on_stage: OnStage | None,
) -> None:
    """Give every image to `quality`."""
    start, errors = time.perf_counter(), len(set_aside.errors)
    transform = ShortSideCenterCrop(quality.image_size)
    batches = image_batches(source, transform, options.batch_size, most=options.images, set_aside=set_aside)
    totals = [total for total in (source.inputs, options.images) if total is not None]
    with contextlib.closing(read_ahead(batches, depth=AHEAD)) as ready:
        for images in ready:
            quality.add(images)
            if on_stage is not None:
                progress = Progress(
                    quality.images,
                    min(totals, default=None),
                    quality.images,
                    quality.tokens,
                    errors=len(set_aside.errors) - errors,
                    elapsed=time.perf_counter() - start,
                )
                on_stage("images", progress)


def _check_probes(options: EvaluateOptions) -> None:
    """Refuse data sets that cannot be opened before the work."""
    if options.probes:
        from dove_fast.evaluation.labelled import open_labelled

        for name in options.probes:
            open_labelled(name, allow_download=options.allow_download)


def _probes(
    loaded: LoadedModel, options: EvaluateOptions, set_aside: SetAside, on_stage: OnStage | None
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
            on_progress=None if on_stage is None else partial(on_stage, f"features of {name}"),
            on_fit=None if on_stage is None else partial(_tell_fit, on_stage, f"classifiers of {name}"),
            on_set_aside=partial(_put_aside, set_aside, name),
        )
    return tuple(rows), (probe_measure(seed),)


def _tell_fit(on_stage: OnStage, stage: str, done: int, total: int) -> None:
    on_stage(stage, Progress(done, total, 0, 0))


def _put_aside(set_aside: SetAside, source: str, key: str, reason: str) -> None:
    set_aside.add(InputError(key, source, reason))


def _grounding(
    source: Source,
    data: str | os.PathLike[str],
    model: DOVE,
    options: EvaluateOptions,
    lengths: tuple[int, ...],
    on_stage: OnStage | None,
) -> tuple[Grounding | None, tuple[str, ...]]:
    """Return what texts do, None for a model or data without them; and why not, where that needs to be said."""
    if model.tokenizer is None or not has_regions(source):
        return None, ()
    meter = GroundingMeter(model, lengths=lengths, eos_threshold=options.eos_threshold)
    try:
        samples = open_regions(data)
        if isinstance(samples, str):
            return None, (f"texts were not measured: {samples}",)
        set_aside = Counter(samples.left_out)
        _measure_texts(meter, samples, model.tokenizer, model, options, set_aside, on_stage)
    except (DoveError, OSError, MemoryError, ValueError, RuntimeError) as error:
        # Hours of work lie behind: what the images gave does not depend on it.
        logger.warning("texts were not measured", exc_info=True)
        return None, (f"texts were not measured, it failed after {meter.samples} of them: {error}",)
    if not meter.samples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in set_aside.items())
        return None, (f"texts were not measured, none could be used: {reasons or 'there are no samples'}",)
    return meter.result(dict(set_aside)), ()


def _measure_texts(
    meter: GroundingMeter,
    samples: Samples,
    tokenizer: TextTokenizer,
    model: DOVE,
    options: EvaluateOptions,
    set_aside: Counter[str],
    on_stage: OnStage | None,
) -> None:
    """Give every sample with a text and a region to `meter`."""
    start = time.perf_counter()
    most = options.images
    batches = region_batches(samples, tokenizer, model.config, options.batch_size, most=most, set_aside=set_aside)
    total = len(samples) if most is None else min(len(samples), most)
    with contextlib.closing(read_ahead(batches, depth=AHEAD)) as ready:
        for batch in ready:
            meter.add(batch.images, batch.queries, batch.mask)
            if on_stage is not None:
                elapsed = time.perf_counter() - start
                on_stage("texts", Progress(meter.samples, total, meter.samples, meter.tokens, elapsed=elapsed))


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: what cannot be used is set aside with its reason."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
