"""The trainer: from a configuration to a trained model, going on where a stopped run was.

Everything random follows from the seed and the step, so that a run that goes on from a checkpoint computes what it
would have computed without the stop, to the bit where the kernels are deterministic (a CPU with one number of threads).
FSDP is not needed at these sizes: the base model, its gradients, moments and averaged weights take 5 GB.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dove_fast.data.crop import RandomCrop
from dove_fast.data.samples import Samples
from dove_fast.errors import CheckpointError
from dove_fast.failures import JobError, stopping
from dove_fast.models.dove import DOVE
from dove_fast.training.batches import Batches, TrainingBatch
from dove_fast.training.checkpoint import (
    RunState,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    read_models,
    remove_unfinished,
    write_checkpoint,
)
from dove_fast.training.config import DataConfig, TrainConfig
from dove_fast.training.data import open_samples
from dove_fast.training.distributed import Ranks, any_over_ranks, sum_over_ranks
from dove_fast.training.interrupt import stop_requested
from dove_fast.training.reporting import Reporter
from dove_fast.training.setup import build_loss, build_model, run_directory
from dove_fast.training.step import StepOutcome, Stepper

__all__ = ["TrainProgress", "TrainReport", "Trainer", "train"]

logger = logging.getLogger(__name__)

# The held-out crops are the same for every run, so that runs can be compared.
VALIDATION_SEED = 0
# Whether there are texts shows in the first of them.
SAMPLES_LOOKED_AT = 100
FINGERPRINT = 1000
RESUME = "run the same command again to go on from the last checkpoint"


@dataclass(frozen=True)
class TrainProgress:
    """How far a run is: steps done of `steps`, this step's error and mean length, images/s so far.

    error: the mean squared error of pixels, or of features where no loss reads pixels.
    """

    step: int
    steps: int
    error: float
    length: float
    images_per_second: float


@dataclass(frozen=True)
class TrainReport:
    """What a run came to: `step` of `steps`, of which this process did `computed` in `seconds`.

    skipped: steps that were not finite. interrupted: by a signal. model: the exported checkpoint, None before the end.
    """

    step: int
    steps: int
    computed: int
    seconds: float
    skipped: int
    interrupted: bool
    model: Path | None


OnProgress = Callable[[TrainProgress], None]


def train(
    config: TrainConfig, ranks: Ranks, *, allow_download: bool = False, on_progress: OnProgress | None = None
) -> TrainReport:
    """Train as `config` says, or go on with the run that its output holds, until the end or a signal.

    SIGINT and SIGTERM end the step, write a checkpoint and return. Every process of a group calls it; `ranks` comes
    from `process_group`. allow_download: LPIPS may download its backbone.
    Raises `ValueError` for what does not fit together, before a step is done; then `JobError` for a run that cannot go
    on, such as for a full disk; what it had written is intact.
    """
    output = Path(config.run.output)
    held = run_directory(config, allow_download=allow_download) if ranks.is_first else contextlib.nullcontext(output)
    with held as output:
        return Trainer(config, ranks, output, allow_download=allow_download).run(on_progress)


def _fingerprint(samples: Samples) -> str:
    """Return a hash over the keys and texts of FINGERPRINT samples or fewer, evenly spread: all would take minutes."""
    digest = hashlib.sha256()
    for index in range(0, len(samples), max(1, len(samples) // FINGERPRINT)):
        sample = samples[index]
        digest.update(repr((sample.picture.key, sample.picture.span, sample.text, sample.boxes)).encode())
    return digest.hexdigest()


class Trainer:
    """A run's parts, as its last checkpoint in `output` left them, or as they start."""

    def __init__(self, config: TrainConfig, ranks: Ranks, output: Path, *, allow_download: bool = False) -> None:
        self.config, self.ranks, self.output = config, ranks, output
        run = config.run
        if run.batch_size % (ranks.world * run.accumulation):
            raise ValueError(
                f"[run] batch_size must be a multiple of {ranks.world} processes times accumulation = "
                f"{run.accumulation}, got {run.batch_size}"
            )
        loss, discriminator = build_loss(config, allow_download=allow_download)
        self.state = RunState()
        saved: dict[str, Tensor] = {}
        if ranks.is_first:
            remove_unfinished(output)
        found = latest_checkpoint(output)
        if found is None:
            model = build_model(config.model, run.seed)
            averaged = copy.deepcopy(model) if run.ema_decay else None
        else:
            saved, self.state = read_checkpoint(found)
            if not ranks.is_first:
                # The first one has them all.
                self.state.left_out = {}
            model, averaged = read_models(found, averaged=run.ema_decay > 0)
        self.stepper = Stepper(config, ranks, model, averaged, loss, discriminator)
        self.batches = self._open(config.data, "data", run.batch_size, run.seed, ranks)
        if found is None:
            self.state.samples, self.state.data = len(self.batches.samples), _fingerprint(self.batches.samples)
        else:
            self._restore(saved)
        validation = None
        if config.validation is not None and ranks.is_first:
            size = min(run.batch_size, config.report.validation_images)
            validation = self._open(config.validation, "validation", size, VALIDATION_SEED, ranks.alone())
        self.reporter = Reporter(config, ranks, validation)

    @property
    def model(self) -> DOVE:
        """The model that is trained."""
        return self.stepper.model

    def run(self, on_progress: OnProgress | None = None) -> TrainReport:
        """Do the steps that are left, and export the model at the end."""
        run, report, state = self.config.run, self.config.report, self.state
        first, start = state.step, time.perf_counter()
        batches = self.batches.ahead(range(first, run.steps), self.config.data.workers)
        # From here on nothing is wrong use.
        with (
            stopping(RESUME),
            stop_requested() as stop,
            contextlib.closing(batches),
            self.reporter.open(self.output, first),
        ):
            for batch in batches:
                outcome = self.stepper.step(state.step, batch)
                state.step += 1
                self._account(batch, outcome)
                self.reporter.after_step(self.stepper, state, outcome)
                if on_progress is not None and self.ranks.is_first:
                    rate = (state.step - first) * run.batch_size / (time.perf_counter() - start)
                    length = float(torch.cat([result.lengths for result in outcome.results]).double().mean())
                    on_progress(TrainProgress(state.step, run.steps, self._error(outcome), length, rate))
                if any_over_ranks(stop.is_set(), self.ranks.device):
                    break
                if report.checkpoint_steps and state.step % report.checkpoint_steps == 0:
                    self._save()
            self._save()
            exported = self._export() if state.step >= run.steps else None
        for reason, count in sorted(state.left_out.items()):
            logger.info("%d samples left out: %s", count, reason)
        seconds = time.perf_counter() - start
        return TrainReport(
            state.step, run.steps, state.step - first, seconds, state.skipped, exported is None, exported
        )

    def _error(self, outcome: StepOutcome) -> float:
        if self.config.loss.weighs_pixels:
            return outcome.mse
        return float(torch.stack([result.terms.features for result in outcome.results]).mean())

    def _open(self, data: DataConfig, name: str, batch_size: int, seed: int, ranks: Ranks) -> Batches:
        samples = open_samples(data)
        for reason, count in samples.left_out.items():
            logger.info("[%s] %d samples left out: %s", name, count, reason)
        sizes = self.model.config
        reads_texts = self.config.run.stage == "dove" and data.text_dropout < 1
        if reads_texts and self.model.tokenizer is None:
            for index in range(min(len(samples), SAMPLES_LOOKED_AT)):
                if samples[index].text:
                    raise ValueError(
                        f"[{name}] has texts and the model no tokenizer: give [model] tokenizer, or text_dropout = 1"
                    )
        longest = sizes.generator.max_position_embeddings - sizes.num_features - sizes.num_tokens
        return Batches(
            samples,
            size=sizes.image_size,
            batch_size=batch_size,
            crop=RandomCrop(data.smallest_crop, data.mirror),
            seed=seed,
            tokenizer=self.model.tokenizer,
            text_dropout=data.text_dropout if reads_texts else 1.0,
            longest_query=longest,
            rank=ranks.rank,
            world=ranks.world,
        )

    def _account(self, batch: TrainingBatch, outcome: StepOutcome) -> None:
        state, limit = self.state, self.config.run.nonfinite_limit
        state.left_out = dict(Counter(state.left_out) + batch.left_out)
        if outcome.finite:
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        logger.warning(
            "step %d skipped: error %g, norm of the gradient %g", state.step, outcome.error, outcome.grad_norm
        )
        if state.skipped_in_a_row > limit:
            raise JobError(
                f"{state.skipped_in_a_row} steps in a row were not finite, the limit is {limit}; the last checkpoint "
                f"is intact. Lower [optimizer] learning_rate or max_grad_norm, or train in float32"
            )

    def _restore(self, saved: dict[str, Tensor]) -> None:
        samples = len(self.batches.samples)
        if samples != self.state.samples:
            raise ValueError(
                f"the run in {self.output} had {self.state.samples} samples, [data] path now has {samples}: the order "
                f"would be another one; put the data back, or choose another [run] output"
            )
        if _fingerprint(self.batches.samples) != self.state.data:
            raise ValueError(
                f"the run in {self.output} had other samples than [data] path has now; put the data back, or choose "
                f"another [run] output"
            )
        try:
            self._load(saved)
        except KeyError as error:
            raise CheckpointError(
                f"the last checkpoint in {self.output} lacks {error}; remove it to go on from the one before it"
            ) from None

    def _load(self, saved: dict[str, Tensor]) -> None:
        stepper = self.stepper
        stepper.loss.threshold.load_state_dict(self.state.threshold)
        load_optimizer(stepper.optimizer, stepper.trained, "optimizer", saved)
        if stepper.judge is not None:
            load_optimizer(stepper.judge, stepper.judged, "judge", saved)
            with torch.no_grad():
                for name, parameter in stepper.judged:
                    parameter.copy_(saved[f"discriminator.{name}"])
        stepper.codebook.counts.copy_(saved["codebook_counts"])

    def _save(self) -> None:
        left_out = sum_over_ranks(Counter(self.state.left_out))
        if not self.ranks.is_first:
            return
        self.reporter.sync()
        stepper, state = self.stepper, self.state
        state.threshold = stepper.loss.threshold.state_dict()
        tensors = optimizer_tensors(stepper.optimizer, stepper.trained, "optimizer")
        tensors["codebook_counts"] = stepper.codebook.counts
        if stepper.judge is not None:
            tensors |= optimizer_tensors(stepper.judge, stepper.judged, "judge")
            tensors |= {f"discriminator.{name}": parameter for name, parameter in stepper.judged}
        keep = self.config.report.keep_checkpoints
        whole = dataclasses.replace(state, left_out=dict(left_out))
        write_checkpoint(self.output, stepper.model, stepper.averaged, tensors, whole, keep=keep)

    def _export(self) -> Path:
        """Write the model that the run was for: the averaged weights where there are any."""
        target = self.output / "model"
        if self.ranks.is_first:
            (self.stepper.averaged or self.stepper.model).save_pretrained(target)
        return target
