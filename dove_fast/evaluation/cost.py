"""What an image costs by its length, counted from the layers' shapes: 2 FLOP a multiply-add, and no more is counted.

Norms, activations, rotary positions and softmax are left out, as is usual. Attention is counted for the queries and
keys that meet: half of the square where it is causal. The numbers are whole FLOP of one image.
Source: METHOD sections 2, 3 and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from dove_fast.config import DOVEConfig, GPTNeoXConfig, VQGANConfig
from dove_fast.store.layout import TOKEN_DTYPES

__all__ = [
    "ImageCost",
    "code_bytes",
    "codebook_flop",
    "decoder_flop",
    "encoder_flop",
    "generator_flop",
    "image_cost",
    "one_pass_flop",
    "token_bytes",
    "token_decoder_flop",
    "vqgan_flop",
]

# A token in int8 has a scale of its own, in fp32.
SCALE_BYTES = 4
# A code in a token store is uint16.
CODE_BYTES = 2


@dataclass(frozen=True)
class ImageCost:
    """What one image of `length` tokens costs.

    positions: what the generator needs, N + L + m; blocks compute some more (`TokenizeStats.positions_computed`).
    In FLOP: encoder, the VQGAN's up to the features; generator, with `in_proj` and the EOS head; one_pass, the same
    over all N + L + T positions, as the oracle computes it; token_decoder, with `out_proj`; codebook, the search for
    the grid's codewords, 0 where the configuration has none; decoder, the VQGAN's.
    token_bytes: in a token store, by the dtype that it keeps tokens in.
    """

    length: int
    positions: int
    encoder: int
    generator: int
    one_pass: int
    token_decoder: int
    codebook: int
    decoder: int
    token_bytes: Mapping[str, int]

    @property
    def tokenize(self) -> int:
        """From the image to its tokens, in FLOP."""
        return self.encoder + self.generator

    @property
    def decode(self) -> int:
        """From the tokens to the picture, in FLOP."""
        return self.token_decoder + self.codebook + self.decoder


def image_cost(config: DOVEConfig, length: int, query: int = 0) -> ImageCost:
    """Return what an image of `length` tokens costs, whose text has `query` tokens.

    Raises `ValueError` for a length outside 1 to T, and a query below 0 or beyond the generator's positions.
    """
    positions = config.num_features + query + length
    return ImageCost(
        length=length,
        positions=positions,
        encoder=encoder_flop(config),
        generator=generator_flop(config, length, query),
        one_pass=one_pass_flop(config, query),
        token_decoder=token_decoder_flop(config, length) + config.num_tokens * _projection(config),
        codebook=codebook_flop(config) if config.quantize == "nearest" else 0,
        decoder=decoder_flop(config),
        token_bytes={dtype: token_bytes(config, length, dtype) for dtype in TOKEN_DTYPES},
    )


def token_bytes(config: DOVEConfig, length: int, dtype: str) -> int:
    """Return what `length` tokens take in a token store that keeps them in `dtype`, a key of `TOKEN_DTYPES`.

    Raises `ValueError` for another dtype, or a length below 0.
    """
    if dtype not in TOKEN_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(TOKEN_DTYPES)}, got {dtype!r}")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    scale = SCALE_BYTES if dtype == "int8" else 0
    return length * (config.generator.hidden_size * TOKEN_DTYPES[dtype].itemsize + scale)


def vqgan_flop(config: DOVEConfig) -> int:
    """Return the FLOP of an image through the VQGAN alone: encoder, the search for its codewords, and decoder."""
    return encoder_flop(config) + codebook_flop(config) + decoder_flop(config)


def code_bytes(config: DOVEConfig) -> int:
    """Return what the N codes of an image take in a token store."""
    return config.num_features * CODE_BYTES


# The stacks


def generator_flop(config: DOVEConfig, length: int, query: int = 0) -> int:
    """Return the FLOP that the engine needs for `length` tokens behind `query` ids: the prefix and so many steps.

    The last layer computes keys and values of the prefix alone, and the first layer's rows of the steps are kept with
    the model. With `in_proj` and the EOS head. Raises as `image_cost`.
    """
    _check(config, length, query)
    stack, prefix = config.generator, config.num_features + query
    last_keys_and_values = 2 * 2 * stack.hidden_size**2
    before = prefix * ((stack.num_hidden_layers - 1) * _row(stack) + last_keys_and_values)
    before += (stack.num_hidden_layers - 1) * _pairs(stack, _triangle(prefix))
    steps = length * (stack.num_hidden_layers * _row(stack) - _first_row(stack))
    steps += stack.num_hidden_layers * _pairs(stack, length * prefix + _triangle(length))
    return config.num_features * _projection(config) + before + steps + length * 2 * stack.hidden_size


def one_pass_flop(config: DOVEConfig, query: int = 0) -> int:
    """Return the FLOP of the generator over all N + L + T positions, whatever the length; with `in_proj`, EOS head.

    Raises as `image_cost`.
    """
    _check(config, config.num_tokens, query)
    stack, positions = config.generator, config.num_features + query + config.num_tokens
    layers = stack.num_hidden_layers * (positions * _row(stack) + _pairs(stack, _triangle(positions)))
    return config.num_features * _projection(config) + layers + config.num_tokens * 2 * stack.hidden_size


def token_decoder_flop(config: DOVEConfig, length: int) -> int:
    """Return the FLOP of the token decoder's layers for an image of `length` tokens, as `DOVE.decode` computes them.

    All T positions, but in the first layer, whose qkv and MLP of the padding are kept with the model. `out_proj` is
    not among them. Raises as `image_cost`.
    """
    _check(config, length, 0)
    stack, positions = config.token_decoder, config.num_tokens
    keys = positions if config.decoder_attends_padding else length
    layers = stack.num_hidden_layers * (positions * _row(stack) + _pairs(stack, positions * keys))
    return layers - (positions - length) * _first_row(stack)


def codebook_flop(config: DOVEConfig) -> int:
    """Return the FLOP of the products of N features with all codewords."""
    return 2 * config.num_features * config.vqgan.num_vq_embeddings * config.vqgan.vq_embed_dim


def _check(config: DOVEConfig, length: int, query: int) -> None:
    if not 1 <= length <= config.num_tokens:
        raise ValueError(f"length must be from 1 to {config.num_tokens}, got {length}")
    most = config.generator.max_position_embeddings - config.num_features - config.num_tokens
    if not 0 <= query <= most:
        raise ValueError(f"query must be from 0 to {most} tokens, got {query}")


def _projection(config: DOVEConfig) -> int:
    """A feature's `in_proj` or `out_proj`."""
    return 2 * config.vqgan.vq_embed_dim * config.generator.hidden_size


