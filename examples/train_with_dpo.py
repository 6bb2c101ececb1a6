"""Preferences with TRL's DPOTrainer, not subclassed: the base is the reference, in the same memory.

DPO compares the model with what it was. With ``precompute_ref_log_probs`` it is asked before the
first step, so no second model is loaded.

python -m examples.train_with_dpo --model FOLDER_OR_ID --output out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.integrations.transformers import SliceCallback


def main(arguments: list[str] | None = None, **training: Any) -> DPOTrainer:
    """training: more of DPOConfig."""
    args = options().parse_args(arguments)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    get_slice_model(model, SliceConfig(r=args.r, switch_interval=args.switch_interval))
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    values = {
        "output_dir": str(args.output),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.lr,
        "max_length": 64,
        # what the base says of every pair, asked once before the training
        "precompute_ref_log_probs": True,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **training,
    }
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**values),
        train_dataset=Dataset.from_list(PAIRS * 8),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=[SliceCallback()],
    )
    trainer.train()
    model.save_pretrained(args.output / "delta")
    return trainer


PAIRS = [
    {
        "prompt": "The tides follow",
        "chosen": " the moon.",
        "rejected": " the sun and the wind and the stars.",
    },
    {
        "prompt": "Bread rises because",
        "chosen": " yeast makes gas.",
        "rejected": " of many different reasons, who knows.",
    },
]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--switch-interval", type=int, default=20)
    return parser


if __name__ == "__main__":
    main()
