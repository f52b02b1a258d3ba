"""The whole tokenizer against diffusers + transformers, stage by stage, at the published sizes with random weights.

    pytest benchmarks/bench_pipeline.py --benchmark-only --benchmark-json=figures.json

The rival is what the original does and what a user would write: `VQModel` and `GPTNeoXModel` (sdpa, eager), one
parallel pass over all 512 positions, cut at EOS. Results are compared before anything is timed. EOS comes at one step
in a hundred, so lengths are spread over all of 1 to 256. The project's promise is in bench_promise.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import VQModel
from tolerances import EOS_LOGIT_MARGIN, assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXModel
from upstream import AMUSED_VQ, PYTHIA_70M, make_bidirectional, make_neox, make_vq, plain_convolutions

from dove_fast import DOVE, DOVEConfig, RaggedTokens
from dove_fast.generation.batch import LengthRule
from dove_fast.generation.engine import generate

RIVAL = "diffusers + transformers"


@dataclass
class Sides:
    """The same weights on both sides, and what each stage reads."""

    ours: DOVE
    vq: VQModel
    generator: GPTNeoXModel
    token_decoder: GPTNeoXModel
    images: Tensor
    features: Tensor
    inputs: Tensor
    tokens: RaggedTokens
    padded: Tensor
    grid: Tensor

    def rival_states(self, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return every step's state and EOS logit, all computed in one pass, from the images where no features come."""
        if features is None:
            features = self.vq.encode(self.images).latents.flatten(2).transpose(1, 2)
        inputs = torch.cat([self.ours.in_proj(features), self.inputs[:, features.shape[1] :]], dim=1)
        states = self.generator(inputs_embeds=inputs).last_hidden_state[:, features.shape[1] :]
        return states, self.ours.eos_head(states).squeeze(-1)

    def rival_tokenize(self, features: Tensor | None = None) -> list[Tensor]:
        """Tokenize as a user of the two libraries would: everything in one pass, then cut."""
        states, logits = self.rival_states(features)
        stops = logits.sigmoid() > self.ours.config.eos_threshold
        lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, stops.shape[1]).tolist()
        return [row[:length] for row, length in zip(states, lengths, strict=True)]

    def tokens_of(self, features: Tensor) -> RaggedTokens:
        """Return the engine's tokens for image features."""
        ours = self.ours
        prefixes = ours.prefixes(features, [torch.empty(0, dtype=torch.int64)] * len(features))
        rule = LengthRule(ours.config.num_tokens, ours.config.eos_threshold)
        return generate(ours.generation, ours.generator, ours.eos_head, prefixes, rule, None)[0]

    def check(self, tokens: RaggedTokens, theirs: list[Tensor]) -> int:
        """Compare tokens with the rival's, and return how many rows' lengths rounding may decide."""
        # The preset's threshold is 0.5, the logit 0. Where rounding may decide a length, the common tokens count.
        clear = (self.rival_states()[1].abs().amin(dim=1) > EOS_LOGIT_MARGIN).tolist()
        for row, expected in enumerate(theirs):
            common = min(len(tokens[row]), len(expected))
            assert_close(tokens[row][:common], expected[:common])
            assert len(tokens[row]) == len(expected) or not clear[row]
        return clear.count(False)


@pytest.fixture(scope="module")
def sides(device: torch.device, batch: int) -> Sides:
    """Return both sides with one set of weights: ours are theirs, by the names' prefixes."""
    with torch.no_grad():
        vq = make_vq(0, **AMUSED_VQ).to(device)
        generator = make_neox(1, **PYTHIA_70M).to(device)
        decoder = make_bidirectional(make_neox(2, **PYTHIA_70M)).to(device)
        torch.manual_seed(3)
        ours = DOVE(DOVEConfig.base()).to(device).eval()
        ours.vqgan.load_state_dict(vq.state_dict())
        ours.generator.load_state_dict(generator.state_dict())
        decoder_weights = decoder.state_dict()
        del decoder_weights["embed_in.weight"]
        ours.token_decoder.load_state_dict(decoder_weights)

        contrast = torch.rand(batch, 1, 1, 1, device=device)
        images = 0.5 + contrast * (torch.rand(batch, 3, 256, 256, device=device) - 0.5)
        features = ours.encode(images)
        captured: list[Tensor] = []
        hook = ours.generator.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
        _, logits = ours.generate(features, [torch.empty(0, dtype=torch.int64)] * batch)
        hook.remove()
        # EOS at one step in a hundred: lengths are spread as a trained model's are.
        ours.eos_head.bias.sub_(logits.quantile(0.99))
        ours.measure_cost()
        tokens = ours.tokenize(images)
        padded, _ = tokens.to_padded(ours.config.num_tokens)
        side = math.isqrt(ours.config.num_features)
        grid = ours.out_proj(ours.token_decoder(padded)).transpose(1, 2).unflatten(2, (side, side))
    return Sides(ours, vq, generator, decoder, images, features, captured[0], tokens, padded, grid)


