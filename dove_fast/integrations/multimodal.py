"""Image tokens among a language model's text, as LLaVA has them: as many as each image has, and no padding in a row.

For transformers models that take `inputs_embeds`: any of them padded, and in one row those that keep its samples apart
(`MultimodalBatch.packed`), which `check_packing` finds out. transformers itself is not imported.
Shape suffixes: B samples, d the tokens' width, h the language model's; total, the positions of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dove_fast.ragged import RaggedTokens

__all__ = ["IGNORED", "MultimodalBatch", "Projector", "TextIds", "check_packing", "merge"]

# The label that transformers' losses and torch's cross entropy leave out.
IGNORED = -100

# One sample's text in the language model's token ids; None and "" are no text.
TextIds: TypeAlias = Tensor | Sequence[int] | None


class Projector(nn.Module):
    """From the width d of DOVE's tokens to the language model's h: (..., d) -> (..., h), in the weights' dtype.

    hidden_layers=1: Linear, exact GELU, Linear, as in LLaVA 1.5; 0: one Linear, as in LLaVA.
    Raises `ValueError` for another number.
    Source: Liu et al., Improved Baselines with Visual Instruction Tuning (arXiv 2310.03744).
    """

    def __init__(self, in_features: int, out_features: int, *, hidden_layers: int = 1) -> None:
        super().__init__()
        if hidden_layers not in (0, 1):
            raise ValueError(f"hidden_layers must be 0 or 1, got {hidden_layers}")
        self.first = nn.Linear(in_features, out_features)
        self.second = nn.Sequential(nn.GELU(), nn.Linear(out_features, out_features)) if hidden_layers else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (..., d), `RaggedTokens.values` for one, to (..., h)."""
        out: Tensor = self.first(tokens.to(self.first.weight.dtype))
        return out if self.second is None else self.second(out)


@dataclass(frozen=True, eq=False)
class MultimodalBatch:
    """B samples of text and images, one behind the other: what `merge` returns.

    embeds: (total, h), on the language model's device and in its dtype. lengths: B ints, each sample's positions.
    labels: (total,) int64, `IGNORED` at the images' positions and at each sample's first; None for none.
    `packed()` and `padded()` are keyword arguments for the model. With `padded()` a sample's logits are those that it
    has alone, in every causal model that heeds the attention mask; with `packed()` only in those that `packed` names.
    """

    embeds: Tensor
    lengths: tuple[int, ...]
    labels: Tensor | None

    def packed(self) -> dict[str, Any]:
        """Return all samples in one row, without any padding: for training and scoring, `model(**batch.packed())`.

        inputs_embeds (1, total, h), position_ids (1, total) that start again with each sample, labels (1, total) where
        there are some; no attention_mask and no cache.

        transformers 5 finds the samples by where the positions start again (`find_packed_sequence_indices` of its
        `masking_utils`), in models whose attention masks all come from there: Llama, Qwen, Mistral, GPT-NeoX and most
        others. All others may let samples see those before them, without an error: models with masks of their own or
        with layers that are no attention (state-space, linear or convolutional, as in Mamba and in hybrids), and remote
        code. `check_packing` tells for a model; those that fail take `padded()`.
        With flash attention a row costs what its samples cost. SDPA and eager attention get a mask (total, total)
        instead: there, long batches are cheaper `padded()`, of samples of similar lengths.
        """
        positions = torch.cat([torch.arange(length) for length in self.lengths])[None].to(self.embeds.device)
        inputs = {"inputs_embeds": self.embeds[None], "position_ids": positions, "use_cache": False}
        return inputs if self.labels is None else {**inputs, "labels": self.labels[None]}

    def padded(self, side: Literal["left", "right"] = "right") -> dict[str, Any]:
        """Return one row a sample, L positions as the longest has: `model(**batch.padded())`.

        inputs_embeds (B, L, h) with zeros in the padding; attention_mask (B, L) int64, 0 there; position_ids (B, L)
        that count from each sample's first position, 0 in the padding; labels (B, L) where there are some.
        side="left" is what `model.generate` needs, from a batch without labels. Raises `ValueError` for another side.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {side!r}")

        def rows(values: Sequence[Tensor], padding: int = 0) -> Tensor:
            return pad_sequence(list(values), batch_first=True, padding_value=padding, padding_side=side)

        device = self.embeds.device
        inputs = {
            "inputs_embeds": rows(self.embeds.split(self.lengths)),
            "attention_mask": rows([torch.ones(length, dtype=torch.int64) for length in self.lengths]).to(device),
            "position_ids": rows([torch.arange(length) for length in self.lengths]).to(device),
        }
        return inputs if self.labels is None else {**inputs, "labels": rows(self.labels.split(self.lengths), IGNORED)}

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Take what a model returned for `packed()`, (1, total, c), apart: B tensors (length, c)."""
        return outputs[0].split(self.lengths)


