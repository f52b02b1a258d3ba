"""Image tokens among a language model's text, as LLaVA has them: as many as each image has, and no padding in a row.

For any transformers model that takes `inputs_embeds`; transformers itself is not imported.
Shape suffixes: B samples, d the tokens' width, h the language model's; total, the positions of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dove_fast.ragged import RaggedTokens

__all__ = ["IGNORED", "MultimodalBatch", "Projector", "TextIds", "merge"]

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
    `packed()` and `padded()` are keyword arguments for the model; with either a sample's logits are those that it has
    alone.
    """

    embeds: Tensor
    lengths: tuple[int, ...]
    labels: Tensor | None

    def packed(self) -> dict[str, Any]:
        """Return all samples in one row, without any padding: for training and scoring, `model(**batch.packed())`.

        inputs_embeds (1, total, h), position_ids (1, total) that start again with each sample, labels (1, total) where
        there are some; no attention_mask and no cache. transformers keeps samples apart by where the positions start
        again, for models that make their masks by its `masking_utils` (Llama, Qwen, Mistral and most others) and for
        flash attention, which then computes nothing else. SDPA and eager attention get a mask (total, total) instead:
        there, long batches are cheaper `padded()`, of samples of similar lengths.
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


def merge(
    texts: Sequence[TextIds],
    tokens: RaggedTokens,
    *,
    projector: Callable[[Tensor], Tensor],
    embed: nn.Embedding,
    image_token_id: int,
    labels: Sequence[TextIds] | None = None,
) -> MultimodalBatch:
    """Put each image's projected tokens where the texts have `image_token_id`, once an image.

    texts: B samples, each a 1-D integer tensor or a sequence of ids of the language model, with any number of images,
    none included; None and "" are no text: that sample is its one image alone. On the CPU; elsewhere they cost a host
    read each. tokens: the images in the order in which the texts name them, on `embed`'s device. projector: (n, d) ->
    (n, h), such as `Projector`. embed: the language model's, `model.get_input_embeddings()`; `image_token_id` need not
    be in its vocabulary. labels: None, or for each text as many as it has ids, `IGNORED` where nothing is to be
    learnt; what stands at an image's place is not read, so `labels=texts` learns all text. They are the targets at
    their own positions: transformers' models shift them.

    The result is differentiable for the projector and the embedding. Raises `TypeError` for texts that are no ids,
    `ValueError` for ids out of the vocabulary, another number of images than the texts name, an image without tokens,
    labels that do not fit, and a projector of another width.
    """
    rows = [_ids(text, "texts", row, none=[image_token_id]) for row, text in enumerate(texts)]
    if not rows:
        raise ValueError("texts must have at least one sample, got none")
    ids = torch.cat(rows)
    is_image = ids == image_token_id
    _check_images(int(is_image.sum()), tokens)
    words = ids[~is_image]
    if len(words) and not 0 <= int(words.min()) <= int(words.max()) < embed.num_embeddings:
        found = int(words.min()) if int(words.min()) < 0 else int(words.max())
        raise ValueError(f"ids must be at least 0 and below the vocabulary's {embed.num_embeddings}, got {found}")
    device = embed.weight.device
    text_embeds = embed(words.to(device))
    image_embeds = projector(tokens.values)
    if image_embeds.shape != (len(tokens.values), embed.embedding_dim):
        raise ValueError(
            f"projector must return shape {(len(tokens.values), embed.embedding_dim)}, got {tuple(image_embeds.shape)}"
        )

    # How many positions each id takes, and where the first of them lies in text_embeds and image_embeds behind it.
    sizes = torch.ones_like(ids)
    sizes[is_image] = torch.tensor(tokens.host_lengths, dtype=torch.int64)
    sources = torch.where(is_image, 0, (~is_image).cumsum(0) - 1)
    sources[is_image] = len(words) + sizes[is_image].cumsum(0) - sizes[is_image]
    ends = sizes.cumsum(0)
    within = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
    order = sources.repeat_interleave(sizes) + within
    embeds = torch.cat([text_embeds, image_embeds.to(text_embeds.dtype)])[order.to(device)]

    stops = ends[torch.tensor([len(row) for row in rows]).cumsum(0) - 1]
    lengths = tuple(stops.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist())
    if labels is None:
        return MultimodalBatch(embeds, lengths, None)
    targets = torch.where(is_image, IGNORED, _targets(labels, rows)).repeat_interleave(sizes)
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


def _check_images(places: int, tokens: RaggedTokens) -> None:
    if not isinstance(tokens, RaggedTokens):
        raise TypeError(f"tokens must be RaggedTokens, got {type(tokens).__name__}")
    if places != len(tokens):
        raise ValueError(f"the texts have {places} places for images, and tokens has {len(tokens)} images")
    if 0 in tokens.host_lengths:
        raise ValueError(f"an image has at least 1 token, got none for image {tokens.host_lengths.index(0)}")


def _targets(labels: Sequence[TextIds], rows: Sequence[Tensor]) -> Tensor:
    if len(labels) != len(rows):
        raise ValueError(f"labels must be one for each of the {len(rows)} texts, got {len(labels)}")
    targets = []
    for row, (label, ids) in enumerate(zip(labels, rows, strict=True)):
        targets.append(_ids(label, "labels", row, none=[IGNORED] * len(ids)))
        if len(targets[-1]) != len(ids):
            raise ValueError(f"labels[{row}] must be {len(ids)} as its text has, got {len(targets[-1])}")
    return torch.cat(targets)
