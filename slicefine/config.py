"""SliceConfig: everything that can be chosen about a fine-tune, validated, to and from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from slicefine.slices import (
    SLICE_TYPES,
    STATE_POLICIES,
    SWITCH_MODES,
    SliceType,
    StatePolicy,
    SwitchMode,
)

BiasMode = Literal["none", "all", "slice_only"]
NormMode = Literal["none", "torch", "all"]
TiedMode = Literal["skip", "share"]
UnusedMode = Literal["error", "warn", "ignore"]
UNUSED_MODES: tuple[str, ...] = get_args(UnusedMode)
BIAS_MODES: tuple[str, ...] = get_args(BiasMode)
NORM_MODES: tuple[str, ...] = get_args(NormMode)
TIED_MODES: tuple[str, ...] = get_args(TiedMode)
# fields that take names; those of the second group take a regular expression instead, too
_NAMES = ("target_parameters", "modules_to_save")
_NAMES_OR_REGEX = ("target_modules", "exclude_modules", "layers_pattern")
# docs/quality.md
DEFAULT_R, NARROW = 64, 4
# what to_dict has always written; a dict by hand seldom has all of it
_WRITTEN_BEFORE_NORMS = {"r", "slice_type", "contiguous", "bias", "seed"}


@dataclass
class SliceConfig:
    """How the linear layers of a model become slices.

    Names follow PEFT's configs where the meaning is the same.

    Args:
        r: width of a slice, in features. None, the default, is 64, and in a layer of fewer than 256
            features a quarter of them. With "all-linear", a layer that is narrower than a given r
            trains all of its features.
        slice_type: "column" (input features; takes the least memory), "row" (output features),
            "block" (both) or "row_column" (alternating).
        r_out: height of a block, in output features; None means r.
        switch_interval: optimizer steps between two moves; None never moves.
        switch_mode: order of positions. "ascending", "descending", "random" (each position once a
            sweep), "fixed", or the highest score first: "gradient" (Frobenius norm of the slice's
            gradient in the step before the move; that step keeps the whole layer input) or
            "magnitude" (Frobenius norm of the slice's weights).
        start_position: index of the first position, 0 to ceil(features / r) - 1.
        contiguous: a slice is a run of neighboring features; False, the default, scatters it by a
            seeded permutation, another one in each layer. Runs put the same features of the
            residual stream into every layer.
        pool: beside a quantized (packed) weight, how many input features the slice moves between:
            the first ones, or scattered ones with contiguous=False. What has trained there is kept
            in 16 bits, so all features would cost more than the packed weight. None is 128, or r
            where that is larger. It means nothing where the weight is not quantized.
        state_on_switch: what happens to the optimizer state of a slice at a move: "reset" to zero,
            "keep" it for the new slice, or "remember" it on the host and restore it when the slice
            comes back. Alternating axes cannot "keep": they reset.
        target_modules: names or suffixes (a list), a regular expression for the whole name (a
            string), or "all-linear": every linear layer except the output head.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        target_parameters: names or suffixes of parameters that a module uses without a linear
            layer, beside target_modules ([] for none of those): experts of shape (experts, out,
            in), as in transformers 5 (column slices), or a projection of nn.MultiheadAttention.
        layers_to_transform: layer numbers to which a list of target_modules is restricted.
        layers_pattern: name of the list of layers that layers_to_transform counts; None or "" is
            any.
        modules_to_save: modules that are fully trained. None, the default, is the output head of a
            classifier where "all-linear" finds one: a new head has nothing to keep. A list names
            them all, so [] leaves the head frozen. The head of a language model is not new and
            stays frozen.
        rank_pattern: module name or regular expression -> another r.
        bias: which biases train too: "none", "all", or "slice_only", the default (those of the
            sliced layers, but for float16, of which torch's GradScaler takes no gradients).
        norms: which normalization layers train too: "torch", the default (those of torch.nn: they
            keep their input for the backward pass anyway, so that training them takes no more
            memory), "all" (also those written in Python, as LlamaRMSNorm, which keep another copy
            of the hidden states), or "none". "torch" leaves out float16, as bias does.
        fan_in_fan_out: expected storage of the weights: True for Hugging Face's Conv1D, which
            stores (in, out). It is found out per layer; a value that contradicts the model warns.
        tied_weights: "skip" layers whose weight another module uses too (with a warning), or
            "share" one slice between them.
        keep_originals: keep what stood in every visited slice, in the weight's dtype on the host;
            revert, disable_adapter and deltas need it. After a whole sweep that is a copy of the
            weights; False saves it.
        unused_slices: slices that have not trained after 3 steps, such as of a weight that a fused
            loss reads without calling the layer: an "error" that names them, "warn", or "ignore".
            An output that does not reach the loss, as of an unused pooler, warns, unless most do
            not; layers without a call, as experts, may be idle for 100 steps.
        seed: of random orders and scattered features.

    Raises:
        ValueError: a value is not one of those above.
        TypeError: a value is of the wrong type.
    """

    r: int | None = None
    slice_type: SliceType = "column"
    r_out: int | None = None
    switch_interval: int | None = 100
    switch_mode: SwitchMode = "ascending"
    start_position: int = 0
    contiguous: bool = False
    pool: int | None = None
    state_on_switch: StatePolicy = "reset"
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bias: BiasMode = "slice_only"
    norms: NormMode = "torch"
    fan_in_fan_out: bool = False
    tied_weights: TiedMode = "skip"
    keep_originals: bool = True
    unused_slices: UnusedMode = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("slice_type", self.slice_type, SLICE_TYPES)
        _one_of("switch_mode", self.switch_mode, SWITCH_MODES)
        _one_of("state_on_switch", self.state_on_switch, STATE_POLICIES)
        _one_of("bias", self.bias, BIAS_MODES)
        _one_of("norms", self.norms, NORM_MODES)
        _one_of("unused_slices", self.unused_slices, UNUSED_MODES)
        _one_of("tied_weights", self.tied_weights, TIED_MODES)
        self._check_sizes()
        for name in ("contiguous", "fan_in_fan_out", "keep_originals"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; expected True or False")
        self._check_ranks()
        for name in (*_NAMES, *_NAMES_OR_REGEX):
            self._check_names(name)
        self._check_layers()

    def _check_sizes(self) -> None:
        if self.r is not None:
            _positive("r", self.r)
        if self.pool is not None:
            _positive("pool", self.pool)
        if self.r_out is not None:
            _positive("r_out", self.r_out)
            if self.slice_type != "block":
                raise ValueError(
                    f"r_out is {self.r_out} with slice_type {self.slice_type!r}; only a block slice"
                    " has a height of its own"
                )
        if self.switch_interval is not None:
            what = "optimizer steps, or None for a slice that stays"
            _positive("switch_interval", self.switch_interval, what)
        _whole("start_position", self.start_position)
        _whole("seed", self.seed)

    def _check_ranks(self) -> None:
        if not isinstance(self.rank_pattern, dict):
            raise TypeError(
                f"rank_pattern is {self.rank_pattern!r}; expected a dict of module name or regex"
                " to r"
            )
        for pattern, r in self.rank_pattern.items():
            _positive(f"rank_pattern[{pattern!r}]", r)
            _regex("rank_pattern", pattern)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if isinstance(layers, (tuple, range, set, frozenset)):
            # JSON has no sets and ranges; sorted, so that the same choice makes the same file
            layers = self.layers_to_transform = sorted(layers)
        indexes = [layers] if isinstance(layers, int) else layers
        if indexes is not None and not (
            isinstance(indexes, list) and all(map(_number, indexes))
        ):
            raise TypeError(
                f"layers_to_transform is {layers!r}; expected a layer number or a list of them"
            )
        self.layers_pattern = self.layers_pattern or None
        if self.target_modules is None or isinstance(self.target_modules, str):
            # A regular expression says itself which layers; PEFT refuses the two together as well.
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} cannot be used when target_modules is {self.target_modules!r};"
                        " give target_modules as a list"
                    )
        if self.layers_pattern and layers is None:
            raise ValueError(
                "layers_pattern is given without layers_to_transform; say which layer numbers to"
                " train"
            )

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, (set, frozenset, tuple)):
            value = sorted(value)
            setattr(self, name, value)
        if value is None:
            return
        if isinstance(value, str) and name in _NAMES_OR_REGEX:
            _regex(name, value)
            return
        if not isinstance(value, list) or not all(
            isinstance(entry, str) for entry in value
        ):
            what = "parameter" if name == "target_parameters" else "module"
            raise TypeError(f"{name} is {value!r}; expected a list of {what} names")
        for entry in value if name == "modules_to_save" else ():
            _regex(name, entry)

    def width(self, out_features: int, in_features: int) -> int:
        """r of a layer of this shape."""
        if self.r is not None:
            return self.r
        sides = {"column": in_features, "row": out_features}
        # where r serves both sides, the smaller one decides
        features = sides.get(self.slice_type, min(out_features, in_features))
        return max(1, min(DEFAULT_R, features // NARROW))

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """All fields, as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SliceConfig:
        """A config of the given fields.

        Unknown keys warn and are left out, so a file written by a newer version still loads. In a
        whole config that an older version wrote, norms stay frozen, as they did there.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        known = {}
        for key, value in values.items():
            if key in names:
                known[key] = value
                continue
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            warnings.warn(
                f"SliceConfig has no key {key!r}{hint}; it is ignored", stacklevel=2
            )
        if "norms" not in known and known.keys() >= _WRITTEN_BEFORE_NORMS:
            known["norms"] = "none"
        return cls(**known)

    @classmethod
    def from_json(cls, text: str) -> SliceConfig:
        """A config of what `to_json` gave.

        Raises:
            TypeError: the text is JSON, but no object.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError(
                f"a SliceConfig in JSON is an object, not {type(values).__name__}"
            )
        return cls.from_dict(values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SliceConfig:
        """A config of what `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name} has {value!r}, which is not a regular expression: {error}"
        ) from error


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _number(value: Any) -> bool:
    # True is an int to Python, and would mean layer 1
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if value < 0:
        raise ValueError(f"{name} is {value}; expected 0 or more")


def _positive(name: str, value: Any, what: str = "features") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an integer number of {what}")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1 ({what})")
