"""A loop of your own: accumulation, clipping, a schedule, bfloat16 autocast, checkpoints that
resume bit for bit.

python -m examples.train_plain_loop --model FOLDER_OR_ID --data reviews.csv --output out
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from examples import common
from slicefine import SliceAdamW


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step that ran."""
    parser = common.options(__doc__ or "")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = common.classifier(args)
    model.print_trainable_parameters()
    print(model.planned_coverage(args.steps))
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)

    first = 0
    if args.resume:
        saved = torch.load(args.resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(
            saved["optimizer"]
        )  # slices, their positions and their originals too
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]

    model.train()
    losses, data = [], common.rows(args)
    autocast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    for step in range(first, args.steps):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(args.accumulate):
            start = (step * args.accumulate + micro) * args.batch_size
            chosen = [data[(start + i) % len(data)] for i in range(args.batch_size)]
            batch = tokenizer(
                [row["text"] for row in chosen], padding=True, truncation=True, return_tensors="pt"
            )
            with autocast:
                loss = (
                    model(**batch, labels=torch.tensor([row["label"] for row in chosen])).loss
                    / args.accumulate
                )
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # moves the slices when their interval is over
        scheduler.step()
        losses.append(total)
        print(f"step {step + 1}  loss {total:.4f}  gradient norm {norm:.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "step": args.steps,
    }
    torch.save(state, args.output / "checkpoint.tmp")
    os.replace(
        args.output / "checkpoint.tmp", args.output / "checkpoint.pt"
    )  # a crash leaves the old one
    model.save_pretrained(args.output / "delta")  # what the slices have changed, a few MB
    return losses


if __name__ == "__main__":
    main()
