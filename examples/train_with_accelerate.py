"""Accelerate: ``prepare`` takes model and SliceAdamW as they are; ``save_state`` and ``load_state``
resume bit for bit.

accelerate launch -m examples.train_with_accelerate --model FOLDER_OR_ID --data reviews.csv --output
out
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from examples import common
from slicefine import SliceAdamW


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every micro-batch that ran."""
    parser = common.options(__doc__ or "")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate, mixed_precision=args.mixed_precision
    )
    model, tokenizer = common.classifier(args)
    loader = DataLoader(
        common.encoded(args, tokenizer),  # type: ignore[arg-type]
        batch_size=args.batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
        generator=torch.Generator().manual_seed(
            0
        ),  # or starting a loader would draw from the generator that dropout uses
    )
    optimizer = SliceAdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
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


if __name__ == "__main__":
    main()
