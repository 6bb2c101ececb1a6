"""A recipe as transformers' TrainingArguments, or as TRL's SFTConfig for a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe, nearest

# What has a name of its own here: the recipe's key says it, and says it once.
_OWN = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "seed": "seed",
    "output_dir": "output",
    "use_cpu": "device",
    "no_cuda": "device",
    "dataset_text_field": "text_column",
    "activation_checkpointing": "gradient_checkpointing",
    **{key: key for key in ("bf16", "gradient_checkpointing", "max_length", "packing")},
}
# Read by the task, which makes the tokens.
OF_THE_TASK = ("chat_template_path", "completion_only_loss", "assistant_only_loss")
_MODELS_ONLY = {
    "model_init_kwargs": "the model is loaded here, by --model and --dtype",
    "formatting_func": "rows are read here, by --format",
    "dataset_kwargs": "rows are made into tokens here",
    "use_liger_kernel": "its fused loss reads the weight of lm_head past slices",
}


def kind_of(task: str) -> Any:
    """TrainingArguments, or SFTConfig for a language model."""
    if task != "causal-lm":
        from transformers import TrainingArguments

        return TrainingArguments
    try:
        from trl.trainer.sft_config import SFTConfig
    except ImportError as error:
        raise UserError(
            f"--task causal-lm needs TRL ({error}): pip install 'slicefine[train]'"
        ) from error
    return SFTConfig


def check_settings(recipe: Recipe) -> None:
    """Raise UserError for a setting that is no field, or that the recipe says by another name."""
    kind = kind_of(str(recipe.task))
    known = {item.name for item in fields(kind)}
    for name in recipe.training:
        if name in _OWN:
            raise UserError(
                f"--set {name}: it is called {_OWN[name]} here (--{_flag(name)})"
            )
        if name in _MODELS_ONLY:
            raise UserError(f"--set {name}: {_MODELS_ONLY[name]}")
        if name not in known:
            raise UserError(
                f"--set {name}: {kind.__name__} has no such field{nearest(name, known)}"
            )


def _flag(name: str) -> str:
    return _OWN[name].replace("_", "-")


def lonely_launch(environment: Mapping[str, str]) -> str | None:
    """What to say where ``accelerate launch`` was told to start several processes and started one.

    ``--cpu`` with ``--num_processes`` does that without a word, unless an MPI host file is given: it
    prepares an address for processes to meet at, and starts none.
    """
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    launched = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if not launched or "MASTER_ADDR" not in environment:
        return None
    if any(size in environment for size in sizes):
        return None
    return (
        "this is one process: accelerate launch --cpu starts no others, whatever --num_processes"
        " says. Several processes on a CPU: accelerate launch --multi_gpu --num_processes 2 -m"
        " slicefine train ..., or torchrun --nproc_per_node 2 -m slicefine train ..."
    )


def arguments(recipe: Recipe) -> Any:
    """The arguments of one run. Raises UserError for what they refuse, before a model is loaded."""
    check_settings(recipe)
    kind = kind_of(str(recipe.task))
    known = {item.name for item in fields(kind)}
    values = {**_values(recipe, known), **recipe.training}
    for name in OF_THE_TASK:
        values.pop(name, None)
    try:
        made = kind(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{kind.__name__} refuses these settings: {error}") from error
    # Trainer would wrap the model in nn.DataParallel where it sees several GPUs, whose copies of a
    # module do not know their slices; accelerate launch uses them all.
    if made.n_gpu > 1:
        # n_gpu is a property without a setter
        made._n_gpu = 1
    return made


def _values(recipe: Recipe, known: set[str]) -> dict[str, Any]:
    on_cpu = device_of(recipe.device).type == "cpu"
    values: dict[str, Any] = {
        "output_dir": recipe.output,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulate,
        "learning_rate": recipe.lr,
        "max_grad_norm": recipe.clip,
        "bf16": recipe.bf16,
        "seed": recipe.seed,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        # Trainer's default may be every tracker that is installed
        "report_to": "none",
        "logging_steps": 10,
        "save_strategy": "steps" if recipe.save_every else "no",
        "save_total_limit": 1,
        # SliceTraining looks at every loss itself, and stops
        "logging_nan_inf_filter": False,
        # every slice has a gradient in every step, or training is wrong
        "ddp_find_unused_parameters": False,
    }
    if recipe.save_every:
        values["save_steps"] = recipe.save_every
    values.update(_checkpointing(recipe.gradient_checkpointing, known))
    values.update(_warmup(recipe.warmup, known))
    if recipe.task == "causal-lm":
        values.update(_of_sft(recipe))
    else:
        # the collator makes batches of whole rows
        values["remove_unused_columns"] = False
    if recipe.early_stopping:
        # The best one can only be loaded where each evaluation has its checkpoint: one rhythm.
        given = recipe.training.get("eval_strategy", "epoch")
        values.update(eval_strategy=given, save_strategy=given, load_best_model_at_end=True)
        if "eval_steps" in recipe.training:
            values["save_steps"] = recipe.training["eval_steps"]
    return values


def _checkpointing(wanted: bool, known: set[str]) -> dict[str, Any]:
    # transformers 5's name and its older one, which TRL sets to True unless told otherwise
    name = "activation_checkpointing"
    if name not in known:
        name = "gradient_checkpointing"
    values: dict[str, Any] = {name: wanted}
    if wanted:
        # The reentrant kind gives no gradients to a layer whose input needs none, as behind frozen
        # embeddings.
        values[f"{name}_kwargs"] = {"use_reentrant": False}
    if name == "activation_checkpointing":
        values["gradient_checkpointing"] = None
    return values


def _warmup(share: float, known: set[str]) -> dict[str, float]:
    # transformers 5 takes a share as warmup_steps, 4 as warmup_ratio
    if "warmup_ratio" in known:
        return {"warmup_ratio": share}
    # there 1 and more are numbers of steps, so all of them is a share just below 1
    return {"warmup_steps": share if share < 1 else 0.999999}


def _of_sft(recipe: Recipe) -> dict[str, Any]:
    return {
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "eval_packing": False,
        # the task has left out what is not learned
        "completion_only_loss": False,
    }


def device_of(name: str | None) -> torch.device:
    """A device by its name; without one, CUDA where there is one. Raises UserError without it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        # torch takes any name that it knows: only an allocation shows whether there is one
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: {error}; `slicefine env` says what there is"
        ) from error
    return device


def check_device(name: str | None) -> None:
    """Raise UserError for a device that a training cannot be put on."""
    device = device_of(name)
    if name is not None and device.index is not None:
        raise UserError(
            f"--device {name}: a training takes cpu or cuda; choose a GPU with"
            f" CUDA_VISIBLE_DEVICES={device.index}"
        )
