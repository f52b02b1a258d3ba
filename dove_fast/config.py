"""Configuration of DOVE: frozen dataclasses with two presets, JSON both ways, and validation that names the field.

Where the paper leaves a choice open, the field's comment says which reading is the default and why.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["DOVEConfig", "GPTNeoXConfig", "VQGANConfig"]

DOWN_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCK_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
QUANTIZE_MODES = ("nearest", "none")
MODEL_TYPE = "dove"


def _require_int(owner: str, name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}.{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{owner}.{name} must be at least {minimum}, got {value}")


def _require_float(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{owner}.{name} must be finite, got {value}")


def _require_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}.{name} must be true or false, got {value!r}")


def _freeze_sequence(owner: Any, name: str) -> None:
    """Turn a list (as JSON gives it) into a tuple, so that a configuration is hashable."""
    value = getattr(owner, name)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{type(owner).__name__}.{name} must be a sequence, got {value!r}")
    object.__setattr__(owner, name, tuple(value))


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of the VQGAN, field for field those of a diffusers `VQModel`; the defaults are the aMUSEd VQ model's.

    Raises `TypeError` or `ValueError` that names the field. Source: METHOD section 1; paper section 3.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    layers_per_block: int = 2
    latent_channels: int = 64
    vq_embed_dim: int = 64
    num_vq_embeddings: int = 8192
    norm_num_groups: int = 32
    mid_block_add_attention: bool = False
    # One entry a level; left empty, no level has attention.
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _freeze_sequence(self, "block_out_channels")
        levels = len(self.block_out_channels)
        if levels == 0:
            raise ValueError(f"{owner}.block_out_channels must have at least one level, got an empty list")
        for name in ("layers_per_block", "latent_channels", "vq_embed_dim", "num_vq_embeddings", "norm_num_groups"):
            _require_int(owner, name, getattr(self, name), 1)
        _require_bool(owner, "mid_block_add_attention", self.mid_block_add_attention)
        for channels in self.block_out_channels:
            _require_int(owner, "block_out_channels", channels, 1)
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"{owner}.block_out_channels must be multiples of norm_num_groups={self.norm_num_groups}, "
                    f"got {channels}"
                )
        for name, known in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
            _freeze_sequence(self, name)
            types = getattr(self, name) or (known[0],) * levels
            object.__setattr__(self, name, types)
            if len(types) != levels:
                raise ValueError(f"{owner}.{name} must have one entry a level ({levels}), got {len(types)}")
            for block_type in types:
                if block_type not in known:
                    raise ValueError(f"{owner}.{name} must be among {', '.join(known)}, got {block_type!r}")

    @property
    def stride(self) -> int:
        """Image pixels a feature spans in each direction: every level but the last halves the resolution."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Sizes of a GPT-NeoX stack, field for field those of transformers; the defaults are Pythia-70M's.

    `vocab_size` is used by the generator's query embedding alone; 0 means the stack has no embedding.
    Raises `TypeError` or `ValueError` that names the field. Source: METHOD section 1; paper section 3.
    """

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    vocab_size: int = 50304
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    layer_norm_eps: float = 1e-5
    attention_bias: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            _require_int(owner, name, getattr(self, name), 1)
        _require_int(owner, "vocab_size", self.vocab_size, 0)
        for name in ("rotary_pct", "rotary_emb_base", "layer_norm_eps", "initializer_range"):
            _require_float(owner, name, getattr(self, name))
        _require_bool(owner, "attention_bias", self.attention_bias)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{owner}.hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if not 0 <= self.rotary_pct <= 1:
            raise ValueError(f"{owner}.rotary_pct must be between 0 and 1, got {self.rotary_pct}")
        if self.rotary_dim % 2:
            raise ValueError(
                f"{owner}.rotary_pct must give an even number of rotated channels a head, "
                f"got {self.rotary_dim} of {self.head_dim} with {self.rotary_pct}"
            )
        if self.rotary_emb_base <= 0 or self.layer_norm_eps <= 0 or self.initializer_range < 0:
            raise ValueError(
                f"{owner}: rotary_emb_base and layer_norm_eps must be positive and initializer_range not negative, "
                f"got {self.rotary_emb_base}, {self.layer_norm_eps} and {self.initializer_range}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that the rotary embedding turns; the rest pass unchanged."""
        return int(self.head_dim * self.rotary_pct)


def _default_token_decoder() -> GPTNeoXConfig:
    return GPTNeoXConfig(vocab_size=0)


