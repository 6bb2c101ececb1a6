"""A model of your own in plain PyTorch: nn.TransformerEncoder, no Hugging Face library at all.

python -m examples.train_plain_transformer
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from slicefine import SliceAdamW, SliceConfig, get_slice_model


class Classifier(nn.Module):
    """Says whether a sequence has more tokens above than below the middle of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.classifier = nn.Linear(32, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.encoder(self.embedding(ids)).mean(1))


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--switch-interval", type=int, default=20)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Classifier()
    config = SliceConfig(
        r=args.r, switch_interval=args.switch_interval, modules_to_save=["classifier"]
    )
    sliced = get_slice_model(model, config)  # linear layers and attention's projections
    sliced.print_trainable_parameters()
    optimizer = SliceAdamW(sliced.parameters(), lr=1e-2)
    losses = []
    for _ in range(args.steps):
        ids = torch.randint(0, 64, (32, 15))
        labels = ((ids >= 32).sum(1) > 7).long()
        loss = nn.functional.cross_entropy(sliced(ids), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    sliced.save_pretrained(args.output / "delta")
    return losses


if __name__ == "__main__":
    main()
