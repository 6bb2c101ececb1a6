"""The tasks of `slicefine train`: how a row becomes a batch, which model takes it, how it is scored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.training.chat import Chat, Example, Rendered, example_of, form_of
from slicefine.training.data import (
    Row,
    UserError,
    check_texts,
    label_name,
    labels_of,
    text_in,
)
from slicefine.training.loading import (
    Dtype,
    new_modules,
    numbering,
    packing,
    pretrained,
    with_head,
)

Batch = dict[str, Tensor]


@dataclass
class Columns:
    text: str = "text"
    label: str = "label"
    image: str = "image"


class Task:
    """How a row becomes a batch, which model takes it, how it is scored.

    metric: of `evaluate`. columns: names of the columns that a row is read from. max_length: tokens.
    labels: of a classification, in the order of the classes.
    """

    metric = "accuracy"

    def __init__(self, columns: Columns, max_length: int) -> None:
        self.columns, self.max_length = columns, max_length
        self.labels: list[str] = []
        # what was done to rows, for the user to read
        self.notes: list[str] = []

    def required(self) -> list[str]:
        raise NotImplementedError

    def prepare(self, rows: list[Row]) -> None:
        """Look at the training rows before anything large is loaded."""

    def check(self, rows: list[Row], what: str = "--data") -> None:
        """Raise UserError for the first row, of training or evaluation, that cannot be used."""

    def check_labels(self, rows: list[Row]) -> None:
        """Raise UserError for a label that the training rows do not have."""
        if self.labels:
            self._label_ids(rows)

    def load_inputs(self, model: str) -> None:
        """The tokenizer or processor of a model, once; it is small beside the weights."""
        raise NotImplementedError

    def load(self, model: str, dtype: Dtype) -> tuple[nn.Module, list[str]]:
        """(model, names of its modules that are newly initialized)."""
        raise NotImplementedError

    def config_of(self, model: Any) -> dict[str, Any]:
        """What the model's configuration has for this task and its base's need not have;
        from_pretrained takes it.
        """
        if not self.labels:
            return {}
        names = dict(enumerate(self.labels))
        known = {
            key: getattr(model.config, key, None)
            for key in ("pad_token_id", "problem_type")
        }
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

    def dataset(self, rows: list[Row], what: str = "--data") -> Any:
        """Rows as Trainer takes them: token ids or rows, each what the collator makes batches of."""
        raise NotImplementedError

    def length(self, row: Row) -> int:
        """What batches are sorted by, to pad little."""
        return len(str(row[self.columns.text]))

    def save(self, folder: Path) -> None:
        """Tokenizer or processor, beside the model."""

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: list[list[Row]],
        autocast: Any,
        device: torch.device,
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
        names = [label_name(row[self.columns.label]) for row in rows]
        unknown = set(names) - index.keys()
        if unknown:
            raise UserError(
                f"label {sorted(unknown)[0]!r} does not occur in the training rows; known:"
                f" {', '.join(self.labels[:20])}"
            )
        return torch.tensor([index[name] for name in names])


class _TextTask(Task):
    tokenizer: Any = None

    def load_inputs(self, model: str) -> None:
        if self.tokenizer is None:
            self.tokenizer = self._tokenizer(model)

    def _tokenizer(self, model: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer = pretrained(AutoTokenizer, model, None)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise UserError(
                    f"--model {model}: its tokenizer has neither a padding nor an end token"
                )
            # Padding is masked, so any token will do; GPT-2 and others have none for it.
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _check_length(self, model: Any) -> None:
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.max_length > limit:
            raise UserError(
                f"--max-length {self.max_length}: this model takes {limit} tokens at the most"
            )

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class TextClassification(_TextTask):
    def required(self) -> list[str]:
        return [self.columns.text, self.columns.label]

    def prepare(self, rows: list[Row]) -> None:
        self.check(rows)
        self.labels = labels_of(rows, self.columns.label)

    def check(self, rows: list[Row], what: str = "--data") -> None:
        check_texts(rows, self.columns.text, what)

    def load(self, model: str, dtype: Dtype) -> tuple[nn.Module, list[str]]:
        self.labels = numbering(self.labels, model)
        loaded, new = self._load(model, dtype)
        return loaded, with_head(loaded, new)

    def load_trained(self, model: str) -> tuple[nn.Module, list[str]]:
        return self._load(model, torch.float32)

    def _load(self, model: str, dtype: Dtype) -> tuple[nn.Module, list[str]]:
        from transformers import AutoModelForSequenceClassification

        self.load_inputs(model)
        loaded, info = _classifier(
            AutoModelForSequenceClassification, model, dtype, self.labels
        )
        # a decoder's classifier reads the last token before the padding, which it finds by this id
        loaded.config.pad_token_id = self.tokenizer.pad_token_id
        self._check_length(loaded)
        return loaded, new_modules(info)

    def batch(self, rows: list[Row]) -> Batch:
        texts = [text_in(row, self.columns.text, "a row") for row in rows]
        encoded = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {**encoded, "labels": self._label_ids(rows)}

    def dataset(self, rows: list[Row], what: str = "--data") -> list[dict[str, Any]]:
        texts = [row[self.columns.text] for row in rows]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        labels = self._label_ids(rows).tolist()
        keys = list(encoded)
        return [
            {**{key: encoded[key][i] for key in keys}, "labels": label}
            for i, label in enumerate(labels)
        ]


class CausalLM(_TextTask):
    """Texts, prompts with completions, or conversations (`slicefine.training.chat`).

    form: of the rows; found by `prepare` where it is None. answers_only: whether prompts and what
    others than the assistant say are left out of the loss. chat_template: a .jinja file that takes
    the place of the tokenizer's. base: how the weights are packed while they are read, on device.
    """

    metric = "perplexity"

    def __init__(self, columns: Columns, max_length: int) -> None:
        super().__init__(columns, max_length)
        self.form: str | None = None
        self.answers_only = True
        self.chat_template: str | None = None
        self.chat: Chat | None = None
        self.base: str | None = None
        self.device: Any = "cpu"

    def required(self) -> list[str]:
        return []

    def prepare(self, rows: list[Row]) -> None:
        if self.form is None:
            self.form = form_of(rows[0], self.columns.text)
        self.check(rows)

    def check(self, rows: list[Row], what: str = "--data") -> None:
        for number, row in enumerate(rows, 1):
            self._example(row, f"{what}: row {number}")

    def _example(self, row: Row, where: str) -> Example:
        form = self.form or form_of(row, self.columns.text)
        return example_of(row, form, self.columns.text, where)

    def _tokenizer(self, model: str) -> Any:
        tokenizer = super()._tokenizer(model)
        if self.chat_template is not None:
            try:
                tokenizer.chat_template = Path(self.chat_template).read_text(
                    encoding="utf-8"
                )
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"chat_template_path {self.chat_template}: {error}"
                ) from error
        if not tokenizer.is_fast:
            raise UserError(
                f"--model {model}: its tokenizer is not a fast one, and cannot tell which tokens"
                " belong to an answer; save one with AutoTokenizer and tokenizer.json"
            )
        self.chat = Chat(tokenizer)
        return tokenizer

    def load(self, model: str, dtype: Dtype) -> tuple[nn.Module, list[str]]:
        from transformers import AutoModelForCausalLM

        self.load_inputs(model)
        loaded, info = pretrained(
            AutoModelForCausalLM,
            model,
            dtype,
            output_loading_info=True,
            **packing(self.base, dtype, self.device, model),
        )
        self._check_length(loaded)
        # a tied head is reported missing and is no new module
        tied = loaded.get_output_embeddings() if loaded.config.tie_word_embeddings else None
        names = {id(m): n for n, m in loaded.named_modules()}
        return loaded, [n for n in new_modules(info) if n != names.get(id(tied))]

    def rendered(self, row: Row, where: str = "a row") -> Rendered:
        assert self.chat is not None
        return self.chat.render(self._example(row, where), self.answers_only, where)

    def prompt(self, row: Row) -> str:
        """What the model is asked in a row, as its text; "" for a plain text."""
        assert self.chat is not None
        return self.chat.prompt_of(self._example(row, "a row"), "a row")

    def encode(self, row: Row, where: str = "a row") -> tuple[list[int], list[int], bool]:
        """(token ids, labels with -100 where nothing is learned, whether the row was cut)."""
        rendered = self.rendered(row, where)
        encoded = self.tokenizer(
            rendered.text,
            add_special_tokens=rendered.special_tokens,
            return_offsets_mapping=True,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if rendered.whole:
            labels = list(ids)
        else:
            # A token across the edge of a part belongs to the one in which it starts.
            learned = [any(a <= s < b for a, b in rendered.spans) for s, _ in offsets]
            # special tokens that the tokenizer adds stand at (0, 0)
            empty = [start == end for start, end in offsets]
            pairs = zip(ids, learned, empty, strict=True)
            labels = [i if yes and not no else -100 for i, yes, no in pairs]
        cut = len(ids) > self.max_length
        return ids[: self.max_length], labels[: self.max_length], cut

    def dataset(self, rows: list[Row], what: str = "--data") -> Any:
        """Token ids and labels, without the rows in which nothing is left to learn.

        Raises:
            UserError: if there is nothing to learn in any of them.
        """
        import datasets  # pyright: ignore[reportMissingImports]

        encoded = [self.encode(row, f"{what}: row {i}") for i, row in enumerate(rows, 1)]
        # the first token is predicted from nothing
        kept = [
            i
            for i, (_, labels, _) in enumerate(encoded)
            if any(x != -100 for x in labels[1:])
        ]
        if not kept:
            raise UserError(
                f"{what}: no row has anything to predict within --max-length {self.max_length}"
                " tokens; raise it, or look at the rows"
            )
        self.notes += _notes(what, self.max_length, encoded, kept)
        columns = {
            "input_ids": [encoded[i][0] for i in kept],
            "labels": [encoded[i][1] for i in kept],
        }
        return datasets.Dataset.from_dict(columns)

    def batch(self, rows: list[Row]) -> Batch:
        encoded = [self.encode(row) for row in rows]
        width = max(len(ids) for ids, _, _ in encoded)
        left = self.tokenizer.padding_side == "left"

        def padded(values: list[int], fill: int) -> list[int]:
            more = [fill] * (width - len(values))
            return more + values if left else values + more

        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([padded(ids, pad) for ids, _, _ in encoded]),
            "attention_mask": torch.tensor(
                [padded([1] * len(ids), 0) for ids, _, _ in encoded]
            ),
            "labels": torch.tensor([padded(labels, -100) for _, labels, _ in encoded]),
        }

    def length(self, row: Row) -> int:
        return len(self.rendered(row).text)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batches: list[list[Row]],
        autocast: Any,
        device: torch.device,
    ) -> float:
        model.eval()
        total = tokens = 0
        for rows in batches:
            batch = {key: value.to(device) for key, value in self.batch(rows).items()}
            predicted = int((batch["labels"][:, 1:] != -100).sum())
            if predicted == 0:
                continue
            with autocast():
                # The loss is a mean over the predicted tokens; batches differ in their number.
                total += float(model(**batch).loss) * predicted
            tokens += predicted
        mean = total / max(tokens, 1)
        # exp overflows beyond; a model as bad as that has no perplexity to speak of
        return math.exp(mean) if mean < 700 else math.inf


def _notes(
    what: str,
    limit: int,
    encoded: list[Any],
    kept: list[int],
) -> list[str]:
    """What was done to rows, for the user to read."""
    cut = [i for i, row in enumerate(encoded, 1) if row[2]]
    left_out = sorted(set(range(1, len(encoded) + 1)) - {i + 1 for i in kept})
    total, notes = len(encoded), []
    if cut:
        notes.append(
            f"{what}: {len(cut)} of {total} rows are longer than --max-length {limit} tokens and"
            f" are cut (the first is row {cut[0]})"
        )
    if left_out:
        notes.append(
            f"{what}: {len(left_out)} of {total} rows have nothing to learn within --max-length"
            f" {limit} tokens and are left out (the first is row {left_out[0]})"
        )
    return notes


class ImageClassification(Task):
    processor: Any = None

    def __init__(self, columns: Columns, max_length: int) -> None:
        super().__init__(columns, max_length)
        self.folder = Path()

    def required(self) -> list[str]:
        return [self.columns.image, self.columns.label]

    def prepare(self, rows: list[Row]) -> None:
        self.labels = labels_of(rows, self.columns.label)
        self.check(rows)

    def check(self, rows: list[Row], what: str = "--data") -> None:
        from PIL import Image

        for number, row in enumerate(rows, 1):
            image = row[self.columns.image]
            if isinstance(image, str) and not (self.folder / image).is_file():
                raise UserError(
                    f"row {number}: no image at {self.folder / image} (paths are relative to the"
                    " data file)"
                )
            if not isinstance(image, str | Image.Image):
                raise UserError(
                    f"{what}: row {number}, column {self.columns.image!r} holds a"
                    f" {type(image).__name__}; expected an image or its path"
                )

    def load_inputs(self, model: str) -> None:
        from transformers import AutoImageProcessor

        if self.processor is None:
            self.processor = pretrained(AutoImageProcessor, model, None)

    def load(self, model: str, dtype: Dtype) -> tuple[nn.Module, list[str]]:
        self.labels = numbering(self.labels, model)
        loaded, new = self._load(model, dtype)
        return loaded, with_head(loaded, new)

    def load_trained(self, model: str) -> tuple[nn.Module, list[str]]:
        return self._load(model, torch.float32)

    def _load(self, model: str, dtype: Dtype) -> tuple[nn.Module, list[str]]:
        from transformers import AutoModelForImageClassification

        self.load_inputs(model)
        loaded, info = _classifier(
            AutoModelForImageClassification, model, dtype, self.labels
        )
        return loaded, new_modules(info)

    def batch(self, rows: list[Row]) -> Batch:
        images = [self._image(row[self.columns.image]) for row in rows]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": self._label_ids(rows)}

    def _image(self, image: Any) -> Any:
        from PIL import Image, UnidentifiedImageError

        if not isinstance(image, str):
            # a processor takes three channels: gray images have one, those with alpha four
            return image.convert("RGB")
        try:
            with Image.open(self.folder / image) as opened:
                return opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(
                f"{self.folder / image} cannot be read as an image: {error}"
            ) from error

    def dataset(self, rows: list[Row], what: str = "--data") -> list[Row]:
        """The rows themselves: images are read when their batch is made."""
        return rows

    def length(self, row: Row) -> int:
        return 0

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)


def _classifier(
    kind: Any,
    model: str,
    dtype: Dtype,
    labels: list[str],
) -> tuple[Any, Any]:
    """(a classifier of these labels, what was loaded of it)."""
    names = dict(enumerate(labels))
    loaded, info = pretrained(
        kind,
        model,
        dtype,
        num_labels=len(names),
        id2label=names,
        label2id={v: k for k, v in names.items()},
        # a head of another number of classes is drawn anew instead of refused
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # else transformers guesses it from the number of labels, and one label is a regression
    loaded.config.problem_type = "single_label_classification"
    return loaded, info


TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "causal-lm": CausalLM,
    "image-classification": ImageClassification,
}