@dataclass(frozen=True)
class DOVEConfig:
    """Everything that defines a DOVE model besides its weights.

    Raises `TypeError` or `ValueError` that names the field. Source: METHOD sections 1 to 3; paper section 3.
    """

    image_size: int = 256
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    generator: GPTNeoXConfig = field(default_factory=GPTNeoXConfig)
    token_decoder: GPTNeoXConfig = field(default_factory=_default_token_decoder)
    # The pixel range that the VQGAN was trained on. Images are given and returned in [0, 1] whatever it is.
    image_range: tuple[float, float] = (0.0, 1.0)
    # [reading] The first step whose EOS probability exceeds this is the image's last token.
    eos_threshold: float = 0.5
    # [reading] "nearest": the token decoder's features go through the codebook, as the VQGAN's own decoder does.
    quantize: str = "nearest"
    # [reading] True: the zeros behind an image's tokens are keys like any other position, as the text says.
    # False: they only ask, as the figure draws it.
    decoder_attends_padding: bool = True
    # [reading] Negative, so that training starts with long sequences and learns to stop.
    eos_bias_init: float = -4.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name, kind in (("vqgan", VQGANConfig), ("generator", GPTNeoXConfig), ("token_decoder", GPTNeoXConfig)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{owner}.{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        _require_int(owner, "image_size", self.image_size, 1)
        _require_float(owner, "eos_threshold", self.eos_threshold)
        _require_float(owner, "eos_bias_init", self.eos_bias_init)
        _require_bool(owner, "decoder_attends_padding", self.decoder_attends_padding)
        if not 0 < self.eos_threshold < 1:
            raise ValueError(f"{owner}.eos_threshold must lie between 0 and 1, both excluded, got {self.eos_threshold}")
        if self.quantize not in QUANTIZE_MODES:
            raise ValueError(f"{owner}.quantize must be one of {', '.join(QUANTIZE_MODES)}, got {self.quantize!r}")
        _freeze_sequence(self, "image_range")
        if len(self.image_range) != 2:
            raise ValueError(f"{owner}.image_range must be a pair (low, high), got {self.image_range}")
        for bound in self.image_range:
            _require_float(owner, "image_range", bound)
        object.__setattr__(self, "image_range", tuple(float(bound) for bound in self.image_range))
        if not self.image_range[0] < self.image_range[1]:
            raise ValueError(f"{owner}.image_range must be increasing, got {self.image_range}")
        if self.image_size % self.vqgan.stride:
            raise ValueError(
                f"{owner}.image_size must be a multiple of the VQGAN's stride {self.vqgan.stride}, "
                f"got {self.image_size}"
            )
        self._check_stacks(owner)

    def _check_stacks(self, owner: str) -> None:
        if self.generator.hidden_size % 2:
            raise ValueError(
                f"{owner}.generator.hidden_size must be even for the sinusoidal steps, got {self.generator.hidden_size}"
            )
        if self.token_decoder.hidden_size != self.generator.hidden_size:
            raise ValueError(
                f"{owner}: the token decoder reads the generator's states, so token_decoder.hidden_size "
                f"must be {self.generator.hidden_size}, got {self.token_decoder.hidden_size}"
            )
        if self.token_decoder.vocab_size:
            raise ValueError(
                f"{owner}.token_decoder.vocab_size must be 0 (it has no embedding), got {self.token_decoder.vocab_size}"
            )
        for name, stack, positions in (
            ("generator", self.generator, self.num_features + self.num_tokens),
            ("token_decoder", self.token_decoder, self.num_tokens),
        ):
            if stack.max_position_embeddings < positions:
                raise ValueError(
                    f"{owner}.{name}.max_position_embeddings must be at least {positions} for image_size="
                    f"{self.image_size}, got {stack.max_position_embeddings}"
                )

    @property
    def grid_size(self) -> int:
        """Features along one side of the VQGAN's grid."""
        return self.image_size // self.vqgan.stride

    @property
    def num_features(self) -> int:
        """N, the number of image features the generator reads."""
        return self.grid_size**2

    @property
    def num_tokens(self) -> int:
        """T, the most tokens an image can have; equal to N, one position for each feature that is decoded."""
        return self.num_features

    @classmethod
    def base(cls) -> DOVEConfig:
        """Return the published sizes: 256x256 images, the aMUSEd VQGAN and two Pythia-70M stacks."""
        return cls()

    @classmethod
    def tiny(cls) -> DOVEConfig:
        """Return a small model (64x64 images, stride 8, T = 64, 4.6 M weights): what the shipped checkpoint has."""
        sizes: dict[str, Any] = {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "max_position_embeddings": 512,
        }
        return cls(
            image_size=64,
            vqgan=VQGANConfig(
                block_out_channels=(32, 64, 64, 128),
                layers_per_block=1,
                latent_channels=16,
                vq_embed_dim=16,
                num_vq_embeddings=1024,
            ),
            generator=GPTNeoXConfig(vocab_size=512, **sizes),
            token_decoder=GPTNeoXConfig(vocab_size=0, **sizes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries, lists, numbers and strings, ready for JSON."""
        return {"model_type": MODEL_TYPE, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DOVEConfig:
        """Build a configuration from `to_dict`'s form; absent fields take their defaults.

        Raises `ValueError` for a field that does not exist or another `model_type`, `TypeError` for a wrong type.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a DOVE configuration must be a JSON object, got {type(data).__name__}")
        values = dict(data)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(f"model_type must be {MODEL_TYPE!r}, got {model_type!r}: not a DOVE configuration")
        parts: tuple[tuple[str, type[VQGANConfig] | type[GPTNeoXConfig]], ...] = (
            ("vqgan", VQGANConfig),
            ("generator", GPTNeoXConfig),
            ("token_decoder", GPTNeoXConfig),
        )
        for name, kind in parts:
            if name in values:
                values[name] = _build(kind, values[name], name)
        return _build(cls, values, "the DOVE configuration")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the configuration as JSON text, and write it to `path` when one is given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> DOVEConfig:
        """Read a configuration from a JSON file, or from JSON text (a `str` that starts with a brace).

        Raises `ValueError` for text that is not JSON and what `from_dict` raises; `FileNotFoundError` for no such file.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            text = source
        else:
            text = Path(source).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from error
        return cls.from_dict(data)


def _build(kind: Any, values: object, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(f"{where} must be a JSON object, got {type(values).__name__}")
    known = [item.name for item in dataclasses.fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(map(repr, unknown))}; the fields are {', '.join(known)}")
    return kind(**values)