@torch.no_grad()
def check_packing(model: nn.Module, batch: MultimodalBatch, *, tolerance: float = 1e-3) -> float:
    """Check that a language model keeps the samples of one row apart: their logits together against each one's alone.

    model: one that returns logits (1, total, V) for `batch.packed()`, in evaluation mode. batch: at least two samples,
    few and short ones, as each is a call of its own. tolerance: of |together - alone| / |alone| over V, at any
    position. The default is for fp32, where rounding stays far below it, and a sample that is seen does not; rounding
    in half precision comes to a few per cent, which may hide one.

    Returns the largest difference. Raises `ValueError` where it is above the tolerance or NaN, naming the sample, and
    for a model in training mode or fewer samples.
    """
    if len(batch.lengths) < 2:
        raise ValueError(f"batch must have at least 2 samples to keep apart, got {len(batch.lengths)}")
    if model.training:
        raise ValueError("model must be in evaluation mode, as dropout makes every call another: call model.eval()")
    batch = replace(batch, labels=None)
    together = batch.split(model(**batch.packed()).logits)
    largest = 0.0
    for sample, embeds in enumerate(batch.embeds.split(batch.lengths)):
        alone = MultimodalBatch(embeds, (len(embeds),), None)
        expected = model(**alone.packed()).logits[0].float()
        error = (together[sample].float() - expected).norm(dim=1) / expected.norm(dim=1)
        difference = float(error.max())
        if not difference <= tolerance:
            raise ValueError(
                f"{type(model).__name__} does not keep the samples of a packed row apart: logits of sample {sample} "
                f"differ by {difference:.2g} of what they are alone, more than {tolerance:g}; use padded()"
            )
        largest = max(largest, difference)
    return largest


