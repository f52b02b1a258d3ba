"""A run's configuration: what TOML gives, and refusals that name section and field."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from made_runs import write_toml

from dove_fast.losses import LossConfig
from dove_fast.training import TrainConfig
from dove_fast.training.config import (
    DataConfig,
    DataSource,
    DiscriminatorConfig,
    ModelSource,
    OptimizerConfig,
    PerceptualConfig,
    ReportConfig,
    RunConfig,
)

LEAST: dict[str, dict[str, Any]] = {"run": {"output": "out"}, "model": {"preset": "tiny"}, "data": {"path": "photos"}}
SECTIONS = {
    "run": RunConfig,
    "model": ModelSource,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "loss": LossConfig,
    "discriminator": DiscriminatorConfig,
    "perceptual": PerceptualConfig,
    "report": ReportConfig,
}
HINTS = {
    # LossConfig spells its types itself.
    name: {key: {"int": int, "float": float, "bool": bool, "str": str}.get(kind, kind) for key, kind in hints.items()}
    for name, hints in ((name, get_type_hints(section)) for name, section in SECTIONS.items())
}
FIELDS = [
    (section, key, kind)
    for section, hints in HINTS.items()
    for key, kind in hints.items()
    if kind in (int, float, str, bool)
]
NUMBERS = [(section, key, kind) for section, key, kind in FIELDS if kind in (int, float)]

# A value for every field that is not its default; the stage is, as the other one refuses some of them.
OTHER: dict[str, dict[str, Any]] = {
    "run": {
        "output": "runs/other",
        "stage": "dove",
        "frozen": "nothing",
        "steps": 7,
        "batch_size": 6,
        "accumulation": 3,
        "seed": 11,
        "precision": "bfloat16",
        "recompute": True,
        "ema_decay": 0.5,
        "forced_length_share": 0.25,
        "longest_forced_length": 6,
        "codebook_restart_steps": 9,
        "nonfinite_limit": 4,
    },
    "model": {"config": "model.json", "tokenizer": "tokenizer.json"},
    "data": {
        "path": "shards",
        "kind": "open-images",
        "split": "validation",
        "regions": "boxes",
        "smallest_crop": 0.75,
        "mirror": False,
        "text_dropout": 0.125,
        "workers": 5,
    },
    "validation": {"path": "held-out", "kind": "webdataset"},
    "optimizer": {
        "learning_rate": 3e-3,
        "schedule": "constant",
        "warmup_steps": 5,
        "final_share": 0.1,
        "beta1": 0.8,
        "beta2": 0.95,
        "weight_decay": 0.2,
        "max_grad_norm": 0.0,
    },
    "loss": {
        "mse_weight": 16.0,
        "perceptual_weight": 0.5,
        "adversarial_weight": 0.0,
        "adversarial_start": 3,
        "adaptive_adversarial": True,
        "codebook_weight": 1.0,
        "commitment_weight": 0.25,
        "feature_weight": 0.5,
        "eos_weight_start": 1e-5,
        "eos_weight_end": 1e-3,
        "eos_weight_steps": 40,
        "irrelevant_weight": 1e-3,
        "threshold_window": 10,
    },
    "discriminator": {"channels": 32, "layers": 2, "learning_rate": 2e-4},
    "perceptual": {"net": "alex", "weights": "alexnet.safetensors"},
    "report": {
        "log_steps": 1,
        "validation_steps": 2,
        "validation_images": 3,
        "picture_steps": 4,
        "pictures": 5,
        "checkpoint_steps": 6,
        "keep_checkpoints": 7,
        "tensorboard": True,
    },
}


def make(**changes: dict[str, Any]) -> TrainConfig:
    """Return the least configuration with fields changed by section."""
    names = [*LEAST, *(name for name in changes if name not in LEAST)]
    return TrainConfig.from_dict({name: {**LEAST.get(name, {}), **changes.get(name, {})} for name in names})


def named(section: str, key: str) -> str:
    return f"[{section}] {key} "


def refusal(error: type[Exception], **changes: dict[str, Any]) -> str:
    with pytest.raises(error) as caught:
        make(**changes)
    assert type(caught.value) is error
    return str(caught.value)


def test_absent_fields_take_their_defaults(tmp_path):
    config = TrainConfig.from_toml(write_toml(tmp_path / "run.toml", LEAST))
    assert config.run == RunConfig(output="out") and config.run.stage == "dove" and config.run.frozen == "vqgan"
    assert config.model == ModelSource(preset="tiny")
    assert config.data == DataConfig(path="photos")
    assert config.validation is None
    assert (config.optimizer, config.loss, config.report) == (OptimizerConfig(), LossConfig(), ReportConfig())
    # The paper's values.
    assert config.data.text_dropout == 0.5
    assert (config.loss.irrelevant_weight, config.loss.threshold_window) == (1e-10, 100)


def test_reads_what_toml_can_spell(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "# A comment.\n[run]\noutput = 'runs/ä'  # literal\nsteps = 1_000\nrecompute = true\n"
        '[model]\ncheckpoint = "a \\"b\\""\n[data]\npath = "p"\nsmallest_crop = 1\n'
        "[optimizer]\nlearning_rate = 8e-4\nmax_grad_norm = 0\n",
        encoding="utf-8",
    )
    config = TrainConfig.from_toml(path)
    assert (config.run.output, config.run.steps, config.run.recompute) == ("runs/ä", 1000, True)
    assert config.model.checkpoint == 'a "b"'
    # A whole number will do for a number.
    assert (config.data.smallest_crop, config.optimizer.learning_rate, config.optimizer.max_grad_norm) == (1, 8e-4, 0)


def test_every_field_goes_there_and_back(tmp_path):
    for section, fields in SECTIONS.items():
        for key, default in ((field.name, field.default) for field in dataclasses.fields(fields)):
            assert section == "model" or key in ("more", "stage") or OTHER[section][key] != default, (section, key)
    config = TrainConfig.from_toml(write_toml(tmp_path / "run.toml", OTHER))
    for section, values in OTHER.items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value, (section, key)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # No section stays none.
    least = make()
    assert "validation" not in least.to_dict()
    assert TrainConfig.from_dict(least.to_dict()) == least != config


def test_a_dictionary_of_a_run_is_a_copy():
    config = make()
    config.to_dict()["run"]["steps"] = 1
    assert config.run.steps == RunConfig(output="out").steps


@pytest.mark.parametrize(("section", "key", "kind"), FIELDS)
def test_another_type_is_refused(section, key, kind):
    wrong = {int: ["3", 1.0, True, None], float: ["3", False, [1.0]], str: [3, True, ["a"]], bool: [0, 1, "true"]}
    wanted = {int: "an int", float: "a number", str: "a string", bool: "true or false"}[kind]
    for value in wrong[kind]:
        message = refusal(TypeError, **{section: {key: value}})
        assert message == f"{named(section, key)}must be {wanted}, got {value!r}"


@pytest.mark.parametrize(("section", "key", "kind"), NUMBERS)
def test_numbers_that_make_no_sense_are_refused(section, key, kind):
    for value in (-1,) if kind is int else (-1, -1e-9, math.nan, math.inf, -math.inf):
        message = refusal(ValueError, **{section: {key: value}})
        assert message == f"{named(section, key)}must be finite and not negative, got {value}"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *(("run", key) for key in ("steps", "batch_size", "accumulation")),
        *(("data", key) for key in ("smallest_crop", "workers")),
        ("optimizer", "learning_rate"),
        *(("discriminator", key) for key in ("channels", "layers", "learning_rate")),
        *(("report", key) for key in ("validation_images", "pictures", "keep_checkpoints")),
        *(("loss", key) for key in ("eos_weight_start", "eos_weight_end", "eos_weight_steps", "threshold_window")),
    ],
)
def test_zero_is_refused_where_it_means_nothing(section, key):
    assert refusal(ValueError, **{section: {key: 0}}) == f"{named(section, key)}must be above 0, got 0"


def test_zero_means_never_or_off():
    for key in (
        "ema_decay",
        "forced_length_share",
        "longest_forced_length",
        "codebook_restart_steps",
        "nonfinite_limit",
        "seed",
    ):
        make(run={key: 0})
    for key in ("log_steps", "validation_steps", "picture_steps", "checkpoint_steps"):
        make(report={key: 0})
    make(optimizer={"max_grad_norm": 0, "warmup_steps": 0, "weight_decay": 0, "beta1": 0})
    make(data={"text_dropout": 0})


@pytest.mark.parametrize(
    ("section", "key", "value", "bound"),
    [
        ("run", "ema_decay", 1.0, "below 1"),
        ("run", "forced_length_share", 1.01, "at most 1"),
        ("data", "smallest_crop", 1.5, "at most 1"),
        ("data", "text_dropout", 1.5, "at most 1"),
        ("optimizer", "beta1", 1.0, "below 1"),
        ("optimizer", "beta2", 1.0, "below 1"),
        ("optimizer", "final_share", 1.5, "at most 1"),
    ],
)
def test_shares_have_an_upper_bound(section, key, value, bound):
    assert refusal(ValueError, **{section: {key: value}}) == f"[{section}] {key} must be {bound}, got {value}"
    if bound == "at most 1":
        make(**{section: {key: 1.0}})


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [
        ("run", "stage", ("vqgan", "dove")),
        ("run", "frozen", ("vqgan", "encoder", "nothing")),
        ("run", "precision", ("float32", "bfloat16")),
        ("model", "preset", ("base", "tiny")),
        ("data", "kind", ("folder", "webdataset", "visual-genome", "open-images")),
        ("optimizer", "schedule", ("cosine", "constant")),
        ("perceptual", "net", ("vgg", "alex", "squeeze")),
    ],
)
def test_a_choice_is_one_of_those_it_names(section, key, known):
    message = refusal(ValueError, **{section: {key: "VQGAN"}})
    assert message == f"[{section}] {key} must be one of {', '.join(map(repr, known))}, got 'VQGAN'"
    for value in known:
        assert getattr(getattr(make(**{section: {key: value}}), section), key) == value


def test_more_data_sets(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\noutput = "out"\n[model]\npreset = "tiny"\n[data]\npath = "a"\n'
        '[[data.more]]\npath = "b"\nkind = "open-images"\nregions = "all"\n[[data.more]]\npath = "c"\n'
    )
    config = TrainConfig.from_toml(path)
    more = (DataSource(path="b", kind="open-images", regions="all"), DataSource(path="c"))
    assert config.data.more == more
    assert config.data.sources == (config.data, *more)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()

    assert refusal(ValueError, data={"more": [{"path": "b"}, {}]}) == "[data.more] path must name the pictures"
    assert refusal(ValueError, data={"more": [{"path": "b", "workers": 1}]}).startswith(
        "[data.more] has no field 'workers'; the fields are path, kind, split, regions"
    )
    assert refusal(ValueError, data={"more": [{"path": "b", "kind": "x"}]}).startswith(
        "[data.more] kind must be one of"
    )
    assert refusal(TypeError, data={"more": [3]}) == "[data.more] must be a table, got 3"
    assert refusal(TypeError, data={"more": "b"}).startswith("[data] more must be a tuple of DataSource")


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("folder", ()),
        ("webdataset", ()),
        ("visual-genome", ("descriptions", "questions", "all")),
        ("open-images", ("relationships", "boxes", "all")),
    ],
)
def test_regions_are_those_of_the_kind(kind, choices):
    for regions in ("", "descriptions", "questions", "relationships", "boxes", "all"):
        if regions in ("", *choices):
            assert make(data={"kind": kind, "regions": regions}).data.regions == regions
        else:
            message = refusal(ValueError, data={"kind": kind, "regions": regions})
            wanted = ", ".join(map(repr, choices)) or "left out"
            assert message == f"[data] regions of kind {kind!r} must be {wanted}, got {regions!r}"


def test_one_source_of_weights():
    expected = "[model] must have one of preset, config and checkpoint, got "
    assert refusal(ValueError, model={"preset": ""}) == expected + "none"
    assert refusal(ValueError, model={"config": "a.json"}) == expected + "['preset', 'config']"
    assert refusal(ValueError, model={"config": "a.json", "checkpoint": "b"}).startswith(expected)


def test_paths_that_are_needed():
    assert refusal(ValueError, run={"output": ""}) == "[run] output must name the run's directory"
    assert refusal(ValueError, data={"path": ""}) == "[data] path must name the pictures"
    assert refusal(ValueError, validation={"kind": "folder"}) == "[validation] path must name the pictures"


def test_a_codebook_that_nothing_trains():
    assert "[run] codebook_restart_steps" in refusal(ValueError, run={"codebook_restart_steps": 5})
    message = refusal(ValueError, loss={"codebook_weight": 1.0})
    assert "[loss] codebook_weight" in message and '[run] frozen = "vqgan"' in message
    make(run={"stage": "vqgan", "codebook_restart_steps": 5}, loss={"codebook_weight": 1.0})
    make(run={"frozen": "encoder", "codebook_restart_steps": 5}, loss={"codebook_weight": 1.0})


def test_features_without_pixels():
    message = refusal(ValueError, run={"stage": "vqgan"}, loss={"feature_weight": 1.0})
    assert message == '[loss] feature_weight is for what tokens become, and [run] stage = "vqgan" has none'
    features = {"mse_weight": 0.0, "perceptual_weight": 0.0, "adversarial_weight": 0.0, "feature_weight": 1.0}
    for run in ({"stage": "vqgan"}, {"frozen": "encoder"}, {"frozen": "nothing"}):
        loss = features | {"feature_weight": 0.0}
        message = refusal(ValueError, run=run, loss=loss)
        assert "no term reads the pixels" in message and '[run] frozen = "vqgan"' in message
    make(loss=features)
    make(run={"frozen": "encoder"}, loss={"feature_weight": 1.0})
    message = refusal(ValueError, loss=features | {"feature_weight": 0.0})
    assert message == "[loss] no term reconstructs: set mse_weight, perceptual_weight or feature_weight"
    adversary = features | {"adversarial_weight": 0.1, "adaptive_adversarial": True}
    message = refusal(ValueError, run={"frozen": "encoder"}, loss=adversary)
    assert message.startswith("[loss] adaptive_adversarial scales to the gradient of the pixels' error")


def test_a_longest_length_of_none():
    message = refusal(ValueError, run={"longest_forced_length": 4})
    assert message == "[run] longest_forced_length is for forced lengths: set forced_length_share"
    make(run={"longest_forced_length": 4, "forced_length_share": 0.1})


def test_unknown_and_missing_sections_and_fields():
    assert refusal(ValueError, optimiser={}) == f"no section [optimiser]; the sections are {_all_sections()}"
    message = refusal(ValueError, report={"log_step": 5})
    fields = [field.name for field in dataclasses.fields(ReportConfig)]
    assert message == f"[report] has no field 'log_step'; the fields are {', '.join(fields)}"
    for section in LEAST:
        with pytest.raises(ValueError, match=rf"the section \[{section}\] is missing"):
            TrainConfig.from_dict({name: table for name, table in LEAST.items() if name != section})
    with pytest.raises(TypeError, match=r"\[run\] must be a table, got 5"):
        TrainConfig.from_dict({**LEAST, "run": 5})


def _all_sections() -> str:
    return "run, model, data, validation, optimizer, loss, discriminator, perceptual, report"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such configuration: {tmp_path}/none.toml"):
        TrainConfig.from_toml(tmp_path / "none.toml")
    path = tmp_path / "broken.toml"
    for text in ("[run\n", "[run]\nsteps = \n", "[run]\n[run]\n", "[run]\nsteps = 1\nsteps = 2\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path} is not valid TOML: .*line "):
            TrainConfig.from_toml(path)


def test_the_learning_rate_rises_and_falls_along_a_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_share=0.25)
    rates = [config.learning_rate_at(step, 12) for step in range(14)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    # A quarter, half and three quarters of the way, between 2 and 0.5.
    half = math.cos(math.pi / 4)
    assert (rates[6], rates[8], rates[10]) == pytest.approx((1.25 + 0.75 * half, 1.25, 1.25 - 0.75 * half))
    assert rates[4:13] == sorted(rates[4:13], reverse=True)
    # Behind the end, as in a run that is made shorter, it stays.
    assert rates[12:] == pytest.approx([0.5, 0.5])


def test_the_learning_rate_without_a_rise_or_a_fall():
    constant = OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="constant")
    assert [constant.learning_rate_at(step, 6) for step in range(6)] == [1, 2, 2, 2, 2, 2]
    at_once = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
    assert [at_once.learning_rate_at(step, 2) for step in range(3)] == pytest.approx([2, 1, 0])
    # Shorter than its rise.
    longer = OptimizerConfig(learning_rate=2.0, warmup_steps=4)
    assert [longer.learning_rate_at(step, 3) for step in range(3)] == pytest.approx([0.5, 1, 1.5])
    assert longer.learning_rate_at(4, 4) == 2


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples").rglob("*.toml")), ids=lambda path: path.name
)
def test_the_examples_are_valid(path):
    assert TrainConfig.from_toml(path).run.steps > 0
