"""Reinforcement learning with TRL's GRPOTrainer, not subclassed: short answers are rewarded.

The model samples with the same weights that train, so there is no adapter to merge or to send.
``model.changed_since(step)`` keeps a separate engine up to date (examples/sync_weights.py).

python -m examples.train_with_grpo --model FOLDER_OR_ID --output out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.integrations.transformers import SliceCallback


def brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward of each completion: the fewer different tokens, the better."""
    return [-float(len(set(ids))) for ids in completion_ids]


def main(arguments: list[str] | None = None, **training: Any) -> GRPOTrainer:
    """training: more of GRPOConfig."""
    args = options().parse_args(arguments)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    get_slice_model(model, SliceConfig(r=args.r, switch_interval=args.switch_interval))
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    values = {
        "output_dir": str(args.output),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.group,
        "num_generations": args.group,
        "max_completion_length": args.tokens,
        "learning_rate": args.lr,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **training,
    }
    trainer = GRPOTrainer(
        model,
        reward_funcs=brevity,
        args=GRPOConfig(**values),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=[SliceCallback()],
    )
    trainer.train()
    model.save_pretrained(args.output / "delta")
    return trainer


PROMPTS = ["The tides follow", "Bread rises because", "A slice is"]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion, at most")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--switch-interval", type=int, default=20)
    return parser


if __name__ == "__main__":
    main()
