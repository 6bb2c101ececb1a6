"""A diffusion transformer of diffusers learns to denoise; slices in its attention and feed-forward.

The default is a small one with random weights, on pictures made here; ``--model`` takes a folder or
hub id whose ``transformer`` is a DiT.

python -m examples.train_with_diffusers
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from slicefine import SliceAdamW, SliceConfig, get_slice_model


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step."""
    args = options().parse_args(arguments)
    torch.manual_seed(0)
    model: Any = build(args.model)
    size, channels = model.config.sample_size, model.config.in_channels
    config = SliceConfig(r=args.r, switch_interval=args.switch_interval)
    get_slice_model(model, config).print_trainable_parameters()
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    noises = DDPMScheduler(num_train_timesteps=1000)
    losses = []
    for _ in range(args.steps):
        pictures, labels = batch(args.batch_size, channels, size)
        noise = torch.randn_like(pictures)
        times = torch.randint(0, 1000, (args.batch_size,))
        noisy = noises.add_noise(pictures, noise, times)  # pyright: ignore[reportArgumentType]
        predicted = model(noisy, timestep=times, class_labels=labels).sample[:, :channels]
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # diffusers' own method would write the whole model
    model.delta().save(args.output / "delta")
    return losses


def build(path: str | None) -> DiTTransformer2DModel:
    if path:
        return DiTTransformer2DModel.from_pretrained(path, subfolder="transformer")
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )


def batch(count: int, channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, channels, size, size) pictures of a bright row, and its number below 10 as label."""
    labels = torch.randint(0, min(10, size), (count,))
    rows = torch.nn.functional.one_hot(labels, size).float() * 2 - 1
    return rows[:, None, :, None].expand(count, channels, size, size).contiguous(), labels


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; default: a small random one")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--switch-interval", type=int, default=50)
    return parser


if __name__ == "__main__":
    main()
