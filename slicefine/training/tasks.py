"""The tasks of `slicefine train`: how a row becomes a batch, which model takes it, how it is
scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.training.data import Row, UserError, labels_of

Batch = dict[str, Tensor]


@dataclass
class Columns:
    text: str
    label: str
    image: str


class Task:
    """name: of the task. metric: of `evaluate`. columns: that a row must have."""

    metric = "accuracy"
    unit = "tokens"  # of `size`

    def __init__(self, columns: Columns, max_length: int) -> None:
        self.columns, self.max_length = columns, max_length
        self.labels: list[str] = []

    def required(self) -> list[str]:
        raise NotImplementedError

    def prepare(self, rows: list[Row]) -> None:
        """Look at the training rows before anything large is loaded."""

    def check_labels(self, rows: list[Row]) -> None:
        """Raise UserError for a label that the training rows do not have."""
        if self.labels:
            self._label_ids(rows)

    def load(self, model: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
        """(model, names of its modules that are newly initialised)."""
        raise NotImplementedError

    def config_of(self, model: Any) -> dict[str, Any]:
        """What the model's configuration has for this task and its base's need not have;
        from_pretrained takes it.
        """
        if not self.labels:
            return {}
        names = dict(enumerate(self.labels))
        known = {key: getattr(model.config, key, None) for key in ("pad_token_id", "problem_type")}
        return {
            "num_labels": len(names),
            "id2label": {str(k): v for k, v in names.items()},
            "label2id": {v: k for k, v in names.items()},
            **{key: value for key, value in known.items() if value is not None},
        }

    def load_trained(self, model: str) -> tuple[nn.Module, list[str]]:
        """A classifier with ``labels`` and the head that it was trained with, in float32; and which
        modules are new all the same.
        """
        raise NotImplementedError

    def batch(self, rows: list[Row]) -> Batch:
        raise NotImplementedError

    def size(self, batch: Batch) -> int:
        """Tokens (or images) in a batch, for the progress line."""
        return int(batch["attention_mask"].sum())

    def weight(self, batch: Batch) -> int:
        """What the mean loss of a batch is a mean over; micro-batches are weighted by it."""
        return len(batch["labels"])

    def length(self, row: Row) -> int:
        """What batches are sorted by, to pad little."""
        return len(str(row[self.columns.text]))

    def save(self, folder: Path) -> None:
        """Tokenizer or processor, beside the model."""

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: list[list[Row]], autocast: Any, device: torch.device
    ) -> float:
        model.eval()
        right = count = 0
        for rows in batches:
            batch = {key: value.to(device) for key, value in self.batch(rows).items()}
            with autocast():
                logits = model(**batch).logits
            right += int((logits.argmax(-1) == batch["labels"]).sum())
            count += len(rows)
        return right / count

    def _label_ids(self, rows: list[Row]) -> Tensor:
        index = {label: i for i, label in enumerate(self.labels)}
        unknown = {str(row[self.columns.label]) for row in rows} - index.keys()
        if unknown:
            raise UserError(
                f"label {sorted(unknown)[0]!r} does not occur in the training rows; known:"
                f" {', '.join(self.labels[:20])}"
            )
        return torch.tensor([index[str(row[self.columns.label])] for row in rows])


def location(model: str) -> tuple[str, dict[str, Any]]:
    """A path or id, and what from_pretrained needs to read a single GGUF file."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {model}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if (model.startswith((".", "/", "~")) or "\\" in model) and not path.expanduser().exists():
        raise UserError(
            f"--model {model}: no such folder; give a folder with config.json and weights, a .gguf"
            " file, or a hub id"
        )
    return str(path.expanduser()) if path.expanduser().exists() else model, {}


