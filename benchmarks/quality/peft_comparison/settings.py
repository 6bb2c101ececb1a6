"""What a run is made of: a setting (model, task, training parameters) and an experiment (one
method), read from JSON.

The training parameters have the keys, meaning and defaults of PEFT's MetaMathQA comparison
(``PEFT_COMMIT``), so a file of either harness serves the other. Unknown keys, methods and
experiments raise ValueError with the nearest name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slicefine import SliceConfig

# huggingface/peft, method_comparison/MetaMathQA
PEFT_COMMIT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
HERE = Path(__file__).parent
EXPERIMENTS = HERE / "experiments"
SETTINGS = ("small", "official")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# must be told of every step, which a plain loop does not do
NEED_MORE = ("ADALORA", "ADAMSS")


@dataclass
class TrainParams:
    """PEFT's TrainConfig, key by key. optimizer_type: a class of torch.optim, "lora-fa", or
    "SliceAdamW".
    """

    model_id: str
    dtype: str
    max_seq_length: int
    batch_size: int
    batch_size_eval: int
    max_steps: int
    eval_steps: int
    compile: bool
    use_gc: bool
    query_template: str
    seed: int
    grad_norm_clip: float
    optimizer_type: str
    optimizer_kwargs: dict[str, Any]
    lr_scheduler: str | None
    use_amp: bool
    autocast_adapter_dtype: bool
    generation_kwargs: dict[str, Any]
    attn_implementation: str | None
    init_kv_cache_prefix: str | None

    def __post_init__(self) -> None:
        for name in (
            "max_seq_length",
            "batch_size",
            "batch_size_eval",
            "max_steps",
            "eval_steps",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.eval_steps > self.max_steps:
            raise ValueError(
                f"eval_steps is {self.eval_steps}, more than the {self.max_steps} of max_steps"
            )
        if self.grad_norm_clip < 0:
            raise ValueError(
                f"grad_norm_clip is {self.grad_norm_clip}; expected 0 (no clipping) or more"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype is {self.dtype!r}; this harness takes {', '.join(DTYPES)} (int8 and int4:"
                " PEFT's own)"
            )
        if self.optimizer_type not in ("lora-fa", "SliceAdamW") and not hasattr(
            torch.optim, self.optimizer_type
        ):
            raise ValueError(
                f"optimizer_type is {self.optimizer_type!r}; expected a class of torch.optim,"
                " 'lora-fa' or 'SliceAdamW'"
            )
        if self.lr_scheduler not in (None, "cosine"):
            raise ValueError(
                f"lr_scheduler is {self.lr_scheduler!r}; expected null or 'cosine'"
            )
        if "{query}" not in self.query_template:
            raise ValueError(
                f"query_template is {self.query_template!r}; it must contain {{query}}"
            )
        if self.init_kv_cache_prefix is not None:
            raise ValueError(
                "init_kv_cache_prefix is for prefix tuning, which this harness does not run;"
                " expected null"
            )


@dataclass
class ShortRun:
    """What else changes where a run is too short for the official settings; nothing does in the
    official one.

    peft_lr_factor: PEFT's learning rates are meant for 5,000 steps; those of peft's methods are
    multiplied by it. slice_switch_interval: replaces that of slice configs, or a short run would
    end before the first move.
    """

    peft_lr_factor: float = 1.0
    slice_switch_interval: int | None = None


@dataclass
class Setting:
    name: str
    task: str
    training_params: dict[str, Any]
    short_run: ShortRun


@dataclass
class Experiment:
    """One method, its config and the parameters of its training. kind: "slice", "peft" or "full"
    (no config file).
    """

    name: str
    kind: str
    params: TrainParams
    slice_config: SliceConfig | None = None
    peft_values: dict[str, Any] | None = None

    def config_dict(self) -> dict[str, Any] | None:
        """What the result file says of the method: under "peft_config", as PEFT's tables look there
        for "peft_type".
        """
        return (
            None
            if self.slice_config is None
            else {"peft_type": "SLICE", **self.slice_config.to_dict()}
        )


def load_setting(name: str) -> Setting:
    """small.json or official.json of this folder, or the path of another such file."""
    path = Path(name) if name.endswith(".json") else HERE / f"{name}.json"
    if not path.exists():
        raise ValueError(
            f"no setting {name!r}; expected one of {', '.join(SETTINGS)} or the path of a .json"
            " file"
        )
    values = _read(path)
    _known_keys(
        values, [f.name for f in dataclasses.fields(Setting) if f.name != "name"], path
    )
    short = values.get("short_run", {})
    _known_keys(short, [f.name for f in dataclasses.fields(ShortRun)], path)
    return Setting(path.stem, values["task"], values["training_params"], ShortRun(**short))


def experiment_names(folder: Path = EXPERIMENTS) -> list[str]:
    files = [*folder.glob("*/*/*_config.json"), *folder.glob("*/*/training_params.json")]
    return sorted({file.parent.relative_to(folder).as_posix() for file in files})


def load_experiment(
    name: str, setting: Setting, max_steps: int | None = None, folder: Path = EXPERIMENTS
) -> Experiment:
    """One experiment under a setting.

    name: "method/variant", a folder with slice_config.json or PEFT's adapter_config.json (neither:
    full fine-tuning) and perhaps training_params.json, whose keys replace the setting's. max_steps:
    shortens the run; eval_steps follows where it would be longer. Raises ValueError for unknown
    experiments, methods and keys.
    """
    names = experiment_names(folder)
    if name not in names:
        raise ValueError(
            f"no experiment {name!r}{_hint(name, names)}; there are: {', '.join(names)}"
        )
    here = folder / name
    values = dict(setting.training_params)
    if (here / "training_params.json").exists():
        values |= _read(here / "training_params.json")
    keys = [f.name for f in dataclasses.fields(TrainParams)]
    _known_keys(values, keys, here / "training_params.json")
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"setting {setting.name!r} lacks {', '.join(missing)}")
    if max_steps is not None:
        values["max_steps"], values["eval_steps"] = (
            max_steps,
            min(values["eval_steps"], max_steps),
        )
    params = TrainParams(**values)
    if (here / "slice_config.json").exists():
        config = _slice_config(here / "slice_config.json", setting)
        return Experiment(name, "slice", params, slice_config=config)
    if not (here / "adapter_config.json").exists():
        return Experiment(name, "full", params)
    kwargs = dict(params.optimizer_kwargs)
    kwargs["lr"] *= setting.short_run.peft_lr_factor
    params = dataclasses.replace(params, optimizer_kwargs=kwargs)
    return Experiment(
        name, "peft", params, peft_values=_peft_values(here / "adapter_config.json")
    )


def _slice_config(path: Path, setting: Setting) -> SliceConfig:
    values = _read(path)
    _known_keys(values, [f.name for f in dataclasses.fields(SliceConfig)], path)
    config = SliceConfig(**values)
    interval = setting.short_run.slice_switch_interval
    if interval is not None and config.switch_interval is not None:
        config.switch_interval = interval
    return config


def _peft_values(path: Path) -> dict[str, Any]:
    """An adapter_config.json, its method and keys checked against the peft that is installed."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known

    values = _read(path)
    methods, method = [str(m.value) for m in known], values.get("peft_type")
    if method not in methods:
        raise ValueError(
            f"{path}: peft_type is {method!r}{_hint(str(method), methods)}; peft has"
            f" {', '.join(methods)}"
        )
    if method in NEED_MORE:
        raise ValueError(
            f"{path}: {method} needs a call after every step, which this plain loop does not make"
        )
    _known_keys(
        values, [f.name for f in dataclasses.fields(peft_config_class(method))], path
    )
    return values


def peft_config_class(method: str) -> Any:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object")
    return values


def _known_keys(values: dict[str, Any], known: list[str], path: Path) -> None:
    for key in values:
        if key not in known:
            raise ValueError(
                f"{path}: unknown key {key!r}{_hint(key, known)}; expected some of"
                f" {', '.join(known)}"
            )


def _hint(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
