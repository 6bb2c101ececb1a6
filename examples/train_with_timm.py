"""timm: a vision transformer tells two kinds of stripes apart. Weights are random here, so that it
runs offline; ``--pretrained`` takes timm's own.

python -m examples.train_with_timm --model vit_tiny_patch16_224 --pretrained
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

from slicefine import SliceAdamW, SliceConfig, get_slice_model


def stripes(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures with stripes that lie (0) or stand (1), and which they are."""
    labels = torch.randint(0, 2, (count,))
    wave = torch.sin(torch.arange(size) / 2.0)
    lying = wave[:, None].expand(size, size)
    pictures = torch.stack([lying.T if label else lying for label in labels])
    return pictures[:, None] + 0.3 * torch.randn(count, 3, size, size), labels


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=32, help="width of the pictures")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--switch-interval", type=int, default=20)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model: Any = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=2, img_size=args.size, depth=2
    )
    config = SliceConfig(
        r=args.r, switch_interval=args.switch_interval, modules_to_save=["head"]
    )
    get_slice_model(
        model, config
    )  # fused qkv, projections and MLPs; the head is fully trained
    model.print_trainable_parameters()
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(args.steps):
        pictures, labels = stripes(16, args.size)
        loss = F.cross_entropy(model(pictures), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(args.output / "delta")
    return losses


if __name__ == "__main__":
    main()
