"""What a training run is: a TOML file of sections, each a frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dove_fast.fields import check_fields
from dove_fast.losses.config import LossConfig

__all__ = [
    "DataConfig",
    "DataSource",
    "DiscriminatorConfig",
    "ModelSource",
    "OptimizerConfig",
    "PerceptualConfig",
    "ReportConfig",
    "RunConfig",
    "TrainConfig",
]

STAGES = ("vqgan", "dove")
FROZEN = ("vqgan", "encoder", "nothing")
# With the regions that each has to choose from.
DATA_KINDS = {
    "folder": (),
    "webdataset": (),
    "visual-genome": ("descriptions", "questions", "all"),
    "open-images": ("relationships", "boxes", "all"),
}
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16")
PRESETS = ("base", "tiny")
PERCEPTUAL_NETS = ("vgg", "alex", "squeeze")


def _check_choice(section: Any, name: str, key: str, choices: tuple[str, ...]) -> None:
    value = getattr(section, key)
    if value not in choices:
        raise ValueError(f"[{name}] {key} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_above_zero(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) <= 0:
            raise ValueError(f"[{name}] {key} must be above 0, got {getattr(section, key)}")


@dataclass(frozen=True)
class ModelSource:
    """[model]: where the weights start. One of the first three is given.

    preset: "base" or "tiny", random weights by `[run] seed`. config: a JSON file of a `DOVEConfig`, random weights.
    checkpoint: what `DOVE.from_pretrained` takes. tokenizer: a `tokenizers` file for texts; "" takes the
    checkpoint's.
    """

    preset: str = ""
    config: str = ""
    checkpoint: str = ""
    tokenizer: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "[model] ")
        given = [key for key in ("preset", "config", "checkpoint") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"[model] must have one of preset, config and checkpoint, got {given or 'none'}")
        if self.preset:
            _check_choice(self, "model", "preset", PRESETS)


@dataclass(frozen=True)
class DataSource:
    """[[data.more]]: one data set.

    kind: "folder" (a folder of pictures or a text file of paths), "webdataset" (.tar shards: a directory, or a path
    with braces), "visual-genome" or "open-images" (the directory with their publishers' files). path: where it is.
    split: of Open Images. regions: which of them, where the kind has several: "descriptions" or "questions" of Visual
    Genome, "relationships" or "boxes" of Open Images, "all"; "" for all of Visual Genome and for the relationships.
    """

    path: str = ""
    kind: str = "folder"
    split: str = "train"
    regions: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "[data] ")
        _check_choice(self, "data", "kind", tuple(DATA_KINDS))
        if self.regions and self.regions not in DATA_KINDS[self.kind]:
            choices = ", ".join(map(repr, DATA_KINDS[self.kind])) or "left out"
            raise ValueError(f"[data] regions of kind {self.kind!r} must be {choices}, got {self.regions!r}")


@dataclass(frozen=True)
class DataConfig(DataSource):
    """[data] and [validation]: pictures, and for Q-DOVE their texts and regions; a data set, and more behind it.

    smallest_crop: crops are squares of this share of the short side up to all of it. mirror: half of the crops are
    mirrored, but not where a text is read. text_dropout: this share of the texts is left out, and the region is then
    the whole picture; the paper's value. workers: threads that decode. more: further data sets, each sample of all of
    them once an epoch.
    """

    smallest_crop: float = 0.5
    mirror: bool = True
    text_dropout: float = 0.5
    workers: int = 2
    more: tuple[DataSource, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_above_zero(self, "data", "smallest_crop", "workers")
        for key in ("smallest_crop", "text_dropout"):
            if getattr(self, key) > 1:
                raise ValueError(f"[data] {key} must be at most 1, got {getattr(self, key)}")

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """Every data set, in order."""
        return (self, *self.more)


@dataclass(frozen=True)
class RunConfig:
    """[run]: what is trained, for how long.

    output: the run's directory. stage: "vqgan" trains the VQGAN alone, through its codebook; "dove" all of the model
    but what `frozen` names: "vqgan" (the paper's), its "encoder", or "nothing". The codebook is trained where
    `[loss] codebook_weight` is not 0. steps: optimiser steps. batch_size: images a step, over all processes and
    accumulated parts; accumulation: into how many parts a process splits its share. seed: of weights, data and lengths.
    precision: "bfloat16" runs under autocast, the weights stay float32. recompute: as in `training_forward`.
    ema_decay: of the averaged weights, which are what is validated and exported; 0 for none.
    forced_length_share: steps with random lengths, so that every prefix reconstructs (METHOD section 4);
    longest_forced_length: the longest of them, 0 for T.
    codebook_restart_steps: every so many steps, codewords that none of the features came to since are set to features
    of the batch, else a codebook that starts far from them stays unused; 0 for never.
    nonfinite_limit: steps in a row that are skipped for a loss or a gradient that is not finite, before the run stops.
    """

    output: str = ""
    stage: str = "dove"
    frozen: str = "vqgan"
    steps: int = 100_000
    batch_size: int = 64
    accumulation: int = 1
    seed: int = 0
    precision: str = "float32"
    recompute: bool = False
    ema_decay: float = 0.999
    forced_length_share: float = 0.0
    longest_forced_length: int = 0
    codebook_restart_steps: int = 0
    nonfinite_limit: int = 100

    def __post_init__(self) -> None:
        check_fields(self, "[run] ")
        _check_choice(self, "run", "stage", STAGES)
        _check_choice(self, "run", "frozen", FROZEN)
        _check_choice(self, "run", "precision", PRECISIONS)
        _check_above_zero(self, "run", "steps", "batch_size", "accumulation")
        if self.seed >= 2**63:
            raise ValueError(f"[run] seed must be below 2**63, got {self.seed}")
        if not self.output:
            raise ValueError("[run] output must name the run's directory")
        if self.ema_decay >= 1:
            raise ValueError(f"[run] ema_decay must be below 1, got {self.ema_decay}")
        if self.forced_length_share > 1:
            raise ValueError(f"[run] forced_length_share must be at most 1, got {self.forced_length_share}")


@dataclass(frozen=True)
class OptimizerConfig:
    """[optimizer]: AdamW; the learning rate rises over `warmup_steps` and then stays, or falls along a cosine.

    final_share: of the learning rate, where the cosine ends. weight_decay: of matrices and kernels, not of biases,
    norms and embeddings. max_grad_norm: gradients are scaled down to it; 0 for never.
    """

    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 1000
    final_share: float = 0.0
    beta1: float = 0.9
    # As VQGANs and GANs are trained: shorter than a language model's, for gradients that change.
    beta2: float = 0.99
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "[optimizer] ")
        _check_choice(self, "optimizer", "schedule", SCHEDULES)
        _check_above_zero(self, "optimizer", "learning_rate")
        for key in ("beta1", "beta2", "final_share"):
            limit_included = key == "final_share"
            value = getattr(self, key)
            if value > 1 or (value == 1 and not limit_included):
                raise ValueError(f"[optimizer] {key} must be {'at most' if limit_included else 'below'} 1, got {value}")

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of optimiser step `step` of `steps`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """[discriminator]: `PatchDiscriminator`'s sizes and learning rate, read where the adversarial weight is not 0."""

    channels: int = 64
    layers: int = 3
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        check_fields(self, "[discriminator] ")
        _check_above_zero(self, "discriminator", "channels", "layers", "learning_rate")


@dataclass(frozen=True)
class PerceptualConfig:
    """[perceptual]: LPIPS, read where the perceptual weight is not 0.

    net: its backbone, "vgg", "alex" or "squeeze". weights: a file with the backbone's weights, "" for random ones,
    which the log says.
    """

    net: str = "vgg"
    weights: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "[perceptual] ")
        _check_choice(self, "perceptual", "net", PERCEPTUAL_NETS)


@dataclass(frozen=True)
class ReportConfig:
    """[report]: every how many steps a run writes what; 0 for never, but for the checkpoint at the end.

    log_steps: a line of log.jsonl. validation_steps, validation_images: losses and lengths on held-out pictures, whole
    batches of them. picture_steps, pictures: reconstructions, and the histogram of lengths. checkpoint_steps,
    keep_checkpoints: how often, and how many of the last are kept. tensorboard: the same figures for TensorBoard.
    """

    log_steps: int = 50
    validation_steps: int = 1000
    validation_images: int = 1024
    picture_steps: int = 1000
    pictures: int = 8
    checkpoint_steps: int = 1000
    keep_checkpoints: int = 3
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "[report] ")
        _check_above_zero(self, "report", "validation_images", "pictures", "keep_checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run; `from_toml` reads it. Raises `TypeError` or `ValueError` that names section and field."""

    run: RunConfig
    model: ModelSource
    data: DataConfig
    validation: DataConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        for name, data in (("data", self.data), ("validation", self.validation)):
            if data is None:
                continue
            for section, source in ((name, data), *((f"{name}.more", more) for more in data.more)):
                if not source.path:
                    raise ValueError(f"[{section}] path must name the pictures")
        frozen = self.run.stage == "dove" and self.run.frozen == "vqgan"
        if self.loss.adversarial_weight and self.loss.adaptive_adversarial and frozen:
            raise ValueError(
                "[loss] adaptive_adversarial measures gradients at the VQGAN decoder's last layer, which has none with "
                '[run] frozen = "vqgan"; freeze less, or set it to false'
            )
        if self.loss.feature_weight and self.run.stage == "vqgan":
            raise ValueError('[loss] feature_weight is for what tokens become, and [run] stage = "vqgan" has none')
        if not self.loss.weighs_pixels and not frozen:
            raise ValueError(
                "[loss] mse_weight, perceptual_weight and adversarial_weight are 0: no term reads the pixels that the "
                'VQGAN makes, so that it cannot be trained; weigh one, or set [run] frozen = "vqgan"'
            )
        if self.loss.adaptive_adversarial and self.loss.adversarial_weight and not self.loss.weighs_images:
            raise ValueError(
                "[loss] adaptive_adversarial scales to the gradient of the pixels' error, and mse_weight and "
                "perceptual_weight are 0; weigh one, or set it to false"
            )
        if not (self.loss.weighs_pixels or self.loss.feature_weight):
            raise ValueError("[loss] no term reconstructs: set mse_weight, perceptual_weight or feature_weight")
        if self.run.longest_forced_length and not self.run.forced_length_share:
            raise ValueError("[run] longest_forced_length is for forced lengths: set forced_length_share")
        trains_codebook = self.loss.codebook_weight > 0
        if self.run.codebook_restart_steps and not trains_codebook:
            raise ValueError("[run] codebook_restart_steps needs a codebook that is trained: [loss] codebook_weight")
        if frozen and trains_codebook:
            raise ValueError('[loss] codebook_weight trains the codebook, but [run] frozen = "vqgan" keeps it')

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a run's file. Paths in it are relative to the working directory.

        Raises `FileNotFoundError` for no such file, `ValueError` for what is not TOML, an unknown section or field, and
        what the sections raise.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(f"no such configuration: {path}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        toml = _toml()
        try:
            values = toml.loads(text)
        except toml.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build a run from nested dictionaries, as TOML gives them; absent fields take their defaults."""
        sections = {key.name: key for key in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(sections))
        if unknown:
            raise ValueError(f"no section [{unknown[0]}]; the sections are {', '.join(sections)}")
        missing = [name for name in ("run", "model", "data") if name not in values]
        if missing:
            raise ValueError(f"the section [{missing[0]}] is missing")
        return cls(**{name: _section(_SECTIONS[name], table, name) for name, table in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes; JSON can hold it."""
        values = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS if getattr(self, name)}
        return dict(json.loads(json.dumps(values)))


_SECTIONS: dict[str, Any] = {
    "run": RunConfig,
    "model": ModelSource,
    "data": DataConfig,
    "validation": DataConfig,
    "optimizer": OptimizerConfig,
    "loss": LossConfig,
    "discriminator": DiscriminatorConfig,
    "perceptual": PerceptualConfig,
    "report": ReportConfig,
}


def _section(kind: Any, table: object, name: str) -> Any:
    if not isinstance(table, Mapping):
        raise TypeError(f"[{name}] must be a table, got {table!r}")
    known = [item.name for item in dataclasses.fields(kind)]
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"[{name}] has no field {unknown[0]!r}; the fields are {', '.join(known)}")
    values = dict(table)
    if isinstance(values.get("more"), list):
        values["more"] = tuple(_section(DataSource, more, f"{name}.more") for more in values["more"])
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        # A class may serve two sections, and that of the losses knows of none.
        text = re.sub(r"^(\[\w+\] |\w+\.)", "", str(error))
        raise type(error)(f"[{name}] {text}") from None


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    import tomli

    return tomli
