"""DOVE's tokens in a language model, as LLaVA has them: a training step, and an answer.

    pip install 'dove-fast' transformers
    python vision_language.py

The language model is a small random Llama, so that nothing is downloaded. Any transformers model that takes
`inputs_embeds` goes in its place; where `check_packing` refuses it, with `padded()` instead of `packed()`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dove_fast import DOVE
from dove_fast.data import ShortSideCenterCrop, load_image
from dove_fast.integrations.multimodal import IGNORED, Projector, check_packing, merge

PHOTOS = Path(__file__).parents[1] / "photos"
# Ids of the language model: where an image goes, the end of an answer, and a question of four words.
IMAGE, END = 1, 2
QUESTION = [10, 11, 12, 13]


def read_photos(size: int) -> torch.Tensor:
    """Return the sample photographs, (7, 3, size, size) uint8."""
    loaded = [load_image(str(path), ShortSideCenterCrop(size)) for path in sorted(PHOTOS.glob("*.jpg"))]
    return torch.stack([torch.from_numpy(photo.pixels) for photo in loaded])


def small_llama() -> LlamaForCausalLM:
    """Return a random Llama of two layers."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        # So large that thirty steps teach it something.
        initializer_range=0.1,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def main() -> dict[str, Any]:
    """Train projector and language model for a few steps to name seven photographs, and ask for their names."""
    torch.manual_seed(0)
    dove = DOVE.from_pretrained("tiny")
    llama = small_llama()
    projector = Projector(dove.config.generator.hidden_size, llama.config.hidden_size)
    embed = llama.get_input_embeddings()

    photos = read_photos(dove.config.image_size)
    # A Q-DOVE takes the question here, too: tokens where it points. None and "" are no question.
    tokens = dove.tokenize(photos, queries=[None, "", *[None] * 5])

    # <image> question answer: the answer is learnt. The last sample has no question: its text is the answer alone.
    names = [[20 + index, END] for index in range(len(photos))]
    texts = [[IMAGE, *QUESTION, *name] for name in names]
    texts[-1] = [IMAGE, *names[-1]]
    labels = [[IGNORED] * (len(text) - 2) + text[-2:] for text in texts]

    # In company as alone: an error where the samples of one row see each other, as in models that are not made for it.
    llama.eval()
    batch = merge(texts, tokens, projector=projector, embed=embed, image_token_id=IMAGE, labels=labels)
    difference = check_packing(llama, batch)

    llama.train()
    optimizer = torch.optim.Adam([*projector.parameters(), *llama.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        batch = merge(texts, tokens, projector=projector, embed=embed, image_token_id=IMAGE, labels=labels)
        loss = llama(**batch.packed()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    llama.eval()
    with torch.no_grad():
        prompts = [text[:-2] for text in texts]
        asked = merge(prompts, tokens, projector=projector, embed=embed, image_token_id=IMAGE)
        answers = llama.generate(**asked.padded("left"), max_new_tokens=2, do_sample=False).tolist()

    positions = sum(batch.lengths)
    longest = len(texts) * (dove.config.num_tokens + max(map(len, texts)) - 1)
    print(f"tokens an image: {list(tokens.host_lengths)}")
    print(f"positions in the packed row: {positions}; with every image padded to T: {longest}")
    print(f"largest relative difference of logits, packed or alone: {difference:.1e}")
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    print(f"right answers: {sum(a == b for a, b in zip(answers, names, strict=True))} of {len(names)}")
    return {"losses": losses, "difference": difference, "positions": positions, "answers": answers, "names": names}


if __name__ == "__main__":
    main()
