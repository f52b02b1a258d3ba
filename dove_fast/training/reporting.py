"""What a run tells while it runs: lines of figures, validation on held-out pictures, and what is drawn of them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dove_fast.models.dove import DOVE
from dove_fast.training.batches import Batches
from dove_fast.training.checkpoint import RunState
from dove_fast.training.config import TrainConfig
from dove_fast.training.distributed import Ranks, mean_over_ranks, sum_over_ranks
from dove_fast.training.log import RunLog, histogram_picture, picture_grid
from dove_fast.training.step import StepOutcome, Stepper
from dove_fast.training.validation import Validation, length_warning, spread, validate

__all__ = ["Reporter"]

logger = logging.getLogger(__name__)

# The losses that a line names, as `LossTerms` does; the error stands beside them.
TERMS = ("total", "perceptual", "adversarial", "irrelevant", "codebook", "commitment", "features", "eos")


class Reporter:
    """Reports every so many steps, as `[report]` says. The first process alone writes, and validates.

    validation: the held-out pictures, None for none.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, validation: Batches | None) -> None:
        self.config, self.ranks, self.validation = config, ranks, validation
        self._log: RunLog | None = None
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def open(self, output: Path, step: int) -> Iterator[None]:
        """Write into the log of `output`, which goes on at `step`, while the block runs."""
        if self.ranks.is_first:
            self._log = RunLog(output, step, tensorboard=self.config.report.tensorboard)
            if self.validation is None:
                logger.info("no [validation]: nothing is drawn, and lengths are not watched")
        self._last = time.perf_counter()
        try:
            yield
        finally:
            if self._log is not None:
                self._log.close()

    def sync(self) -> None:
        """Make the log durable, before a checkpoint that it belongs to."""
        if self._log is not None:
            self._log.sync()

    def after_step(self, stepper: Stepper, state: RunState, outcome: StepOutcome) -> None:
        """Write what is due after `state.step` steps; every process calls it."""
        report, step = self.config.report, state.step
        if _due(report.log_steps, step):
            # Every process has a share in the means.
            values = self._figures(stepper, state, outcome)
            if self._log is not None:
                self._log.write("train", step, values)
        if self._log is None or self.validation is None:
            return
        model = stepper.averaged or stepper.model
        if _due(report.validation_steps, step) or _due(report.picture_steps, step):
            self._validate(self._log, self.validation, model, step)

    def _figures(self, stepper: Stepper, state: RunState, outcome: StepOutcome) -> dict[str, Any]:
        terms = [result.terms for result in outcome.results]
        values: dict[str, Any] = {
            name: mean_over_ranks(torch.stack([getattr(term, name).detach().float() for term in terms]))
            for name in TERMS
        }
        values["mse"] = outcome.mse
        values["eos_weight"] = terms[0].eos_weight
        values["threshold"] = stepper.loss.threshold.value
        if self.config.run.stage == "dove":
            values["length_mean"] = mean_over_ranks(torch.cat([result.lengths for result in outcome.results]).float())
            positions = torch.tensor([result.positions for result in outcome.results], device=self.ranks.device)
            computed, of_all = (mean_over_ranks(positions[:, side]) for side in (0, 1))
            values["positions_share"] = computed / of_all
        values["learning_rate"] = stepper.optimizer.param_groups[0]["lr"]
        values["grad_norm"] = outcome.grad_norm
        values["forced_lengths"] = outcome.forced
        if outcome.judge is not None:
            values["discriminator"] = mean_over_ranks(outcome.judge)
        values["skipped"] = state.skipped
        values["left_out"] = sum_over_ranks(Counter(state.left_out)).total()
        if outcome.codewords is not None:
            values["codewords_used"] = outcome.codewords
        now = time.perf_counter()
        values["images_per_second"] = self.config.report.log_steps * self.config.run.batch_size / (now - self._last)
        self._last = now
        return values

    def _validate(self, log: RunLog, validation: Batches, model: DOVE, step: int) -> None:
        report = self.config.report
        count = max(1, report.validation_images // validation.batch_size)
        assert self.config.validation is not None
        held_out = validation.ahead(range(count), self.config.validation.workers)
        found = validate(model, held_out, stage=self.config.run.stage, show=report.pictures)
        if _due(report.validation_steps, step):
            log.write("validation", step, self._validation_figures(found, model, step))
        if _due(report.picture_steps, step):
            log.picture("reconstructions", step, picture_grid([found.images, found.reconstructions]))
            if found.lengths is not None:
                log.picture("lengths", step, histogram_picture(found.lengths, model.config.num_tokens))

    def _validation_figures(self, found: Validation, model: DOVE, step: int) -> dict[str, Any]:
        values: dict[str, Any] = {"mse": float(found.mse.mean()), "psnr": found.psnr}
        if found.lengths is not None:
            values |= spread(found.lengths)
            ramp_over = step >= self.config.loss.eos_weight_steps
            warning = length_warning(found.lengths, model.config.num_tokens, ramp_over=ramp_over)
            if warning:
                logger.warning("step %d: %s", step, warning)
                values["warning"] = warning
        return values


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
