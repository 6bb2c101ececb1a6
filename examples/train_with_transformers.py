"""Hugging Face's Trainer, not subclassed: SliceAdamW goes in as ``optimizers=(optimizer,
scheduler)``.

python -m examples.train_with_transformers --model FOLDER_OR_ID --data reviews.csv --output out
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from examples import common
from slicefine import SliceAdamW
from slicefine.integrations.transformers import SliceCallback


def main(arguments: list[str] | None = None, **training: Any) -> Trainer:
    """training: more of TrainingArguments."""
    parser = common.options(__doc__ or "")
    parser.add_argument(
        "--optim", help="one of Trainer's own optimizers instead, such as adamw_torch_fused"
    )
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = common.classifier(args)
    data = common.encoded(args, tokenizer)
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
        train_dataset=data,  # type: ignore[arg-type]
        eval_dataset=data,  # type: ignore[arg-type]
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=optimizers,
        callbacks=[
            SliceCallback(args.resume)
        ],  # coverage, moves, gradient norm; lets Trainer's own optimizers resume
    )
    trainer.train(resume_from_checkpoint=args.resume)
    model.save_pretrained(args.output / "delta")
    return trainer


if __name__ == "__main__":
    main()