def flop_of(function: Callable[[], Tensor]) -> float:
    """Return the floating-point operations of a call's products and convolutions, two a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


@torch.no_grad()
def bench_encoder(sides: Sides, compare) -> None:
    """The VQGAN's encoder, 216 GFLOP an image."""

    def rival() -> Tensor:
        return sides.vq.encode(sides.images).latents

    with plain_convolutions():
        assert_close(sides.ours.vqgan.encode(sides.images), rival())
    compare(
        lambda: sides.ours.vqgan.encode(sides.images),
        rival,
        rival_name=RIVAL,
        images=len(sides.images),
        flop=flop_of(lambda: sides.ours.vqgan.encode(sides.images[:1])) * len(sides.images),
        stage="encoder",
    )


@torch.no_grad()
def bench_generator(sides: Sides, compare) -> None:
    """From features to tokens: the engine against all N + T positions."""
    tokens, theirs = sides.tokens_of(sides.features), sides.rival_tokenize(sides.features)
    unclear = sides.check(tokens, theirs)
    compare(
        lambda: sides.tokens_of(sides.features),
        lambda: sides.rival_tokenize(sides.features),
        rival_name=RIVAL,
        images=len(sides.images),
        stage="generator",
        lengths=list(tokens.host_lengths),
        rows_near_the_threshold=unclear,
    )


@torch.no_grad()
def bench_token_decoder(sides: Sides, compare) -> None:
    """The token decoder over T positions."""

    def rival() -> Tensor:
        return sides.token_decoder(inputs_embeds=sides.padded).last_hidden_state

    def ours() -> Tensor:
        attends = sides.ours.config.decoder_attends_padding
        return sides.ours.generation.decode(sides.ours.token_decoder, sides.tokens, attends_padding=attends)

    assert_close(ours(), rival())
    compare(
        ours,
        rival,
        rival_name=RIVAL,
        images=len(sides.images),
        stage="token decoder",
    )


@torch.no_grad()
def bench_quantizer(sides: Sides, compare) -> None:
    """The codebook search over N features an image; ours is `vq_lookup`."""
    _, codes = sides.ours.vqgan.quantize(sides.grid)
    their_codes = sides.vq.quantize(sides.grid)[2][2]
    rows = sides.grid.permute(0, 2, 3, 1).flatten(0, 2).double()
    codebook = sides.vq.quantize.embedding.weight.double()
    ours_distance = (rows - codebook[codes.flatten()]).square().sum(1)
    their_distance = (rows - codebook[their_codes.flatten()]).square().sum(1)
    # Ours are fp32 scores too: the distances' own rounding.
    assert (ours_distance <= their_distance * (1 + 1e-5)).all()
    compare(
        lambda: sides.ours.vqgan.quantize(sides.grid),
        lambda: sides.vq.quantize(sides.grid),
        rival_name=RIVAL,
        images=len(sides.images),
        stage="quantizer",
        codes_that_differ=int((codes.flatten() != their_codes.flatten()).sum()),
    )


@torch.no_grad()
def bench_decoder(sides: Sides, compare) -> None:
    """The VQGAN's decoder, 477 GFLOP an image; tests/parity/test_vqgan.py says why the codewords are drawn."""
    codebook = sides.vq.quantize.embedding.weight
    drawn = torch.randint(len(codebook), (len(sides.grid), *sides.grid.shape[2:]), device=codebook.device)
    quantized = codebook[drawn].permute(0, 3, 1, 2).contiguous()

    def rival() -> Tensor:
        return sides.vq.decoder(sides.vq.post_quant_conv(quantized))

    with plain_convolutions():
        assert_close(sides.ours.vqgan.decode(quantized), rival())
    compare(
        lambda: sides.ours.vqgan.decode(quantized),
        rival,
        rival_name=RIVAL,
        images=len(sides.images),
        flop=flop_of(lambda: sides.ours.vqgan.decode(quantized[:1])) * len(sides.images),
        stage="decoder",
    )


@torch.no_grad()
def bench_tokenize(sides: Sides, compare) -> None:
    """Images to tokens, whole."""
    with plain_convolutions():
        tokens = sides.ours.tokenize(sides.images)
        unclear = sides.check(tokens, sides.rival_tokenize())
    compare(
        lambda: sides.ours.tokenize(sides.images),
        sides.rival_tokenize,
        rival_name=RIVAL,
        images=len(sides.images),
        stage="tokenize",
        lengths=list(tokens.host_lengths),
        rows_near_the_threshold=unclear,
    )


@torch.no_grad()
def bench_deterministic(sides: Sides, compare) -> None:
    """What the same bits in any batch cost: `tokenize(deterministic=True)` against `tokenize`."""
    with plain_convolutions():
        tokens = sides.ours.tokenize(sides.images, deterministic=True)
        unclear = sides.check(tokens, list(sides.ours.tokenize(sides.images)))
    compare(
        lambda: sides.ours.tokenize(sides.images, deterministic=True),
        lambda: sides.ours.tokenize(sides.images),
        rival_name="not deterministic",
        images=len(sides.images),
        lengths=list(tokens.host_lengths),
        rows_near_the_threshold=unclear,
    )
