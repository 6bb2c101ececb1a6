"""TRL's SFTTrainer, not subclassed: a language model learns texts, SliceAdamW goes in as
``optimizers=``.

python -m examples.train_with_trl --model FOLDER_OR_ID --data texts.jsonl --output out
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from examples import common
from slicefine import SliceAdamW
from slicefine.integrations.transformers import SliceCallback


def main(arguments: list[str] | None = None, **training: Any) -> SFTTrainer:
    """training: more of SFTConfig."""
    args = common.options(__doc__ or "").parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = common.language_model(args)
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    values = {
        "output_dir": str(args.output),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.lr,
        "max_length": 128,
        "logging_steps": 10,
        "report_to": "none",
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **training,
    }
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**values),
        train_dataset=Dataset.from_dict({"text": common.texts(args)}),
        processing_class=tokenizer,
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps),
        ),
        callbacks=[SliceCallback(args.resume)],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    model.save_pretrained(args.output / "delta")
    return trainer


if __name__ == "__main__":
    main()
