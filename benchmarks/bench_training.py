"""A training step against the same step through the plain forward: the generator alone, and the whole step.

    pytest benchmarks/bench_training.py --benchmark-only --benchmark-json=figures.json

Ours is `training_forward`, which computes blocks of steps until every image has its EOS; the rival is the oracle with
its graph, all N + T positions of every image, zeroed behind its tokens. One set of weights, fp32, the VQGAN frozen, so
that its encoder has no graph on either side. A step is the forward, the squared error and the EOS loss, the backward,
and fused AdamW; LPIPS and a discriminator would be the same on both sides and bring the whole step's ratio nearer to 1.

Lengths are spread around a mean. EOS is computed, decided and read for every block, and then replaced by a length that
was chosen, so that both sides know which tokens are asked for. Losses and gradients are compared before anything is
timed, without the codebook, where rounding alone can choose another codeword.

`positions_computed` of `positions_of_all` are the generator's. The peaks are of one step, beyond weights
and the optimiser's state; gradients and the engine's caches count, as every step drops them at its end. `peak_ratio`
(above 1: ours takes less) is of what torch allocates: on a GPU its own count, on a CPU summed from its profiler, which
does not see what a library takes from malloc by itself. `peak_bytes` on a CPU is the process's resident memory, which
has that, and the allocator's fragments: it differs by a tenth from run to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from forced_lengths import spread
from tolerances import RELATIVE, assert_close, relative_error
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dove_fast import DOVE, DOVEConfig
from dove_fast.config import VQGANConfig
from dove_fast.losses import DOVELoss, LossConfig
from dove_fast.training import TrainingForward, training_forward
from dove_fast.training.blocks import ends_at, ends_by_eos
from dove_fast.training.config import OptimizerConfig
from dove_fast.training.optimization import make_optimizer

# Of the base model's tokens; another model's means are as large a share of its own.
MEANS, BASE_TOKENS = (32, 96, 160, 256), 256
# Images in a batch where --batch says nothing.
GENERATOR_BATCH = {"cpu": 8, "cuda": 32}
STEP_BATCH = {"base": {"cpu": 2, "cuda": 16}, "tiny": {"cpu": 32, "cuda": 256}}
MODELS = {"base": DOVEConfig.base, "tiny": DOVEConfig.tiny}

Forward = Callable[[], Tensor]


@dataclass
class Training:
    """A model and its batch: images (B, 3, S, S), features (B, N, C), and the lengths that are forced."""

    model: DOVE
    trained: list[tuple[str, nn.Parameter]]
    images: Tensor
    features: Tensor
    lengths: list[int]

    def __post_init__(self) -> None:
        device = self.images.device
        self.counts = torch.tensor(self.lengths, device=device)
        self.kept = torch.arange(self.model.config.num_tokens, device=device) < self.counts[:, None]
        self.no_queries = [torch.empty(0, dtype=torch.int64)] * len(self.lengths)

    def ours(self, *, keep_features: bool = False, recompute: bool = False) -> TrainingForward:
        """Return the training forward; `keep_features`: the features are known."""
        features = self.features if keep_features else None
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("dove_fast.training.forward.ends_by_eos", self._forced_ends)
            return training_forward(self.model, self.images, features=features, recompute=recompute)

    def _forced_ends(self, *arguments: Any) -> Callable[..., Any]:
        by_eos, given = ends_by_eos(*arguments), ends_at(self.lengths)

        def ends(*block: Any) -> Any:
            by_eos(*block)
            return given(*block)

        return ends

    def plain(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return all states (B, T, d) and EOS logits (B, T), with their graph."""
        return self.model.generate(features, self.no_queries)

    def gradients(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """Return a forward's loss and its gradients, one behind the other."""
        loss = forward()
        loss.backward()
        found = [parameter.grad.flatten() for _, parameter in self.trained if parameter.grad is not None]
        self.end()
        return loss.detach(), torch.cat(found)

    def end(self) -> None:
        """Drop what a step leaves: gradients, and what the engine keeps, which new weights outdate."""
        self.model.zero_grad()
        self.model.generation.refresh()


def without_tf32() -> AbstractContextManager[Any]:
    """Let a GPU convolve in fp32: in TF32 a difference in the last digit can become one of 5e-4."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def make_training(config: DOVEConfig, mean: int, batch: int, device: torch.device) -> Training:
    """Return a model with random weights and a frozen VQGAN, and a batch."""
    torch.manual_seed(3)
    model = DOVE(config).to(device).train()
    model.vqgan.requires_grad_(False)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # As spread as features are, so that many codes are used.
    nn.init.normal_(model.vqgan.quantize.embedding.weight, std=0.5)
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
    lengths = spread("gamma", mean * config.num_tokens // BASE_TOKENS, config.num_tokens, batch)
    with without_tf32():
        features = model.encode(images)
    return Training(model, trained, images, features, lengths)


def allocated_peak(step: Callable[[], None]) -> int:
    """Return the most bytes of torch's CPU allocator that a step holds at a time, beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


@pytest.fixture
def measure(compare, benchmark, device):
    """Return a function that times a step of both sides, and records sizes and peaks."""

    def run(training: Training, ours: Forward, plain: Forward, update: Callable[[], Any] | None, **info: Any) -> None:
        def step(forward: Forward) -> None:
            forward().backward()
            if update is not None:
                update()
            training.end()

        with torch.no_grad():
            counted = training.ours(keep_features=True)
        batch = len(training.lengths)
        compare(
            lambda: step(ours),
            lambda: step(plain),
            images=batch,
            batch_size=batch,
            mean_length=sum(training.lengths) / batch,
            lengths=training.lengths,
            positions_computed=counted.positions_computed,
            positions_of_all=counted.positions_of_all,
            **info,
        )
        if device.type == "cpu":
            peak, rival_peak = (allocated_peak(lambda side=side: step(side)) for side in (ours, plain))
        else:
            peak, rival_peak = (benchmark.extra_info[name] for name in ("peak_bytes", "rival_peak_bytes"))
        benchmark.extra_info |= {
            "allocated_bytes": peak,
            "rival_allocated_bytes": rival_peak,
            "peak_ratio": rival_peak / peak,
        }

    return run


def _means(models: tuple[str, ...]) -> list[Any]:
    # One small case is left for --quick.
    return [
        pytest.param(model, mean, marks=[] if (model, mean) == (models[-1], 96) else pytest.mark.large)
        for model in models
        for mean in MEANS
    ]


@pytest.mark.parametrize(("model", "mean"), _means(("base",)))
def bench_generator(measure, request, device, model, mean) -> None:
    """The input projection, the generator and the EOS head alone, forward and backward."""
    # The grid is the base model's; nothing behind the tokens is run.
    small = VQGANConfig(block_out_channels=(32,) * 5, layers_per_block=1)
    batch = request.config.getoption("--batch") or GENERATOR_BATCH[device.type]
    training = make_training(dataclasses.replace(MODELS[model](), vqgan=small), mean, batch, device)
    ours = training.model
    ours.generation.decode = ours.grid = ours.render = lambda *_, **__: None
    # Places (image, step), so that no device is waited for.
    kept = training.kept.nonzero(as_tuple=True)
    toward = torch.randn(sum(training.lengths), ours.config.generator.hidden_size, device=device)

    def loss(tokens: Tensor, logits: Tensor) -> Tensor:
        return (tokens * toward).sum() + logits[kept].square().sum()

    def ragged() -> Tensor:
        found = training.ours(keep_features=True)
        return loss(found.tokens.values, found.eos_logits)

    def plain() -> Tensor:
        states, logits = training.plain(training.features)
        return loss(states[kept], logits)

    for found, expected in zip(training.gradients(ragged), training.gradients(plain), strict=True):
        assert_close(found, expected)
    measure(
        training,
        ragged,
        plain,
        None,
        rival_name="all positions",
        model=model,
        asked_mean=mean,
    )


@dataclass
class Step:
    """The whole step's two forwards, each to the loss."""

    training: Training
    loss: DOVELoss

    def ours(self, *, dtype: torch.dtype = torch.float32, **options: bool) -> Tensor:
        """Ours; options as in `Training.ours`."""
        with self._autocast(dtype):
            found = self.training.ours(**options)
            return self._loss(found.reconstruction, found.eos_logits)

    def plain(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rival's."""
        training = self.training
        with self._autocast(dtype):
            states, logits = training.plain(training.model.encode(training.images))
            padded = torch.where(training.kept[..., None], states, 0.0)
            return self._loss(training.model.decode_padded(padded, training.counts), logits)

    def check(self, dtype: torch.dtype, **options: bool) -> None:
        """Compare losses and gradients with the rival's in fp32; in bf16 its own error there is the measure."""
        model, training = self.training.model, self.training
        config = model.config
        model.config = dataclasses.replace(config, quantize="none")
        with without_tf32():
            expected = training.gradients(self.plain)
            found = training.gradients(lambda: self.ours(dtype=dtype, **options))
            rounded = expected if dtype == torch.float32 else training.gradients(lambda: self.plain(dtype=dtype))
        model.config = config
        for ours, theirs, exact in zip(found, rounded, expected, strict=True):
            allowed = max(1.5 * relative_error(theirs, exact), RELATIVE[dtype])
            assert_close(ours, exact, allowed)

    def _loss(self, reconstruction: Tensor, logits: Tensor) -> Tensor:
        training = self.training
        return self.loss(training.images, reconstruction.float(), logits, training.counts, step=0).total

    def _autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.training.images.device.type, dtype, enabled=dtype != torch.float32)


def run_step(measure, request, device, name: str, mean: int, *, dtype=torch.float32, variant=None, **options) -> None:
    """Compare, then time the whole step; the variant's options are ours alone."""
    batch = request.config.getoption("--batch") or STEP_BATCH[name][device.type]
    training = make_training(MODELS[name](), mean, batch, device)
    # The EOS loss with a weight that shows in the gradient.
    config = LossConfig(perceptual_weight=0.0, adversarial_weight=0.0, eos_weight_start=1.0, eos_weight_end=1.0)
    step = Step(training, DOVELoss(config))
    with torch.no_grad():
        # Near the error, as in a run.
        step.loss.threshold.update(1.001 * step.plain())
    settings = OptimizerConfig()
    optimizer = make_optimizer(training.trained, settings, settings.learning_rate)
    step.check(dtype, **options)
    measure(
        training,
        lambda: step.ours(dtype=dtype, **options),
        step.plain,
        optimizer.step,
        rival_name="all positions",
        model=name,
        asked_mean=mean,
        variant=variant,
    )


@pytest.mark.parametrize(("model", "mean"), _means(("base", "tiny")))
def bench_step(measure, request, device, model, mean) -> None:
    """The whole step."""
    run_step(measure, request, device, model, mean)


@pytest.mark.parametrize("variant", ["recompute", "kept features", "bf16"])
@pytest.mark.parametrize("model", [pytest.param("base", marks=pytest.mark.large), "tiny"])
def bench_variant(measure, request, device, model, variant) -> None:
    """Variants of our step, each against the rival's step in fp32: activations computed again, features kept, bf16."""
    if variant == "bf16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no instructions for bf16: it would be emulated")
    options = {
        "recompute": {"recompute": True},
        "kept features": {"keep_features": True},
        "bf16": {"dtype": torch.bfloat16},
    }
    run_step(measure, request, device, model, 96, variant=variant, **options[variant])
