"""DOVE: a VQGAN, a causal token generator that stops at EOS, and a bidirectional token decoder.

The plain forward is the oracle: every position in one pass, as docs/METHOD.md describes it. `tokenize` computes the
same tokens in blocks, and `decode` the same images without the padding's first layer (`dove_fast.generation`).
Shape suffixes: B images, S pixels a side, N features, C feature channels, d width, T the most tokens an image can have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dove_fast.config import DOVEConfig
from dove_fast.generation.batch import LengthRule, WorkCounters
from dove_fast.generation.engine import Generation
from dove_fast.generation.measure import measure_cost
from dove_fast.generation.schedule import CostModel
from dove_fast.generation.tokenize import tokenize_in_blocks, tokenize_in_one_pass
from dove_fast.models import checkpoint
from dove_fast.models.gpt_neox import GPTNeoX, step_embeddings
from dove_fast.models.inputs import (
    Query,
    check_device,
    check_images,
    check_length_options,
    check_queries,
    nonfinite_rows,
    raise_if_nonfinite,
    raise_if_nonfinite_tokens,
)
from dove_fast.models.shipped import is_shipped, shipped_directory
from dove_fast.models.vqgan import VQGAN
from dove_fast.ragged import RaggedTokens
from dove_fast.text import TOKENIZER_NAME, TextTokenizer

__all__ = ["DOVE", "TokenizeStats"]

ENGINES = ("blocks", "oracle")

# What the activations of one chunk of images may take; a batch is worked through in chunks of at least one image.
CHUNK_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
# A convolution's input, its output, a norm and a residual are alive together at the full resolution.
LIVE_ACTIVATIONS = 4


@dataclass(frozen=True)
class TokenizeStats:
    """What `DOVE.tokenize(..., stats=True)` reports beside the tokens.

    `eos_probability` (B,) fp32: the EOS probability at each image's last kept token.
    `positions_computed`: generator positions that were computed, summed over the images (prefix, query and steps);
    `positions_needed`: those that a result depends on, N + L_b + m_b an image.
    `blocks`: forwards over steps. `rows_refilled`: images that took the place of another one that had ended, as in a
    batch beyond what the caches may take, and in a `TokenStream` (`TokenStream.counters`).
    `bytes_to_host`: what the host read to see which rows had ended.
    """

    eos_probability: Tensor
    positions_computed: int
    positions_needed: int
    blocks: int
    rows_refilled: int
    bytes_to_host: int


class DOVE(nn.Module):
    """The DOVE and Q-DOVE tokenizer: images to variable-length tokens, and tokens back to images.

    Parts: `vqgan`; `in_proj` (C -> d); `generator`, causal; `eos_head` (d -> 1); `token_decoder`, bidirectional;
    `out_proj` (d -> C). `state_dict` keys under `vqgan.` are diffusers `VQModel`'s, those under `generator.` and
    `token_decoder.` transformers `GPTNeoXModel`'s. Weights are random, from torch's seed. `tokenizer`, None or a
    `TextTokenizer`, turns queries that are text into token ids; it is no part of `state_dict` and `fingerprint`.
    Source: METHOD sections 1 to 3; paper section 3.
    """

    def __init__(self, config: DOVEConfig) -> None:
        super().__init__()
        if not isinstance(config, DOVEConfig):
            raise TypeError(f"config must be a DOVEConfig, got {type(config).__name__}")
        self.config = config
        width = config.generator.hidden_size
        self.vqgan = VQGAN(config.vqgan)
        self.in_proj = nn.Linear(config.vqgan.vq_embed_dim, width)
        self.generator = GPTNeoX(config.generator, causal=True)
        self.eos_head = nn.Linear(width, 1)
        nn.init.constant_(self.eos_head.bias, config.eos_bias_init)
        self.token_decoder = GPTNeoX(config.token_decoder, causal=False)
        self.out_proj = nn.Linear(width, config.vqgan.vq_embed_dim)
        self.generation = Generation(config.num_tokens)
        self.tokenizer: TextTokenizer | None = None

    # Loading and saving

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> DOVE:
        """Load what `save_pretrained` wrote: `config.json` and `model.safetensors` (or its shards and their index).

        The string "tiny", where no path has that name, stands for the trained model that comes with the package (64x64
        pixels, at most 64 tokens). A `tokenizer.json` beside them becomes `tokenizer`; the library that it needs is
        imported at the first text. `dtype` casts the weights; None keeps the file's. The shipped model is kept in
        float16 to be small, and comes in float32. The model is on the CPU, in evaluation mode.
        Raises `FileNotFoundError` for no such directory, `CheckpointError` for anything else that is wrong.
        """
        directory = shipped_directory(directory) or directory
        if dtype is None and is_shipped(directory):
            dtype = torch.float32
        config, tensors = checkpoint.read_dove(directory)
        model = _on_meta(config)
        checkpoint.assign(model, tensors, str(directory), dtype=dtype)
        if (Path(directory) / TOKENIZER_NAME).exists():
            model.tokenizer = TextTokenizer(Path(directory) / TOKENIZER_NAME)
        return model.eval()

    @classmethod
    def from_components(
        cls,
        vqgan: str | os.PathLike[str],
        generator: str | os.PathLike[str],
        token_decoder: str | os.PathLike[str] | None = None,
        image_size: int = 256,
        dtype: torch.dtype = torch.float32,
        *,
        image_range: tuple[float, float] | None = None,
    ) -> DOVE:
        """Assemble DOVE from a diffusers `VQModel` directory and one or two transformers GPT-NeoX directories.

        `token_decoder=None` starts the token decoder from the generator's weights. N = T = (image_size / stride)^2.
        `image_range` is the pixel range that the VQ model was trained on; None takes `image_range` from its
        `config.json`, or (0, 1). The parts that those directories do not have (`in_proj`, `eos_head`, `out_proj`)
        are random, from torch's seed. The model is on the CPU, in evaluation mode.
        Raises `FileNotFoundError` for no such directory, `CheckpointError` for one that cannot be loaded,
        `ValueError` for sizes that do not fit together.
        """
        parts = checkpoint.read_components(vqgan, generator, token_decoder, image_range)
        config = DOVEConfig(
            image_size=image_size,
            vqgan=parts.vqgan_config,
            generator=parts.generator_config,
            token_decoder=parts.token_decoder_config,
            image_range=parts.image_range,
        )
        model = _on_meta(config)
        checkpoint.assign(model.vqgan, parts.vqgan, str(vqgan), dtype=dtype)
        checkpoint.assign(model.generator, parts.generator, str(generator), dtype=dtype)
        checkpoint.assign(model.token_decoder, parts.token_decoder, str(token_decoder or generator), dtype=dtype)
        for part in (model.in_proj, model.eos_head, model.out_proj):
            part.to_empty(device="cpu")
            part.reset_parameters()
        nn.init.constant_(model.eos_head.bias, config.eos_bias_init)
        return model.to(dtype).eval()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `directory`, each by temporary file and rename.

        A model with a tokenizer writes its `tokenizer.json` too; one without removes the file of an earlier model.
        """
        checkpoint.write_dove(directory, self.config, self.state_dict())
        if self.tokenizer is not None:
            self.tokenizer.save(Path(directory) / TOKENIZER_NAME)
        else:
            (Path(directory) / TOKENIZER_NAME).unlink(missing_ok=True)

    def fingerprint(self) -> str:
        """Return "sha256:..." over the configuration and every weight (name, dtype, shape, bytes).

        Two models with the same fingerprint give the same tokens. It depends on the weights' dtype and not on the
        files they came from; weights on a GPU are copied to the host.
        """
        digest = hashlib.sha256(self.config.to_json().encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        return f"sha256:{digest.hexdigest()}"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.in_proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the tokens."""
        return self.in_proj.weight.dtype

    # The plain forward, differentiable

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) in [0, 1] or uint8 -> image features (B, N, C), read row by row.

        These are the VQGAN's features before its codebook. Source: METHOD section 2.
        """
        low, high = self.config.image_range
        scale = (high - low) / 255 if images.dtype == torch.uint8 else high - low
        # The VQGAN's layout now, as three channels are the cheapest to convert. 0 to 255 are exact in every dtype.
        x = images.to(self.dtype, memory_format=torch.channels_last)
        if (low, scale) != (0.0, 1.0):
            # low + scale x in one pass.
            x = torch.add(torch.tensor(low, dtype=x.dtype), x, alpha=scale)
        features: Tensor = self.vqgan.encode(x)
        return features.flatten(2).transpose(1, 2)

    def generate(self, features: Tensor, queries: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the generator over all N + L_b + T positions of every image in one pass.

        features (B, N, C); queries: B 1-D int64 tensors of token ids, empty for none.
        Returns states (B, T, d) after the final LayerNorm and EOS logits (B, T) fp32. Source: METHOD section 2.
        """
        # Under autocast the projection is narrower than the weights; what the layers add up is not.
        prefix = self.in_proj(features).to(self.dtype)
        steps = step_embeddings(self.config.num_tokens, prefix.shape[-1], device=prefix.device, dtype=prefix.dtype)
        # Rows with shorter queries end in padding, which no position before it can see: attention is causal.
        rows = [torch.cat([row, *self._embed(query), steps]) for row, query in zip(prefix, queries, strict=True)]
        hidden = self.generator(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        starts = [self.config.num_features + query.numel() for query in queries]
        states = torch.stack(
            [row[start : start + self.config.num_tokens] for row, start in zip(hidden, starts, strict=True)]
        ).to(self.dtype)
        return states, self.eos_logits(states).float()

    def _embed(self, query: Tensor) -> list[Tensor]:
        if query.numel() == 0 or self.generator.embed_in is None:
            return []
        return [self.generator.embed_in(query.to(self.device))]

    def eos_logits(self, states: Tensor) -> Tensor:
        """Return the EOS logits (...) of states (..., d), in fp32 at least; EOS is decided on them in fp32.

        Source: METHOD section 3.
        """
        wide = torch.promote_types(states.dtype, torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(states.to(wide), self.eos_head.weight.to(wide), self.eos_head.bias.to(wide))
        return logits.squeeze(-1)

    def eos_probability(self, states: Tensor) -> Tensor:
        """Return the probability (...) fp32 that a position with state (..., d) is EOS. Source: METHOD section 3."""
        return self.eos_logits(states).float().sigmoid()

    def decode_padded(self, padded: Tensor, lengths: Tensor) -> Tensor:
        """Decode tokens (B, T, d), zeros behind each image's lengths (B,), to images (B, 3, S, S), not clamped.

        Source: METHOD section 3.
        """
        key_mask = None
        if not self.config.decoder_attends_padding:
            key_mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return self.pictures(self.token_decoder(padded, key_mask))

    def pictures(self, states: Tensor) -> Tensor:
        """Turn the token decoder's states (B, T, d) into images (B, 3, S, S), not clamped; differentiable.

        Source: METHOD section 3.
        """
        return self.render(self.grid(states))

    def grid(self, states: Tensor) -> Tensor:
        """Project the token decoder's states (B, T, d) to the feature grid (B, C, h, w), before the codebook."""
        features: Tensor = self.out_proj(states)
        return features.transpose(1, 2).unflatten(2, (self.config.grid_size, self.config.grid_size))

    def render(self, grid: Tensor) -> Tensor:
        """Decode a feature grid (B, C, h, w), through the codebook as configured, to images (B, 3, S, S)."""
        if self.config.quantize == "nearest":
            grid, _ = self.vqgan.quantize(grid)
        images: Tensor = self.vqgan.decode(grid)
        low, high = self.config.image_range
        if (low, high) != (0.0, 1.0):
            images = (images - low) / (high - low)
        return images

    # The main job, without gradients

    @overload
    def tokenize(
        self,
        images: Tensor,
        queries: Sequence[Query] | None = None,
        *,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
        block_size: int | None = None,
        engine: str | None = None,
        deterministic: bool = False,
        stats: Literal[False] = False,
    ) -> RaggedTokens: ...

    @overload
    def tokenize(
        self,
        images: Tensor,
        queries: Sequence[Query] | None = None,
        *,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
        block_size: int | None = None,
        engine: str | None = None,
        deterministic: bool = False,
        stats: Literal[True],
    ) -> tuple[RaggedTokens, TokenizeStats]: ...

    @torch.no_grad()
    def tokenize(
        self,
        images: Tensor,
        queries: Sequence[Query] | None = None,
        *,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
        block_size: int | None = None,
        engine: str | None = None,
        deterministic: bool = False,
        stats: bool = False,
    ) -> RaggedTokens | tuple[RaggedTokens, TokenizeStats]:
        """Turn images into variable-length tokens.

        images: (B, 3, S, S), floating in [0, 1] or uint8, on the model's device.
        queries: None, or B entries, each None, a 1-D integer tensor of token ids, or text for `tokenizer` (Q-DOVE);
        "" is no query.
        length: exactly so many tokens an image, whatever EOS says. max_length: at most so many.
        eos_threshold: the EOS probability above which an image ends; None takes the configuration's.
        block_size: steps computed at a time; None lets the schedule choose (`generation.histogram`). It changes values
        by rounding alone, and the oracle has one block.
        engine: None or "blocks" steps in blocks and stops at EOS; "oracle" computes every position in one pass.
        deterministic: an image's tokens are the same, bit for bit, whatever images, how many and in which order are in
        the batch, on the same device with the same software, number of threads and options: every image goes through
        the model alone, in blocks of `block_size`, by default of 32 steps, and nothing is learned. It takes
        longer where a device is not filled by one image. Not with the oracle.
        stats: also return a `TokenizeStats`.

        Returns `RaggedTokens` with values (total, d) in the model's dtype. A large batch is worked through in
        chunks of bounded memory. Safe to call from several threads.
        Raises `TypeError` for a wrong type or dtype, `ValueError` for a wrong shape, value, device or option, and
        for NaN or infinity, naming the rows. Source: METHOD sections 2 and 3.
        """
        if engine is not None and engine not in ENGINES:
            raise ValueError(f"engine must be None or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        if deterministic and engine == "oracle":
            raise ValueError("deterministic=True is for the default engine, got engine='oracle'")
        check_images(images, self.config)
        check_device("images", images, self.device)
        check_length_options(self.config, length, max_length, eos_threshold, block_size)
        query_ids = check_queries(queries, images.shape[0], self.config, self.tokenizer)
        nonfinite = nonfinite_rows(images)
        if images.device.type == "cpu":
            raise_if_nonfinite(nonfinite)
        threshold = self.config.eos_threshold if eos_threshold is None else float(eos_threshold)
        rule = LengthRule(int(length or max_length or self.config.num_tokens), threshold if length is None else None)
        if images.shape[0] == 0:
            tokens, counters = RaggedTokens.from_padded(self._no_states(), []), WorkCounters()
        elif engine == "oracle":
            tokens, counters = tokenize_in_one_pass(self, images, query_ids, rule)
        else:
            size = None if block_size is None else int(block_size)
            tokens, counters = tokenize_in_blocks(self, images, query_ids, rule, size, deterministic)
        # On a GPU the one read at the end.
        if images.device.type != "cpu":
            raise_if_nonfinite(nonfinite)
        if engine != "oracle" and not deterministic:
            self.generation.learn(tokens.host_lengths, rule)
        if not stats:
            return tokens
        return tokens, TokenizeStats(
            eos_probability=self.eos_probability(tokens.values[tokens.cu_seqlens[1:].long() - 1]),
            positions_computed=counters.positions,
            positions_needed=sum(self.config.num_features + query.numel() for query in query_ids)
            + tokens.values.shape[0],
            blocks=counters.blocks,
            rows_refilled=counters.rows_refilled,
            bytes_to_host=counters.bytes_to_host,
        )

    def measure_cost(self) -> CostModel:
        """Time blocks of a few shapes on this device, and let the schedule of `tokenize` go by them from now on.

        Takes a few seconds for the base model on two cores. Without it the schedule takes the device type's default:
        the same in every process, where measured costs may choose other blocks, which change values by rounding.
        """
        cost = measure_cost(self.generation, self.generator, self.eos_head, self.config.num_features)
        self.generation.cost = cost
        return cost

    def encode_in_chunks(self, images: Tensor) -> Tensor:
        """Encode as `encode` does, so many images at a time as bounded memory takes -> (B, N, C)."""
        parameters = (*self.vqgan.encoder.parameters(), *self.vqgan.quant_conv.parameters())
        return torch.cat(
            [self.generation.encode(self.encode, images[rows], parameters) for rows in self.chunks(images.shape[0])]
        )

    def prefixes(self, features: Tensor, queries: Sequence[Tensor]) -> list[Tensor]:
        """Return what each row's steps follow, B tensors (N + L_b, d): its features, projected, and its query's ids.

        features (B, N, C) and queries as in `generate`.
        """
        images = self.in_proj(features).to(self.dtype)
        if self.generator.embed_in is None or not any(query.numel() for query in queries):
            return list(images)
        sizes = [query.numel() for query in queries]
        embedded = self.generator.embed_in(torch.cat(list(queries)).to(self.device)).split(sizes)
        return [torch.cat([image, query]) for image, query in zip(images, embedded, strict=True)]

    def _no_states(self) -> Tensor:
        return torch.empty((0, 0, self.config.generator.hidden_size), device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def decode(self, tokens: RaggedTokens) -> Tensor:
        """Turn tokens back into images (B, 3, S, S) in the model's dtype; not clamped to [0, 1].

        Every image has 1 to T tokens of width d, on the model's device; another floating dtype is cast.
        Runs without gradients, in chunks of bounded memory; `decode_padded` is the differentiable form.
        Raises `TypeError` or `ValueError` that says what came, for NaN or infinity the rows. Source: METHOD section 3.
        """
        self._check_tokens(tokens)
        nonfinite = ~torch.isfinite(tokens.values).all(dim=1)
        if nonfinite.device.type == "cpu":
            raise_if_nonfinite_tokens(nonfinite, tokens.cu_seqlens)
        size = self.config.image_size
        images = torch.empty((len(tokens), 3, size, size), device=self.device, dtype=self.dtype)
        for rows in self.chunks(len(tokens)):
            states = self.generation.decode(
                self.token_decoder,
                tokens[rows].to(self.dtype),
                attends_padding=self.config.decoder_attends_padding,
            )
            images[rows] = self.pictures(states)
        # On a GPU the one read, at the end.
        if nonfinite.device.type != "cpu":
            raise_if_nonfinite_tokens(nonfinite, tokens.cu_seqlens)
        return images

    def reconstruct(
        self,
        images: Tensor,
        queries: Sequence[Query] | None = None,
        *,
        length: int | None = None,
        max_length: int | None = None,
        eos_threshold: float | None = None,
        block_size: int | None = None,
        engine: str | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, RaggedTokens]:
        """Tokenize images and decode the tokens: (images (B, 3, S, S), tokens). Arguments as in `tokenize`."""
        tokens = self.tokenize(
            images,
            queries,
            length=length,
            max_length=max_length,
            eos_threshold=eos_threshold,
            block_size=block_size,
            engine=engine,
            deterministic=deterministic,
        )
        return self.decode(tokens), tokens

    def _check_tokens(self, tokens: RaggedTokens) -> None:
        if not isinstance(tokens, RaggedTokens):
            raise TypeError(f"tokens must be RaggedTokens, got {type(tokens).__name__}")
        if not tokens.values.is_floating_point():
            raise TypeError(f"tokens must be floating, got {tokens.values.dtype}")
        width = self.config.generator.hidden_size
        if tokens.values.shape[1:] != (width,):
            raise ValueError(f"tokens must have width {width}, got values of shape {tuple(tokens.values.shape)}")
        check_device("tokens", tokens.values, self.device)
        if tokens.max_seqlen > self.config.num_tokens:
            raise ValueError(f"an image has at most {self.config.num_tokens} tokens, got {tokens.max_seqlen}")
        if len(tokens) and min(tokens.host_lengths) < 1:
            raise ValueError(f"an image has at least 1 token, got none for row {tokens.host_lengths.index(0)}")

    def chunks(self, batch: int) -> list[slice]:
        """Return row ranges whose activations in the VQGAN stay within `CHUNK_BYTES`."""
        pixels = self.config.image_size**2
        itemsize = torch.empty(0, dtype=self.dtype).element_size()
        image_bytes = LIVE_ACTIVATIONS * self.config.vqgan.block_out_channels[0] * pixels * itemsize
        budget = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cpu"])
        rows = max(1, budget // image_bytes)
        return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def _on_meta(config: DOVEConfig) -> DOVE:
    """A model without storage, whose tensors are assigned from files."""
    with torch.device("meta"):
        return DOVE(config)
