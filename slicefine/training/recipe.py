"""A recipe: everything that one training is, as one YAML file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from slicefine.config import SliceConfig
from slicefine.groups import HEAD_LR, LR
from slicefine.training.chat import FORMS
from slicefine.training.data import UserError
from slicefine.training.tasks import TASKS, Columns

# The copy in the output folder.
RECIPE = "recipe.yaml"
Format = Literal["auto", "text", "messages", "conversations", "prompt", "instruction"]
# What may differ between a run that was interrupted and the one that goes on with it.
_FREE = {"output", "save_every", "device", "samples"}
_FREE_SETTINGS = re.compile(
    r"(logging|save|eval|report|push|hub|run_name|project|trackio|disable_tqdm|dataloader_num).*"
)


@dataclass
class Recipe:
    """One training. Every field is a key of the file, and an option of `slicefine train`.

    base: "nf4" or "int8", how the frozen weights are packed (--quantize). slices: a SliceConfig. training: any field of transformers' TrainingArguments, or of TRL's
    SFTConfig for a language model.
    """

    model: str | None = None
    task: str | None = None
    data: str | None = None
    output: str | None = None
    eval_data: str | None = None
    eval_share: float = 0.1
    text_column: str = "text"
    label_column: str = "label"
    image_column: str = "image"
    format: Format = "auto"
    max_length: int = 256
    packing: bool = False
    dtype: str = "auto"
    epochs: int = 3
    batch_size: int = 32
    accumulate: int = 1
    lr: float = LR
    head_lr: float = HEAD_LR
    warmup: float = 0.1
    clip: float = 1.0
    base: str | None = None
    bf16: bool = True
    optimizer_in_bwd: bool = False
    lean: bool = False
    gradient_checkpointing: bool = False
    early_stopping: int = 0
    seed: int | None = None
    device: str | None = None
    save_every: int = 0
    samples: int = 1
    slices: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_types()
        if not 0 <= self.eval_share <= 0.9:
            raise UserError(f"eval_share is {self.eval_share}; expected 0 to 0.9")
        for name in ("epochs", "batch_size", "accumulate", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("warmup", "clip", "early_stopping", "save_every", "samples"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.warmup > 1:
            raise UserError(
                f"warmup is {self.warmup}; expected a share of the steps, 0 to 1"
            )
        if not (self.lr >= 0 and self.head_lr >= 0):
            raise UserError(
                f"--lr is {self.lr} and --head-lr {self.head_lr}; expected 0 or more"
            )
        if self.optimizer_in_bwd and (self.clip > 0 or self.accumulate > 1):
            raise UserError(
                "--optimizer-in-bwd updates during backward, so it can neither clip nor accumulate:"
                " add --clip 0 --accumulate 1, or leave it out"
            )
        if self.format not in get_args(Format):
            raise UserError(
                f"format is {self.format!r}; expected one of auto, text, {_forms()}"
            )
        if self.task is not None and self.task not in TASKS:
            raise UserError(f"--task {self.task}: expected one of {', '.join(TASKS)}")
        if self.base not in (None, "nf4", "int8"):
            raise UserError(f"base is {self.base!r}; expected nf4 or int8 (--quantize)")
        if self.base is not None and self.task not in (None, "causal-lm"):
            raise UserError(
                f"--quantize {self.base} is for language models (--task causal-lm), not for"
                f" {self.task}"
            )
        config = self.slice_config()
        if self.base is not None and not config.keep_originals:
            raise UserError(
                f"--quantize {self.base} with keep_originals: false: what trains beside packed"
                " weights is written as a delta only, which needs the originals"
            )
        # One seed for all of it: where only the slices have one, that one.
        self.seed = config.seed

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value, hint = getattr(self, item.name), hints[item.name]
            setattr(self, item.name, _converted(item.name, value, hint))

    def slice_config(self) -> SliceConfig:
        """The `SliceConfig`; 0 as an interval is none. Raises UserError for what it does not take."""
        values = dict(self.slices)
        known = {item.name for item in fields(SliceConfig)}
        for key in values:
            _known(key, known, "slices has")
        if values.get("switch_interval") == 0:
            values["switch_interval"] = None
        if self.seed is not None:
            values["seed"] = self.seed
        try:
            return SliceConfig.from_dict(values)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    def columns(self) -> Columns:
        return Columns(self.text_column, self.label_column, self.image_column)

    def require(self, *names: str) -> None:
        """Raise UserError naming the first of the keys that is not given."""
        for name in names:
            if getattr(self, name) is None:
                raise UserError(f"no {name}: give --{name}, or {name}: in the recipe")

    def to_yaml(self) -> str:
        """The whole recipe with every default, as a file that gives the same training."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """What makes another run of this one, in words: "head_lr (saved 0.002, given 1.0)"."""
        mine, saved = self._identity(), other._identity()
        return [
            f"{key} (saved {saved.get(key)}, given {mine.get(key)})"
            for key in sorted({*mine, *saved})
            if mine.get(key) != saved.get(key)
        ]

    def _identity(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if key not in _FREE}
        slices, training = values.pop("slices"), values.pop("training")
        # how often something is logged or saved makes no other training
        kept = {k: v for k, v in training.items() if not _FREE_SETTINGS.fullmatch(k)}
        nested = {"slices": slices, "training": kept}
        flat = {
            f"{part}.{k}": v for part, inner in nested.items() for k, v in inner.items()
        }
        return {**values, **flat}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """A recipe from the content of a file.

        Raises:
            UserError: for a key that is none, with the nearest name, and for values that do not fit.
        """
        known = {item.name for item in fields(cls)}
        for key in values:
            _known(str(key), known, f"{where} has")
        for section in ("slices", "training"):
            if not isinstance(values.get(section, {}) or {}, Mapping):
                raise UserError(
                    f"{where}: {section} holds no keys; expected name: value lines"
                )
        given = {key: value for key, value in values.items() if value is not None}
        return cls(**{str(key): value for key, value in given.items()})

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe. Raises UserError if there is none that can be read."""
        return cls.from_dict(read_yaml(path), str(path))


def merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with other values over it; sections are merged key by key."""
    result = dict(base)
    for key, value in given.items():
        inside = result.get(key)
        both = isinstance(inside, Mapping) and isinstance(value, Mapping)
        result[key] = {**inside, **value} if both else value  # type: ignore[misc]
    return result


def settings_of(pairs: Iterable[str]) -> dict[str, Any]:
    """``name=value`` texts as a mapping; values are read as YAML, so lists and numbers work."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set {pair}: expected NAME=VALUE, such as logging_steps=5")
        settings[name.strip()] = _loaded(value, f"--set {pair}")
    return settings


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises UserError if there are none to be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    content = _loaded(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected lines like model: FOLDER_OR_ID")
    return content


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _known(key: str, known: set[str], where: str) -> None:
    if key not in known:
        hint = nearest(key, known) or f"; it takes {', '.join(sorted(known))}"
        raise UserError(f"{where} no key {key!r}{hint}")


def _forms() -> str:
    return ", ".join(FORMS)


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A value as its field has it: whole numbers are floats too; nothing else is changed."""
    if hint is Format or (value is None and type(None) in get_args(hint)):
        return value
    kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wrong_bool = isinstance(value, bool) and bool not in kinds
    if wrong_bool or not isinstance(value, kinds):
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise UserError(f"{name} is {value!r}; expected {wanted}")
    return value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``no`` is a text, 1e-3 a number; a key that stands twice is an error."""


# PyYAML reads YAML 1.1, where `no` is false and 1e-3, without a point, is a text.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool",
    re.compile(r"(true|True|TRUE|false|False|FALSE)$"),
    list("tTfF"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    # PyYAML would keep the last of two equal keys
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", node.value[i][0].start_mark
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _loaded(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not YAML ({error})") from error