def merge(
    texts: Sequence[TextIds],
    tokens: RaggedTokens | None,
    *,
    projector: Callable[[Tensor], Tensor],
    embed: nn.Embedding,
    image_token_id: int,
    labels: Sequence[TextIds] | None = None,
) -> MultimodalBatch:
    """Put each image's projected tokens where the texts have `image_token_id`, once an image.

    texts: B samples, each a 1-D integer tensor or a sequence of ids of the language model, with any number of images,
    none included; None and "" are no text: that sample is its one image alone. On the CPU; elsewhere they cost a host
    read each. tokens: the images in the order in which the texts name them, on `embed`'s device; None where they name
    none. projector: (n, d) -> (n, h), such as `Projector`; not called for None. embed: the language model's,
    `model.get_input_embeddings()`; `image_token_id` need not be in its vocabulary. labels: None, or for each text as
    many as it has ids, `IGNORED` where nothing is to be learnt; what stands at an image's place is not read, so
    `labels=texts` learns all text. They are the targets at their own positions: transformers' models shift them.

    The result is differentiable for the projector and the embedding. Raises `TypeError` for texts that are no ids,
    `ValueError` for ids and labels out of the vocabulary, another number of images than the texts name, an image
    without tokens, labels of another number, and a projector of another width.
    """
    rows = [_ids(text, "texts", row, none=[image_token_id]) for row, text in enumerate(texts)]
    if not rows:
        raise ValueError("texts must have at least one sample, got none")
    ids = torch.cat(rows)
    is_image = ids == image_token_id
    image_lengths = _image_lengths(int(is_image.sum()), tokens)
    words = ids[~is_image]
    _check_vocabulary("ids must be", words, embed)
    targets = None
    if labels is not None:
        targets = torch.where(is_image, IGNORED, _targets(labels, rows))
        _check_vocabulary(f"labels must be IGNORED ({IGNORED}), or", targets[targets != IGNORED], embed)
    device = embed.weight.device
    text_embeds = embed(words.to(device))
    image_embeds = text_embeds[:0] if tokens is None else projector(tokens.values)
    if image_embeds.shape != (sum(image_lengths), embed.embedding_dim):
        raise ValueError(
            f"projector must return shape {(sum(image_lengths), embed.embedding_dim)}, got {tuple(image_embeds.shape)}"
        )

    # How many positions each id takes, and where the first of them lies in text_embeds and image_embeds behind it.
    sizes = torch.ones_like(ids)
    sizes[is_image] = torch.tensor(image_lengths, dtype=torch.int64)
    sources = torch.where(is_image, 0, (~is_image).cumsum(0) - 1)
    sources[is_image] = len(words) + sizes[is_image].cumsum(0) - sizes[is_image]
    ends = sizes.cumsum(0)
    within = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
    order = sources.repeat_interleave(sizes) + within
    embeds = torch.cat([text_embeds, image_embeds.to(text_embeds.dtype)])[order.to(device)]

    stops = ends[torch.tensor([len(row) for row in rows]).cumsum(0) - 1]
    lengths = tuple(stops.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist())
    if targets is None:
        return MultimodalBatch(embeds, lengths, None)
    targets = targets.repeat_interleave(sizes)
    # In one row, the position before a sample's first is the last of another sample.
    targets[stops - torch.tensor(lengths)] = IGNORED
    return MultimodalBatch(embeds, lengths, targets.to(device))


def _ids(text: TextIds, name: str, row: int, *, none: list[int]) -> Tensor:
    """Return a text's ids, 1-D int64 on the CPU; `none` where there is no text."""
    if isinstance(text, str) and text:
        raise TypeError(f"{name}[{row}] must be ids of the language model, got a str; encode it with its tokenizer")
    if text is None or len(text) == 0:
        return torch.tensor(none, dtype=torch.int64)
    ids = torch.as_tensor(text)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}[{row}] must be a 1-D integer tensor, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.to("cpu", torch.int64)


def _image_lengths(places: int, tokens: RaggedTokens | None) -> tuple[int, ...]:
    """Return how many tokens the image of each place has, after checking that they fit."""
    if tokens is not None and not isinstance(tokens, RaggedTokens):
        raise TypeError(f"tokens must be RaggedTokens or None, got {type(tokens).__name__}")
    lengths = () if tokens is None else tokens.host_lengths
    if places != len(lengths):
        raise ValueError(f"the texts have {places} places for images, and tokens has {len(lengths)} images")
    if 0 in lengths:
        raise ValueError(f"an image has at least 1 token, got none for image {lengths.index(0)}")
    return lengths


def _check_vocabulary(must: str, ids: Tensor, embed: nn.Embedding) -> None:
    outside = ids[(ids < 0) | (ids >= embed.num_embeddings)]
    if len(outside):
        raise ValueError(f"{must} at least 0 and below the vocabulary's {embed.num_embeddings}, got {int(outside[0])}")


def _targets(labels: Sequence[TextIds], rows: Sequence[Tensor]) -> Tensor:
    if len(labels) != len(rows):
        raise ValueError(f"labels must be one for each of the {len(rows)} texts, got {len(labels)}")
    targets = []
    for row, (label, ids) in enumerate(zip(labels, rows, strict=True)):
        targets.append(_ids(label, "labels", row, none=[IGNORED] * len(ids)))
        if len(targets[-1]) != len(ids):
            raise ValueError(f"labels[{row}] must be {len(ids)} as its text has, got {len(targets[-1])}")
    return torch.cat(targets)
