"""What a step of a model feeds it, from Hugging Face's configuration alone.

Image models by their names in timm are in `slicefine.plan.timm`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import transformers
import transformers.masking_utils
from torch import nn

from slicefine.plan.estimate import DTYPES, Workload

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

    model: a configuration file of any name, a folder that holds a config.json, or an id of the hub
    (whose configuration is downloaded). Raises ValueError for a configuration that no auto class
    takes.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model!r} is no config.json, no folder that holds one, and no id whose configuration"
            f" can be read: {error}"
        ) from error
    return workload_of(config, model, dtype)


def workload_of(
    config: Any, name: str, dtype: torch.dtype, auto: str | None = None
) -> Workload:
    """A `slicefine.plan.estimate.Workload` of a configuration that is at hand, such as a loaded
    model's.

    auto: name of the auto class that it is trained as, of those in _AUTO; by the configuration
        unless given.
    """
    kind = _auto_class(config) if auto is None else getattr(transformers, auto)

    def build() -> nn.Module:
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype)

    image = kind is transformers.AutoModelForImageClassification
    return Workload(
        name,
        build,
        _image_inputs(config, dtype) if image else _text_inputs(kind),
        lambda output, inputs: output.loss,
        _first_features,
        None if image else config.get_text_config().vocab_size,
        _one_sequence_in_a_row,
        base=DTYPES[dtype],
    )


def _one_sequence_in_a_row() -> AbstractContextManager[Any]:
    """transformers looks at positions for several sequences packed into a row; it finds none in
    ordinary batches, and then needs no attention mask. Fake tensors have no values to look at, and
    it would play safe with masks and copies of keys and values.
    """
    return mock.patch.object(
        transformers.masking_utils,
        "find_packed_sequence_indices",
        lambda position_ids: None,
    )


def _auto_class(config: Any) -> Any:
    ending = {name: getattr(transformers, name) for name in _AUTO}
    # the class that the checkpoint was saved from, by the end of its name
    for architecture in getattr(config, "architectures", None) or ():
        for name, auto in ending.items():
            if architecture.endswith(name.removeprefix("AutoModel")):
                return auto
    # many can decode too; few do
    encoder = type(config) in transformers.AutoModelForMaskedLM._model_mapping
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
        size = (
            config.image_size
            if isinstance(config.image_size, int)
            else config.image_size[0]
        )
        pixels = torch.zeros(
            batch, getattr(config, "num_channels", 3), size, size, dtype=dtype
        )
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.int64)}

    return inputs


def _first_features(model: Any) -> nn.Module:
    """The module whose output is the first hidden state: word embeddings, or an image's patches."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return next(m for m in model.modules() if isinstance(m, nn.Conv2d))
