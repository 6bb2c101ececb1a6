"""Lightning: SliceAdamW comes from ``configure_optimizers``; Lightning's checkpoints resume bit for
bit.

python -m examples.train_with_lightning --model FOLDER_OR_ID --data reviews.csv --output out
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from examples import common
from slicefine import SliceAdamW


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
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
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
    args = common.options(__doc__ or "").parse_args(arguments)
    torch.manual_seed(0)
    model, tokenizer = common.classifier(args)
    loader = DataLoader(
        common.encoded(args, tokenizer),  # type: ignore[arg-type]
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
        Classifier(model, args.lr, args.steps), loader, ckpt_path=args.resume, weights_only=True
    )
    trainer.save_checkpoint(args.output / "last.ckpt")
    model.save_pretrained(args.output / "delta")
    return trainer


if __name__ == "__main__":
    main()
