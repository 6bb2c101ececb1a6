"""What slicefine needs of Hugging Face transformers."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import transformers.masking_utils
from torch import nn
from transformers.pytorch_utils import Conv1D

from slicefine.linear import SliceLinear
from slicefine.optim import SliceAdamW, load_slice_state_dict, slice_state_dict
from slicefine.plan.estimate import Workload


def conv1d(out_features: int, in_features: int) -> nn.Module:
    """An empty Conv1D, transformers' linear layer with weight (in, out), on the meta device."""
    with torch.device("meta"):
        return Conv1D(out_features, in_features)


# What a configuration is trained as: its own architecture if it names one of these, else the first
# that exists for it, a
# classifier before a language model for encoders.
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
)


def workload(model: str, dtype: torch.dtype) -> Workload:
    """A `slicefine.plan.estimate.Workload` from a configuration alone: no weights are read.

    model: a config.json, a folder that holds one, or an id of the hub (whose configuration is
        downloaded).
    Raises ValueError for a configuration that no auto class takes.
    """
    path = Path(model)
    source = str(path.parent if path.is_file() else path if path.is_dir() else model)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model!r} is no config.json, no folder that holds one, and no id whose configuration"
            f" can be read: {error}"
        ) from error
    return workload_of(config, model, dtype)


def workload_of(config: Any, name: str, dtype: torch.dtype, auto: str | None = None) -> Workload:
    """A `slicefine.plan.estimate.Workload` of a configuration that is at hand, such as a loaded
    model's.

    auto: name of the auto class that it is trained as, of those in _AUTO; by the configuration
        unless given.
    """
    kind = _auto_class(config) if auto is None else getattr(transformers, auto)
    attention = "sdpa"

    def build() -> nn.Module:
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype, attn_implementation=attention)

    image = kind is transformers.AutoModelForImageClassification
    return Workload(
        name,
        build,
        _image_inputs(config, dtype) if image else _text_inputs(kind),
        lambda output, inputs: output.loss,
        _first_features,
        None if image else config.get_text_config().vocab_size,
        _one_sequence_in_a_row,
    )


def _one_sequence_in_a_row() -> AbstractContextManager[Any]:
    """transformers looks at positions for several sequences packed into a row; it finds none in
    ordinary batches, and then needs no
    attention mask. Fake tensors have no values to look at, and it would play safe with masks and
    copies of keys and values.
    """
    return mock.patch.object(
        transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None
    )


def _auto_class(config: Any) -> Any:
    ending = {name: getattr(transformers, name) for name in _AUTO}
    for architecture in getattr(config, "architectures", None) or ():
        for name, auto in ending.items():
            if architecture.endswith(name.removeprefix("AutoModel")):
                return auto
    encoder = (
        type(config) in transformers.AutoModelForMaskedLM._model_mapping
    )  # many can decode too; few do
    for auto in list(ending.values())[1 if encoder else 0 :]:
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(
        f"a {type(config).__name__} is for none of {', '.join(_AUTO)}; plan takes causal language"
        " models and classifiers of text or images"
    )


def _text_inputs(auto: Any) -> Any:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = torch.zeros(batch, length, dtype=torch.int64)
        labels = (
            ids
            if auto is transformers.AutoModelForCausalLM
            else torch.zeros(batch, dtype=torch.int64)
        )
        return {"input_ids": ids, "labels": labels}

    return inputs


def _image_inputs(config: Any, dtype: torch.dtype) -> Any:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        pixels = torch.zeros(batch, getattr(config, "num_channels", 3), size, size, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.int64)}

    return inputs


def _first_features(model: Any) -> nn.Module:
    """The module whose output is the first hidden state: word embeddings, or an image's patches."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return next(m for m in model.modules() if isinstance(m, nn.Conv2d))


class SliceCallback(transformers.TrainerCallback):
    """Optional callback of Trainer, for logs and for checkpoints with an optimizer other than
    SliceAdamW.

    Every log gains ``slice_coverage`` (share of the sliced weights' entries that has trained, 0 to
    1), ``slice_moves`` (of the layer that
    moved most often) and ``slice_grad_norm`` (of all trained parameters at the last optimizer step,
    after clipping). SliceAdamW's checkpoints hold
    the slices; for Trainer's own optimizers they are written beside them (slices.pt) and read back
    on resume. Training needs no callback.
    """

    FILE = "slices.pt"

    def __init__(self) -> None:
        self._norm: torch.Tensor | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        layers = [m for m in model.modules() if isinstance(m, SliceLinear)]
        if not layers:
            warnings.warn(
                "SliceCallback: the model has no slices; call get_slice_model(model, ...) first",
                stacklevel=2,
            )
        if not state.global_step or _holds_slices(optimizer):
            return
        path = _checkpoint(args, state) / self.FILE
        if path.exists():
            load_slice_state_dict(model, torch.load(path, map_location="cpu", weights_only=True))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        gradients = [
            p.grad for p in model.parameters() if p.requires_grad and type(p.grad) is torch.Tensor
        ]
        self._norm = torch.nn.utils.get_total_norm(gradients) if gradients else None

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any
    ) -> None:
        layers = (
            [m for m in model.modules() if isinstance(m, SliceLinear)] if model is not None else []
        )
        if not layers or logs is None:
            return
        sizes = [(m.out_features * m.in_features, m.schedule.coverage()) for m in layers]
        extra = {
            "slice_coverage": sum(n * share for n, share in sizes) / sum(n for n, _ in sizes),
            "slice_moves": max(m.schedule.moves for m in layers),
        }
        if self._norm is not None:
            extra["slice_grad_norm"] = float(self._norm)
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)  # Trainer has written its copy of ``logs`` already

    def on_save(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if _holds_slices(optimizer) or not state.is_world_process_zero:
            return
        folder = _checkpoint(args, state)
        if folder.is_dir():
            temporary = folder / (self.FILE + ".tmp")
            torch.save(slice_state_dict(model), temporary)
            os.replace(temporary, folder / self.FILE)


def _holds_slices(optimizer: Any) -> bool:
    """Whether the optimizer's own state holds the slices; Accelerate wraps it."""
    return isinstance(getattr(optimizer, "optimizer", optimizer), SliceAdamW)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
