"""One optimiser step: gradients of a batch in parts, the update, and what follows it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dove_fast.losses import QDOVELoss
from dove_fast.models.dove import DOVE
from dove_fast.training.batches import TrainingBatch
from dove_fast.training.config import TrainConfig
from dove_fast.training.distributed import Ranks, average_gradients, mean_over_ranks
from dove_fast.training.objective import Objective, StepResult, freeze
from dove_fast.training.optimization import CodebookUse, average_into, make_optimizer

__all__ = ["StepOutcome", "Stepper"]

# What the random numbers of a seed and a step are for; `Batches` has 0 and 1.
FORCED, LENGTHS = 2, 3
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class StepOutcome:
    """What a step came to: a result for each part of this process's share of the batch.

    error: the mean of `LossTerms.errors`, of pixels but for a step that makes none. mse: the same of pixels, NaN for
    such a step. grad_norm: the gradient's. All are over all processes, on the host. finite: whether error and grad_norm
    were; a step that was not changed nothing.
    codewords: how many were in use, where this step restarted the others. judge: (n,) the discriminator's losses, None
    where it did not learn. forced: whether the lengths were random.
    """

    results: Sequence[StepResult]
    error: float
    mse: float
    grad_norm: float
    finite: bool
    codewords: int | None
    judge: Tensor | None
    forced: bool


class Stepper:
    """The model, its averaged copy, the loss, and their optimisers.

    trained, judged: the names and parameters that the two optimisers `optimizer` and `judge` (the discriminator's, None
    without one) step.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        model: DOVE,
        averaged: DOVE | None,
        loss: QDOVELoss,
        discriminator: nn.Module | None,
    ) -> None:
        self.config, self.ranks = config, ranks
        run = config.run
        if run.longest_forced_length > model.config.num_tokens:
            raise ValueError(
                f"[run] longest_forced_length is {run.longest_forced_length}, the model has "
                f"{model.config.num_tokens} tokens"
            )
        self.model = model.to(ranks.device).train()
        self.averaged = None if averaged is None else averaged.to(ranks.device).eval().requires_grad_(False)
        texts = run.stage == "dove" and model.tokenizer is not None
        self.trained = freeze(model, run.stage, run.frozen, codebook=config.loss.codebook_weight > 0, texts=texts)
        self.optimizer = make_optimizer(self.trained, config.optimizer, config.optimizer.learning_rate)
        self.loss = loss
        loss.move_to(ranks.device)
        self.judged = [] if discriminator is None else list(discriminator.named_parameters())
        self.judge = (
            make_optimizer(self.judged, config.optimizer, config.discriminator.learning_rate) if self.judged else None
        )
        self.codebook = CodebookUse(model.vqgan.quantize.embedding.weight, run.codebook_restart_steps)
        self._objective: Any = Objective(model, loss, stage=run.stage, recompute=run.recompute)
        if ranks.world > 1:
            # A batch may have no text, and then no gradient for their embedding.
            self._objective = DistributedDataParallel(
                self._objective, find_unused_parameters=texts, gradient_as_bucket_view=True
            )

    def step(self, step: int, batch: TrainingBatch) -> StepOutcome:
        """Do optimiser step `step`, counted from 0, on this process's share of a batch."""
        run, config = self.config.run, self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, run.steps)
        self.optimizer.zero_grad()
        lengths = self._forced_lengths(step)
        parts = list(batch.parts(run.accumulation))
        results = []
        for index, part in enumerate(parts):
            size = len(part.images)
            forced = None if lengths is None else lengths[index * size : (index + 1) * size]
            with self._accumulating(last=index == len(parts) - 1):
                results.append(self._backward(step, part, forced, share=1 / len(parts)))
        parameters = [parameter for _, parameter in self.trained]
        norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
        error = mean_over_ranks(torch.cat([result.terms.errors for result in results]))
        mse = math.nan if results[0].reconstruction is None else error
        # Both are the same on all ranks.
        if not (math.isfinite(norm) and math.isfinite(error)):
            self.optimizer.zero_grad()
            return StepOutcome(results, error, mse, norm, False, None, None, lengths is not None)
        self.optimizer.step()
        if lengths is None:
            # [reading] Lengths that were forced say nothing about the error at those that EOS chooses.
            self.loss.threshold.update(error)
        if self.averaged is not None:
            average_into(self.averaged, self.model, run.ema_decay, step)
        codewords = self._tend_codebook(step, results)
        judge = self._teach_discriminator(step, parts, results)
        return StepOutcome(results, error, mse, norm, True, codewords, judge, lengths is not None)

    def _backward(self, step: int, part: TrainingBatch, forced: list[int] | None, share: float) -> StepResult:
        device = self.ranks.device
        with self._autocast():
            result: StepResult = self._objective(
                part.images.to(device, non_blocking=True),
                part.queries,
                None if part.mask is None else part.mask.to(device, non_blocking=True),
                step=step,
                lengths=forced,
            )
        (result.terms.total * share).backward()
        return result

    def _tend_codebook(self, step: int, results: Sequence[StepResult]) -> int | None:
        if not self.config.run.codebook_restart_steps:
            return None
        for result in results:
            assert result.codes is not None
            self.codebook.count(result.codes)
        copies = [] if self.averaged is None else [self.averaged.vqgan.quantize.embedding.weight]
        return self.codebook.restart(step, torch.cat([result.grid for result in results]), self.optimizer, copies)

    def _teach_discriminator(
        self, step: int, parts: Sequence[TrainingBatch], results: Sequence[StepResult]
    ) -> Tensor | None:
        if self.judge is None or step < self.config.loss.adversarial_start:
            return None
        losses = []
        self.judge.zero_grad()
        for part, result in zip(parts, results, strict=True):
            assert result.reconstruction is not None
            images = part.images.to(self.ranks.device).float() / 255
            with self._autocast():
                loss = self.loss.discriminator_loss(images, result.reconstruction)
            (loss / len(parts)).backward()
            losses.append(loss.detach().float())
        parameters = [parameter for _, parameter in self.judged]
        average_gradients(parameters)
        if math.isfinite(float(nn.utils.clip_grad_norm_(parameters, math.inf))):
            self.judge.step()
        return torch.stack(losses)

    def _forced_lengths(self, step: int) -> list[int] | None:
        """Return this process's random lengths, or None where EOS decides: the same on any number of processes."""
        run = self.config.run
        if run.stage != "dove" or np.random.default_rng((run.seed, FORCED, step)).random() >= run.forced_length_share:
            return None
        random = np.random.default_rng((run.seed, LENGTHS, step))
        longest = run.longest_forced_length or self.model.config.num_tokens
        lengths = random.integers(1, longest + 1, run.batch_size)
        share = run.batch_size // self.ranks.world
        return [int(length) for length in lengths[self.ranks.rank * share : (self.ranks.rank + 1) * share]]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.config.run.precision]
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32)

    def _accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Leave the gradients to be averaged until the last part."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        waiting: AbstractContextManager[Any] = self._objective.no_sync()
        return waiting