def pretrained(kind: Any, model: str, dtype: torch.dtype | None, **options: Any) -> Any:
    place, extra = location(model)
    if dtype is not None:
        extra["dtype"] = dtype
        if "gguf_file" in extra:
            import transformers

            if hasattr(
                transformers, "GgufConfig"
            ):  # from transformers 5 on, weights may stay packed otherwise
                extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        return kind.from_pretrained(place, **extra, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {model}: {kind.__name__} cannot load it: {error}") from error


def _new_modules(info: dict[str, Any]) -> list[str]:
    """Modules whose weights the checkpoint did not have."""
    keys = {
        *info.get("missing_keys", ()),
        *(k[0] if isinstance(k, (tuple, list)) else k for k in info.get("mismatched_keys", ())),
    }
    return sorted({key.rsplit(".", 1)[0] for key in keys if "." in key})


def _with_head(model: nn.Module, modules: list[str]) -> list[str]:
    """A classification head trains whole also where the checkpoint has one: its labels need not be
    these.
    """
    return sorted(
        {
            *modules,
            *(name for name in ("score", "classifier") if getattr(model, name, None) is not None),
        }
    )


class _TextTask(Task):
    tokenizer: Any

    def _tokenizer(self, model: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer = pretrained(AutoTokenizer, model, None)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise UserError(
                    f"--model {model}: its tokenizer has neither a padding nor an end token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _check_length(self, model: Any) -> None:
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.max_length > limit:
            raise UserError(
                f"--max-length {self.max_length}: this model takes {limit} tokens at the most"
            )

    def _encode(self, rows: list[Row]) -> Batch:
        texts = [str(row[self.columns.text]) for row in rows]
        return dict(
            self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class TextClassification(_TextTask):
    def required(self) -> list[str]:
        return [self.columns.text, self.columns.label]

    def prepare(self, rows: list[Row]) -> None:
        self.labels = labels_of(rows, self.columns.label)

    def load(self, model: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
        loaded, new = self._load(model, dtype)
        return loaded, _with_head(loaded, new)

    def load_trained(self, model: str) -> tuple[nn.Module, list[str]]:
        return self._load(model, torch.float32)

    def _load(self, model: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = self._tokenizer(model)
        names = dict(enumerate(self.labels))
        loaded, info = pretrained(
            AutoModelForSequenceClassification,
            model,
            dtype,
            num_labels=len(names),
            id2label=names,
            label2id={v: k for k, v in names.items()},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        loaded.config.pad_token_id = self.tokenizer.pad_token_id
        self._check_length(loaded)
        return loaded, _new_modules(info)

    def batch(self, rows: list[Row]) -> Batch:
        return {**self._encode(rows), "labels": self._label_ids(rows)}


class CausalLM(_TextTask):
    metric = "perplexity"

    def required(self) -> list[str]:
        return [self.columns.text]

    def load(self, model: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
        from transformers import AutoModelForCausalLM

        self.tokenizer = self._tokenizer(model)
        loaded, info = pretrained(AutoModelForCausalLM, model, dtype, output_loading_info=True)
        self._check_length(loaded)
        # a tied head is reported missing and is no new module
        tied = loaded.get_output_embeddings() if loaded.config.tie_word_embeddings else None
        names = {id(m): n for n, m in loaded.named_modules()}
        return loaded, [n for n in _new_modules(info) if n != names.get(id(tied))]

    def batch(self, rows: list[Row]) -> Batch:
        end = self.tokenizer.eos_token or ""
        batch = self._encode(
            [{**row, self.columns.text: str(row[self.columns.text]) + end} for row in rows]
        )
        return {
            **batch,
            "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100),
        }

    def weight(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: list[list[Row]], autocast: Any, device: torch.device
    ) -> float:
        model.eval()
        total = tokens = 0
        for rows in batches:
            batch = {key: value.to(device) for key, value in self.batch(rows).items()}
            predicted = self.weight(batch)
            with autocast():
                total += float(model(**batch).loss) * predicted
            tokens += predicted
        return math.exp(total / max(tokens, 1))


class ImageClassification(Task):
    unit = "images"

    def __init__(self, columns: Columns, max_length: int) -> None:
        super().__init__(columns, max_length)
        self.folder = Path()

    def required(self) -> list[str]:
        return [self.columns.image, self.columns.label]

    def prepare(self, rows: list[Row]) -> None:
        self.labels = labels_of(rows, self.columns.label)
        for number, row in enumerate(rows, 1):
            if (
                isinstance(row[self.columns.image], str)
                and not (self.folder / row[self.columns.image]).is_file()
            ):
                raise UserError(
                    f"row {number}: no image at {self.folder / row[self.columns.image]} (paths are"
                    " relative to the data file)"
                )

    def load(self, model: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
        loaded, new = self._load(model, dtype)
        return loaded, _with_head(loaded, new)

    def load_trained(self, model: str) -> tuple[nn.Module, list[str]]:
        return self._load(model, torch.float32)

    def _load(self, model: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.processor = pretrained(AutoImageProcessor, model, None)
        names = dict(enumerate(self.labels))
        loaded, info = pretrained(
            AutoModelForImageClassification,
            model,
            dtype,
            num_labels=len(names),
            id2label=names,
            label2id={v: k for k, v in names.items()},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        return loaded, _new_modules(info)

    def batch(self, rows: list[Row]) -> Batch:
        from PIL import Image

        images = [
            (
                Image.open(self.folder / r[self.columns.image])
                if isinstance(r[self.columns.image], str)
                else r[self.columns.image]
            )
            for r in rows
        ]
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt")[
            "pixel_values"
        ]
        return {"pixel_values": pixels, "labels": self._label_ids(rows)}

    def size(self, batch: Batch) -> int:
        return len(batch["pixel_values"])

    def length(self, row: Row) -> int:
        return 0

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)


TASKS = {
    "text-classification": TextClassification,
    "causal-lm": CausalLM,
    "image-classification": ImageClassification,
}