def _first_row(stack: GPTNeoXConfig) -> int:
    """A position's qkv and MLP in one layer."""
    return 2 * stack.hidden_size * (3 * stack.hidden_size + 2 * stack.intermediate_size)


def _row(stack: GPTNeoXConfig) -> int:
    """A position's linear layers in one layer: qkv, attention's output and MLP."""
    return _first_row(stack) + 2 * stack.hidden_size**2


def _pairs(stack: GPTNeoXConfig, pairs: int) -> int:
    """The two products of attention in one layer, all heads, for so many queries and keys that meet."""
    return 4 * stack.hidden_size * pairs


def _triangle(positions: int) -> int:
    """The pairs of causal attention, each position with itself too."""
    return positions * (positions + 1) // 2


# The VQGAN


def encoder_flop(config: DOVEConfig) -> int:
    """Return the FLOP from the image to its features before the codebook."""
    vqgan, side = config.vqgan, config.image_size
    widths = vqgan.block_out_channels
    total = _conv(3, widths[0], 3, side)
    for level, (before, after) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        attention = vqgan.down_block_types[level].startswith("Attn")
        total += sum(_level(before, after, vqgan.layers_per_block, side, attention=attention))
        if level < len(widths) - 1:
            side //= 2
            total += _conv(after, after, 3, side)
    total += sum(_middle(vqgan, side)) + _conv(widths[-1], vqgan.latent_channels, 3, side)
    return total + _conv(vqgan.latent_channels, vqgan.vq_embed_dim, 1, side)


def decoder_flop(config: DOVEConfig) -> int:
    """Return the FLOP from the codewords to the picture."""
    vqgan, side = config.vqgan, config.grid_size
    widths = vqgan.block_out_channels[::-1]
    total = _conv(vqgan.vq_embed_dim, vqgan.latent_channels, 1, side)
    total += _conv(vqgan.latent_channels, widths[0], 3, side) + sum(_middle(vqgan, side))
    for level, (before, after) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        attention = vqgan.up_block_types[level].startswith("Attn")
        total += sum(_level(before, after, vqgan.layers_per_block + 1, side, attention=attention))
        if level < len(widths) - 1:
            side *= 2
            total += _conv(after, after, 3, side)
    return total + _conv(widths[-1], 3, 3, side)


def _level(before: int, after: int, blocks: int, side: int, *, attention: bool) -> Iterator[int]:
    for inputs, outputs in pairwise([before] + [after] * blocks):
        yield _resnet(inputs, outputs, side)
        if attention:
            yield _attention(outputs, side)


def _middle(vqgan: VQGANConfig, side: int) -> Iterator[int]:
    channels = vqgan.block_out_channels[-1]
    yield 2 * _resnet(channels, channels, side)
    if vqgan.mid_block_add_attention:
        yield _attention(channels, side)


def _resnet(inputs: int, outputs: int, side: int) -> int:
    shortcut = _conv(inputs, outputs, 1, side) if inputs != outputs else 0
    return _conv(inputs, outputs, 3, side) + _conv(outputs, outputs, 3, side) + shortcut


def _attention(channels: int, side: int) -> int:
    """One head over all positions of the grid: q, k, v, the output, and the two products."""
    return 4 * 2 * side**2 * channels**2 + 4 * channels * side**4


def _conv(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """A convolution whose result has `side` x `side` positions."""
    return 2 * inputs * outputs * kernel**2 * side**2
