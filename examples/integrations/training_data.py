"""Tokens as training data: a store, batches of similar lengths, workers, going on after a stop, and `datasets`.

    pip install dove-fast datasets
    python training_data.py

A run on your own images begins with `dove-fast tokenize IMAGES photos.tokens`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dove_fast import RaggedTokens, TokenStore
from dove_fast.integrations.loading import LengthBatches, collate
from dove_fast.jobs import TokenizeOptions, export, load_model, tokenize

PHOTOS = Path(__file__).parents[1] / "photos"
# Squares of each photograph, so that some are simple and some complex.
SQUARES, SIZE = 6, 64
BATCH = 6


def cut_photos(directory: Path) -> None:
    """Write some squares from along each photograph's middle into a directory."""
    for path in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(path) as photo:
            top = (photo.height - SIZE) // 2
            for square in range(SQUARES):
                left = square * (photo.width - SIZE) // (SQUARES - 1)
                photo.crop((left, top, left + SIZE, top + SIZE)).save(directory / f"{path.stem}-{square}.png")


def read_with_datasets(store: TokenStore, directory: Path) -> list[torch.Tensor]:
    """Export a store to Parquet, as `dove-fast export` does, and read each image's tokens back with `datasets`."""
    export(store, directory / "tables", "parquet")
    files = sorted(str(path) for path in (directory / "tables").glob("*.parquet"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(directory / "cache"))
    return [row["tokens"] for row in rows.with_format("torch")]


def main(directory: Path) -> dict[str, Any]:
    """Make a store in `directory`, and go through it in the ways that a training run does."""
    (directory / "images").mkdir()
    cut_photos(directory / "images")
    tokenize(directory / "images", directory / "photos.tokens", load_model("tiny"), TokenizeOptions(workers=0))
    store = TokenStore(directory / "photos.tokens")

    # The store is the data set; the sampler names the images of each batch, and collate joins them without padding.
    # max_tokens= instead bounds a batch's tokens, for a model that reads them one behind the other.
    batches = LengthBatches(store, batch_size=BATCH, seed=0)
    loader = DataLoader(store, batch_sampler=batches, collate_fn=collate, num_workers=2)
    epochs = []
    for epoch in range(2):
        batches.resume(epoch)
        epochs.append(list(loader))
    real = sum(batch.tokens.values.shape[0] for batch in epochs[0])
    bucketed = sum(len(batch.tokens) * batch.tokens.max_seqlen for batch in epochs[0])
    unsorted = DataLoader(store, batch_size=BATCH, shuffle=True, collate_fn=collate)
    shuffled = sum(len(batch.tokens) * batch.tokens.max_seqlen for batch in unsorted)

    # A run that was stopped in the second epoch, with two batches of it done, goes on with the third. Another seed,
    # batch size or number of processes would make other batches; that is refused.
    saved = json.dumps({"epoch": 1, "first": 2, "order": batches.order})
    batches.resume(**json.loads(saved))
    rest = list(loader)

    rows = RaggedTokens.from_rows(read_with_datasets(store, directory))
    same = torch.equal(rows.values, store.ragged(range(len(store))).values)

    print(f"{len(store)} images, {real} tokens, in {batches.count(0)} batches of {BATCH}")
    print(f"positions where a model pads its batches: {bucketed}; in batches at random: {shuffled}")
    print(f"two epochs in the same order: {[b.keys for b in epochs[0]] == [b.keys for b in epochs[1]]}")
    print(f"goes on as it would have: {[b.keys for b in rest] == [b.keys for b in epochs[1][2:]]}")
    print(f"the same tokens through datasets: {same}")
    return {"store": store, "epochs": epochs, "rest": rest, "rows": rows, "bucketed": bucketed, "shuffled": shuffled}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
