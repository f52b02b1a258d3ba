"""The trainer: steps, what is written between them, and going on where a stopped run was.

Everything random follows from the seed and the step, so that a run that goes on from a checkpoint computes what it
would have computed without the stop, to the bit where the kernels are deterministic (a CPU with one number of threads).
FSDP is not needed at these sizes: the base model, its gradients and its optimiser take 4 GB.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dove_fast.data.crop import RandomCrop
from dove_fast.models.dove import DOVE
from dove_fast.training.batches import Batches, TrainingBatch
from dove_fast.training.checkpoint import (
    RunState,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    read_checkpoint,
    remove_unfinished,
    write_checkpoint,
)
from dove_fast.training.config import DataConfig, TrainConfig
from dove_fast.training.data import open_samples
from dove_fast.training.distributed import Ranks, any_over_ranks, average_gradients, mean_over_ranks
from dove_fast.training.interrupt import stop_requested
from dove_fast.training.log import RunLog, histogram_picture, picture_grid
from dove_fast.training.objective import Objective, StepResult, freeze
from dove_fast.training.optimization import CodebookUse, average_into, make_optimizer
from dove_fast.training.setup import TrainingError, build_loss, build_model, run_directory
from dove_fast.training.validation import Validation, length_warning, spread, validate

__all__ = ["TrainProgress", "TrainReport", "Trainer", "train"]

logger = logging.getLogger(__name__)

# The held-out crops are the same for every run, so that runs can be compared.
VALIDATION_SEED = 0
# What the random numbers of a seed and a step are for; `Batches` has 0 and 1.
FORCED, LENGTHS = 2, 3
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainProgress:
    """How far a run is: steps done of `steps`, this step's mean squared error and mean length, images/s so far."""

    step: int
    steps: int
    mse: float
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


@dataclass(frozen=True, eq=False)
class _Step:
    """What a step came to, on the host: a step that was not finite changed nothing."""

    results: Sequence[StepResult]
    mse: float
    grad_norm: float
    finite: bool
    codewords: int | None


def train(
    config: TrainConfig,
    ranks: Ranks,
    *,
    allow_download: bool = False,
    on_progress: Callable[[TrainProgress], None] | None = None,
) -> TrainReport:
    """Train as `config` says, or go on with the run that its output holds, until the end or a signal.

    SIGINT and SIGTERM end the step, write a checkpoint and return. Every process of a group calls it.
    Raises `ValueError` for what does not fit together, before a step is done; `TrainingError` for a run that cannot go
    on.
    """
    with run_directory(config) if ranks.is_first else contextlib.nullcontext(Path(config.run.output)) as output:
        return Trainer(config, ranks, output, allow_download=allow_download).run(on_progress)


class Trainer:
    """A run's parts, at the step that its last checkpoint was written at."""

    def __init__(self, config: TrainConfig, ranks: Ranks, output: Path, *, allow_download: bool = False) -> None:
        self.config, self.ranks, self.output = config, ranks, output
        run = config.run
        if run.batch_size % (ranks.world * run.accumulation):
            raise ValueError(
                f"[run] batch_size must be a multiple of {ranks.world} processes times accumulation = "
                f"{run.accumulation}, got {run.batch_size}"
            )
        model = build_model(config.model, run.seed)
        self.state = RunState()
        saved: dict[str, Tensor] = {}
        if ranks.is_first:
            remove_unfinished(output)
        found = latest_checkpoint(output)
        averaged: DOVE | None = None
        if found is not None:
            saved, self.state = read_checkpoint(found)
            tokenizer = model.tokenizer
            model = DOVE.from_pretrained(found / "model")
            model.tokenizer = tokenizer
            if run.ema_decay:
                averaged = DOVE.from_pretrained(found / "ema")
        self.model = model.to(ranks.device).train()
        if run.ema_decay and averaged is None:
            averaged = copy.deepcopy(model)
        self.averaged = None if averaged is None else averaged.to(ranks.device).eval().requires_grad_(False)
        texts = run.stage == "dove" and self.model.tokenizer is not None
        self.trained = freeze(self.model, run.stage, run.frozen, codebook=config.loss.codebook_weight > 0, texts=texts)
        self.optimizer = make_optimizer(self.trained, config.optimizer, config.optimizer.learning_rate)
        self.loss, discriminator = build_loss(config, allow_download=allow_download)
        self.loss.move_to(ranks.device)
        self.discriminator = discriminator
        self.judged = [] if discriminator is None else list(discriminator.named_parameters())
        self.judge = (
            make_optimizer(self.judged, config.optimizer, config.discriminator.learning_rate) if self.judged else None
        )
        self.codebook = CodebookUse(self.model.vqgan.quantize.embedding.weight, run.codebook_restart_steps)
        self.batches = self._open(config.data, "data", run.batch_size, run.seed, ranks)
        if found is None:
            self.state.samples = len(self.batches.samples)
        else:
            self._restore(saved)
        self.objective: Any = Objective(self.model, self.loss, stage=run.stage, recompute=run.recompute)
        if ranks.world > 1:
            # A batch may have no text, and then no gradient for their embedding.
            self.objective = DistributedDataParallel(
                self.objective, find_unused_parameters=texts, gradient_as_bucket_view=True
            )
        self.validation: Batches | None = None
        if config.validation is not None and ranks.is_first:
            size = min(run.batch_size, config.report.validation_images)
            self.validation = self._open(config.validation, "validation", size, VALIDATION_SEED, ranks.alone())

    def _open(self, data: DataConfig, name: str, batch_size: int, seed: int, ranks: Ranks) -> Batches:
        samples = open_samples(data)
        for reason, count in samples.left_out.items():
            logger.info("[%s] %d samples left out: %s", name, count, reason)
        sizes = self.model.config
        longest = sizes.generator.max_position_embeddings - sizes.num_features - sizes.num_tokens
        return Batches(
            samples,
            size=sizes.image_size,
            batch_size=batch_size,
            crop=RandomCrop(data.smallest_crop, data.mirror),
            seed=seed,
            tokenizer=self.model.tokenizer,
            text_dropout=data.text_dropout if self.config.run.stage == "dove" else 1.0,
            longest_query=longest,
            rank=ranks.rank,
            world=ranks.world,
        )

    def _restore(self, saved: dict[str, Tensor]) -> None:
        samples = len(self.batches.samples)
        if samples != self.state.samples:
            raise ValueError(
                f"the run in {self.output} had {self.state.samples} samples, [data] path now has {samples}: the order "
                f"would be another one; put the data back, or choose another [run] output"
            )
        self.loss.threshold.load_state_dict(self.state.threshold)
        load_optimizer(self.optimizer, self.trained, "optimizer", saved)
        if self.discriminator is not None and self.judge is not None:
            load_optimizer(self.judge, self.judged, "judge", saved)
            with torch.no_grad():
                for name, parameter in self.judged:
                    parameter.copy_(saved[f"discriminator.{name}"])
        self.codebook.counts.copy_(saved["codebook_counts"])

    # The run

    def run(self, on_progress: Callable[[TrainProgress], None] | None = None) -> TrainReport:
        """Do the steps that are left, and export the model at the end."""
        run, report, state = self.config.run, self.config.report, self.state
        log = RunLog(self.output, state.step, tensorboard=report.tensorboard) if self.ranks.is_first else None
        first, start, logged = state.step, time.perf_counter(), time.perf_counter()
        interrupted = False
        batches = self.batches.ahead(range(first, run.steps), self.config.data.workers)
        with stop_requested() as stop, contextlib.closing(batches), contextlib.ExitStack() as stack:
            if log is not None:
                stack.callback(log.close)
            for batch in batches:
                done = self._step(state.step, batch)
                state.step += 1
                self._account(batch, done)
                if report.log_steps and state.step % report.log_steps == 0:
                    values = self._figures(done)
                    now = time.perf_counter()
                    values["images_per_second"] = report.log_steps * run.batch_size / (now - logged)
                    logged = now
                    if log is not None:
                        log.write("train", state.step, values)
                if log is not None:
                    self._report(log)
                if on_progress is not None and self.ranks.is_first:
                    rate = (state.step - first) * run.batch_size / (time.perf_counter() - start)
                    length = float(torch.cat([result.lengths for result in done.results]).double().mean())
                    on_progress(TrainProgress(state.step, run.steps, done.mse, length, rate))
                interrupted = any_over_ranks(stop.is_set(), self.ranks.device)
                if interrupted and state.step < run.steps:
                    break
                if report.checkpoint_steps and state.step % report.checkpoint_steps == 0:
                    self._save()
        self._save()
        exported = self._export() if state.step >= run.steps else None
        return TrainReport(
            state.step,
            run.steps,
            state.step - first,
            time.perf_counter() - start,
            state.skipped,
            exported is None,
            exported,
        )

    def _step(self, step: int, batch: TrainingBatch) -> _Step:
        run, config = self.config.run, self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, run.steps)
        self.optimizer.zero_grad()
        lengths = self._forced_lengths(step)
        results = []
        parts = list(batch.parts(run.accumulation))
        for index, part in enumerate(parts):
            size = len(part.images)
            forced = None if lengths is None else lengths[index * size : (index + 1) * size]
            with self._accumulating(last=index == len(parts) - 1):
                with self._autocast():
                    result = self.objective(
                        part.images.to(self.ranks.device, non_blocking=True),
                        part.queries,
                        None if part.mask is None else part.mask.to(self.ranks.device, non_blocking=True),
                        step=step,
                        lengths=forced,
                    )
                (result.terms.total / len(parts)).backward()
            results.append(result)
        parameters = [parameter for _, parameter in self.trained]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
        mse = mean_over_ranks(torch.cat([result.terms.errors for result in results]))
        # Both are the same on all ranks.
        if not (math.isfinite(norm) and math.isfinite(mse)):
            self.optimizer.zero_grad()
            return _Step(results, mse, norm, False, None)
        self.optimizer.step()
        if lengths is None:
            # Lengths that were forced say nothing about the error at those that EOS chooses.
            self.loss.threshold.update(mse)
        if self.averaged is not None:
            average_into(self.averaged, self.model, run.ema_decay, step)
        codewords = self._tend_codebook(step, results)
        self._teach_discriminator(step, parts, results)
        return _Step(results, mse, norm, True, codewords)

    def _tend_codebook(self, step: int, results: Sequence[StepResult]) -> int | None:
        if not self.config.run.codebook_restart_steps:
            return None
        for result in results:
            assert result.codes is not None
            self.codebook.count(result.codes)
        copies = [] if self.averaged is None else [self.averaged.vqgan.quantize.embedding.weight]
        return self.codebook.restart(step, torch.cat([result.grid for result in results]), self.optimizer, copies)

    def _teach_discriminator(self, step: int, parts: Sequence[TrainingBatch], results: Sequence[StepResult]) -> None:
        if self.judge is None or step < self.config.loss.adversarial_start:
            return
        self.judge.zero_grad()
        for part, result in zip(parts, results, strict=True):
            images = part.images.to(self.ranks.device).float() / 255
            with self._autocast():
                loss = self.loss.discriminator_loss(images, result.reconstruction)
            (loss / len(parts)).backward()
        parameters = [parameter for _, parameter in self.judged]
        average_gradients(parameters)
        if math.isfinite(float(torch.nn.utils.clip_grad_norm_(parameters, math.inf))):
            self.judge.step()

    def _forced_lengths(self, step: int) -> list[int] | None:
        """Return this process's random lengths, or None where EOS decides: the same on any number of processes."""
        run = self.config.run
        if run.stage != "dove" or np.random.default_rng((run.seed, FORCED, step)).random() >= run.forced_length_share:
            return None
        random = np.random.default_rng((run.seed, LENGTHS, step))
        lengths = random.integers(1, self.model.config.num_tokens + 1, run.batch_size)
        share = run.batch_size // self.ranks.world
        return [int(length) for length in lengths[self.ranks.rank * share : (self.ranks.rank + 1) * share]]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.config.run.precision]
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32)

    def _accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Leave the gradients to be averaged until the last part."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        waiting: AbstractContextManager[Any] = self.objective.no_sync()
        return waiting

    # What is written

    def _account(self, batch: TrainingBatch, done: _Step) -> None:
        state = self.state
        state.left_out = dict(Counter(state.left_out) + batch.left_out)
        if done.finite:
            return
        state.skipped += 1
        logger.warning(
            "step %d skipped: error %s, norm of the gradient %s", state.step, f"{done.mse:g}", f"{done.grad_norm:g}"
        )
        if state.skipped > self.config.run.nonfinite_limit:
            raise TrainingError(
                f"{state.skipped} steps were not finite, the limit is {self.config.run.nonfinite_limit}; the last "
                f"checkpoint is intact. Lower [optimizer] learning_rate or max_grad_norm, or train in float32"
            )

    def _figures(self, done: _Step) -> dict[str, Any]:
        """Return a line of the log; every rank has a share in it."""
        terms = [result.terms for result in done.results]
        names = ("total", "perceptual", "adversarial", "irrelevant", "codebook", "commitment", "eos")
        values: dict[str, Any] = {
            name: mean_over_ranks(torch.stack([getattr(term, name).detach().float() for term in terms]))
            for name in names
        }
        values["mse"] = done.mse
        values["eos_weight"] = terms[0].eos_weight
        values["threshold"] = self.loss.threshold.value
        if self.config.run.stage == "dove":
            values["length_mean"] = mean_over_ranks(torch.cat([result.lengths for result in done.results]).float())
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["grad_norm"] = done.grad_norm
        values["skipped"] = self.state.skipped
        values["left_out"] = sum(self.state.left_out.values())
        if done.codewords is not None:
            values["codewords_used"] = done.codewords
        return values

    def _report(self, log: RunLog) -> None:
        """Validate and draw, where this step is one for it."""
        report, step = self.config.report, self.state.step
        due = [every and step % every == 0 for every in (report.validation_steps, report.picture_steps)]
        if self.validation is None or not any(due):
            return
        model = self.averaged or self.model
        count = max(1, report.validation_images // self.validation.batch_size)
        held_out = self.validation.ahead(range(count), self.config.data.workers)
        found = validate(model, held_out, stage=self.config.run.stage, show=report.pictures)
        if due[0]:
            log.write("validation", step, self._validation_figures(found))
        if due[1]:
            log.picture("reconstructions", step, picture_grid([found.images, found.reconstructions]))
            if found.lengths is not None:
                log.picture("lengths", step, histogram_picture(found.lengths, model.config.num_tokens))

    def _validation_figures(self, found: Validation) -> dict[str, Any]:
        values: dict[str, Any] = {"mse": float(found.mse.mean()), "psnr": found.psnr}
        if found.lengths is not None:
            values |= spread(found.lengths)
            ramp_over = self.state.step >= self.config.loss.eos_weight_steps
            warning = length_warning(found.lengths, self.model.config.num_tokens, ramp_over=ramp_over)
            if warning:
                logger.warning("step %d: %s", self.state.step, warning)
                values["warning"] = warning
        return values

    def _save(self) -> None:
        if not self.ranks.is_first:
            return
        self.state.threshold = self.loss.threshold.state_dict()
        tensors = {
            **optimizer_tensors(self.optimizer, self.trained, "optimizer"),
            "codebook_counts": self.codebook.counts,
        }
        if self.judge is not None:
            tensors |= optimizer_tensors(self.judge, self.judged, "judge")
            tensors |= {f"discriminator.{name}": parameter for name, parameter in self.judged}
        keep = self.config.report.keep_checkpoints
        write_checkpoint(self.output, self.model, self.averaged, tensors, self.state, keep=keep)

    def _export(self) -> Path:
        """Write the model that the run was for: the averaged weights where there are any."""
        target = self.output / "model"
        if self.ranks.is_first:
            (self.averaged or self.model).save_pretrained(target)
        return target
