"""A delta: what a fine-tune has changed, as the values before and after. Its file, its checks, its
way in and out of a model.

Never a difference: both values are stored, so applying and reverting are copies and bit-exact. The
    file is one safetensors file
whose header holds a manifest: which entries, SHA-256 of every tensor, of the base model and of the
    file itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.atomic import dtype_name
from slicefine.deltas import packed
from slicefine.deltas.base import base_hashes, combined_hash, tensor_of, weight_hash
from slicefine.deltas.format import (
    CONFIG_FILE,
    FILE,
    DeltaError,
    count_runs,
    delta_path,
    from_runs,
    read_file,
    to_runs,
    write_file,
)
from slicefine.deltas.values import FullDelta, SliceValues, WeightDelta, meet
from slicefine.originals import same_bits
from slicefine.slices import read_slice, write_slice
from slicefine.state import config_of

__all__ = [
    "CONFIG_FILE",
    "FILE",
    "Delta",
    "DeltaError",
    "FullDelta",
    "SliceValues",
    "WeightDelta",
]


@dataclass
class Delta:
    """weights and whole: by state-dict key. config: the SliceConfig as a dict. base: name and
    SHA-256 of the base model.

    info: whatever else the file should say (metrics, data, parent), JSON. sha256: of the file it
        was read from or saved to.
    """

    weights: dict[str, WeightDelta]
    whole: dict[str, FullDelta] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    # Files

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the delta, atomically; a folder gets ``adapter_model.safetensors``.

        Returns:
            The file's SHA-256 identity.

        Raises:
            TypeError: info that JSON cannot hold.
            ValueError: what `load` would refuse: info with NaN, values of two dtypes, more patches
                than a safetensors header holds.
            OSError: such as a full disk; what was there stays.
        """
        self.check()
        self.sha256 = write_file(delta_path(path), self._manifest(), dict(self._tensors()))
        return self.sha256

    def check(self) -> None:
        """Raise ValueError for what no reader takes; `save` and `load` both ask."""
        for key, entry in [*self.weights.items(), *self.whole.items()]:
            entry.check(key)
        _check_record(self.base, self.config, self.info)
        names = [name for name, _ in self._tensors()]
        # A whole parameter called "a/0" would share its tensor names with patch 0 of the weight
        # "a".
        if len(set(names)) < len(names) or self.weights.keys() & self.whole.keys():
            raise ValueError("two of its keys name the same values")
        indices = sum(
            index.nbytes
            for weight in self.weights.values()
            for patch in weight.patches
            for index in (patch.rows, patch.cols)
            if index is not None
        )
        _check_indices(indices, self.nbytes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read a delta and check every byte of it.

        Raises DeltaError naming the file, and the module where one is damaged; FileNotFoundError.
        """
        path = delta_path(path)
        manifest, tensors = read_file(path)
        try:
            return cls._from(manifest, tensors)
        # Hashes that hold say that the file is whole, not who wrote it: its manifest may be of any
        # form.
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise DeltaError(
                f"{path} passes its checksum but is not a valid delta ({type(error).__name__}:"
                f" {error}); it was not written by slicefine"
            ) from error

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        for key, weight in self.weights.items():
            for number, patch in enumerate(weight.patches):
                yield f"{key}/{number}/old", patch.old
                yield f"{key}/{number}/new", patch.new
        for key, whole in self.whole.items():
            yield f"{key}/old", whole.old
            yield f"{key}/new", whole.new

    def _manifest(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "config": self.config,
            "info": self.info,
            "weights": {
                key: {
                    "shape": list(w.shape),
                    "transposed": w.transposed,
                    "base_sha256": w.base_sha256,
                    # only where it says something: other deltas stay the same bytes
                    **({"added": True} if w.added else {}),
                    "patches": [
                        {"rows": to_runs(p.rows), "cols": to_runs(p.cols)}
                        for p in w.patches
                    ],
                }
                for key, w in self.weights.items()
            },
            "whole": {key: {"replaces": w.replaces} for key, w in self.whole.items()},
        }

    @classmethod
    def _from(cls, manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
        """A delta of what its file holds. Raises for a manifest of another form."""
        weights = {}
        indices, values = 0, sum(t.nbytes for t in tensors.values())
        for key, entry in manifest["weights"].items():
            shape = tuple(entry["shape"])
            patches = []
            for number, runs in enumerate(entry["patches"]):
                old, new = (tensors[f"{key}/{number}/{which}"] for which in ("old", "new"))
                ranges = (runs["rows"], runs["cols"])
                counts = tuple(count_runs(r, n) for r, n in zip(ranges, shape, strict=True))
                # before memory is taken for them
                if tuple(old.shape) != counts:
                    raise ValueError(
                        f"{key} has values of shape {tuple(old.shape)} and {tuple(new.shape)} for"
                        f" {counts}"
                    )
                indices += sum(
                    8 * n for n, r in zip(counts, ranges, strict=True) if r is not None
                )
                _check_indices(indices, values)
                rows, cols = (from_runs(r) for r in ranges)
                patches.append(SliceValues(rows, cols, old, new))
            weights[key] = WeightDelta(
                shape,
                entry["transposed"],
                entry["base_sha256"],
                patches,
                entry.get("added", False),
            )
        whole = {
            key: FullDelta(tensors[f"{key}/old"], tensors[f"{key}/new"], entry["replaces"])
            for key, entry in manifest["whole"].items()
        }
        config, base, info = (manifest[name] for name in ("config", "base", "info"))
        delta = cls(weights, whole, config, base, info, manifest["file_sha256"])
        delta.check()
        # They would be copied from file to file with no check that knows of them.
        if unnamed := tensors.keys() - {name for name, _ in delta._tensors()}:
            raise ValueError(f"nothing names its values {', '.join(sorted(unnamed)[:3])}")
        return delta

    def config_json(self) -> str:
        """adapter_config.json: what people and tools look for; the truth is in the safetensors
        file.
        """
        content = {
            "peft_type": "SLICEFINE",
            "base_model_name_or_path": self.base.get("model"),
            "base_model_sha256": self.base.get("sha256"),
            "delta_sha256": self.sha256,
            **self.config,
        }
        return json.dumps(content, indent=2) + "\n"

    def scaled(self, alpha: float) -> Delta:
        """A delta part of the way from the base to this fine-tune.

        Args:
            alpha: 0 gives the base and 1 this delta, bit for bit; between them every value is
                ``old + alpha * (new - old)``, computed in float64 and rounded once, and whole
                numbers such as a count of batches to the nearest. A new head starts at the values
                that it had before training.

        Returns:
            Another delta of the same base and the same entries. It says what it was scaled from
            (``info["combined"]``) and has no evaluation, which was this one's.

        Raises:
            ValueError: alpha is not between 0 and 1, or a value to be scaled is not finite.
        """
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, (int, float))
            or not 0 <= alpha <= 1
        ):
            raise ValueError(
                f"alpha is {alpha!r}; expected a number from 0 (the base) to 1"
            )
        weights = {
            key: replace(
                weight,
                patches=[
                    replace(patch, new=_between(key, patch.old, patch.new, alpha))
                    for patch in weight.patches
                ],
            )
            for key, weight in self.weights.items()
        }
        whole = {
            key: replace(entry, new=_between(key, entry.old, entry.new, alpha))
            for key, entry in self.whole.items()
        }
        info = {key: value for key, value in self.info.items() if key != "evaluation"}
        sources = info.get("combined")
        if self.sha256 is None and isinstance(sources, list):
            # itself a step that was not saved: named by what it came of
            info["combined"] = [
                {**source, "weight": source["weight"] * alpha} for source in sources
            ]
        else:
            info["combined"] = [{"sha256": self.sha256, "weight": alpha}]
        return replace(self, weights=weights, whole=whole, info=info, sha256=None)

    # In and out of a model

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def check_base(self, model: nn.Module, everything: bool = True) -> None:
        """Raise DeltaError, naming what differs, unless the model is the base of this delta.

        everything: compare hashes of the whole base model; False: only the entries that the delta
            replaces.
        """
        for key, weight in self.weights.items():
            # Shape and dtype before any hash: cheaper, and the message can say what to load
            # instead.
            tensor = tensor_of(model, key)
            if packed.check(model, key, weight):
                continue
            stored = weight.shape[::-1] if weight.transposed else weight.shape
            if (
                tuple(_matrix(model, key, weight).shape) != weight.shape
                or tensor.dtype != weight.dtype
            ):
                raise DeltaError(
                    f"{key} is {dtype_name(tensor)} {tuple(tensor.shape)} in the model; the delta"
                    f" was made for {dtype_name(weight.patches[0].new)} "
                    f"{tuple(stored)}{_load_in(weight.dtype) if tensor.dtype != weight.dtype else ''}"
                )
        for key, whole in self.whole.items():
            tensor = tensor_of(model, key)
            if tensor.shape != whole.new.shape or tensor.dtype != whole.new.dtype:
                raise DeltaError(
                    f"{key} is {dtype_name(tensor)} {tuple(tensor.shape)} in the model; the delta"
                    f" holds {dtype_name(whole.new)} {tuple(whole.new.shape)}"
                )
        wrong = self._wrong_hashes(model) if everything else self._wrong_entries(model)
        if wrong:
            raise DeltaError(
                f"the delta was made for another base model: {len(wrong)} tensors differ, such as"
                f" {', '.join(wrong[:3])}. Load the model it was made for"
                f" ({self.base.get('model') or 'unnamed'}), unchanged and in the same dtype."
            )

    def _wrong_hashes(self, model: nn.Module) -> list[str]:
        """Keys of the base that differ; all of them are hashed, those beside the delta by one
        common hash.
        """
        hashes = base_hashes(
            model, {key for key, whole in self.whole.items() if not whole.replaces}
        )
        wrong = [
            key
            for key, weight in self.weights.items()
            if weight_hash(hashes, key, weight.added) != weight.base_sha256
        ]
        if not wrong and combined_hash(hashes) != self.base.get("sha256"):
            # The combined hash decides; the record has 16 digits of each, enough to name the
            # culprits.
            recorded = self.base.get("tensors", {})
            beside = [
                key for key in hashes if recorded.get(key) not in (None, hashes[key][:16])
            ]
            beside += sorted(recorded.keys() ^ hashes.keys())
            wrong = beside or ["something the delta has no record of"]
        return wrong

    def _wrong_entries(self, model: nn.Module) -> list[str]:
        """Keys at which the model does not hold the old values; new heads replace nothing."""
        wrong = []
        for key, weight in self.weights.items():
            if (
                weight.added and packed.layer_sha256(model, key) != weight.base_sha256
            ) or not all(
                same_bits(_read(model, key, weight, p), p.old) for p in weight.patches
            ):
                wrong.append(key)
        for key, entry in self.whole.items():
            if entry.replaces and not same_bits(tensor_of(model, key), entry.old):
                wrong.append(key)
        return wrong

    @torch.no_grad()
    def apply_to(self, model: nn.Module, verify: bool = True) -> None:
        """Write the new values into a plain model, in place. verify: hash the whole base first; the
        entries replaced are
        compared in any case. Raises DeltaError for another base; nothing is changed then."""
        _refuse_slices(model)
        self.check_base(model, everything=verify)
        if verify:
            # The old values in the file are what a revert writes: hashes of the base do not cover
            # them.
            self.check_base(model, everything=False)
        packed.make_room(model, self.weights)
        self.write(model, "new")

    @torch.no_grad()
    def revert_from(self, model: nn.Module) -> None:
        """Write the old values back, bit for bit. Raises DeltaError if the model does not hold the
        new ones.
        """
        _refuse_slices(model)
        wrong = [
            key
            for key, w in self.weights.items()
            for p in w.patches
            if not same_bits(_read(model, key, w, p), p.new)
        ]
        wrong += [
            key
            for key, w in self.whole.items()
            if not same_bits(tensor_of(model, key), w.new)
        ]
        if wrong:
            raise DeltaError(
                f"the model does not hold this delta: {', '.join(wrong[:3])} have other values."
                " Revert what came after it first."
            )
        self.write(model, "old")
        packed.clear(model)

    @torch.no_grad()
    def write(self, model: nn.Module, which: str) -> None:
        """Write the ``"old"`` or ``"new"`` values, unchecked."""
        for key, weight in self.weights.items():
            self.write_one(model, key, weight, which)
        for key, whole in self.whole.items():
            tensor_of(model, key).copy_(getattr(whole, which))

    def write_one(
        self, model: nn.Module, key: str, weight: WeightDelta, which: str
    ) -> None:
        for patch in weight.patches:
            _write(model, key, weight, patch, getattr(patch, which))

    @torch.no_grad()
    def read(self, model: nn.Module) -> Delta:
        """The same entries as they stand in a model now, as the new values of another delta: for
        the way back.
        """
        weights = {}
        for key, w in self.weights.items():
            patches = [
                SliceValues(p.rows, p.cols, p.old, _read(model, key, w, p))
                for p in w.patches
            ]
            weights[key] = replace(w, patches=patches)
        whole = {
            key: FullDelta(
                w.old, tensor_of(model, key).detach().to("cpu", copy=True), w.replaces
            )
            for key, w in self.whole.items()
        }
        return Delta(weights, whole, self.config, self.base, self.info)

    def overlap(self, other: Delta) -> list[str]:
        """Keys at which two deltas change the same entries; empty: they can be applied in any
        order.
        """
        shared = [
            key
            for key in self.weights.keys() & other.weights.keys()
            if any(
                meet(a, b)
                for a in self.weights[key].patches
                for b in other.weights[key].patches
            )
        ]
        # What one delta holds whole meets every slice of it in the other.
        mine, theirs = ({*d.whole, *d.weights} for d in (self, other))
        return sorted(
            {*shared, *(self.whole.keys() & theirs), *(other.whole.keys() & mine)}
        )


def _check_record(base: Any, config: Any, info: Any) -> None:
    """Raise ValueError or TypeError for records that are not of their form."""
    for name, record in (("base", base), ("config", config), ("info", info)):
        if not isinstance(record, dict):
            raise TypeError(f"{name} is no object")
    for name in ("sha256", "model", "class"):
        if not isinstance(base.get(name), (str, type(None))):
            raise ValueError(f"base.{name} is no string")
    if not isinstance(base.get("tensors", {}), dict):
        raise ValueError("base.tensors is no object")
    below = base.get("on", [])
    if not isinstance(below, list):
        raise ValueError("base.on is no list")
    for entry in below:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError("base.on names no adapter")
        if not isinstance(entry.get("sha256"), str):
            raise ValueError(
                f"it was trained on top of {entry['name']!r}, which was never saved and cannot be"
                " found again; save that one first, without info"
            )


def _check_indices(indices: int, values: int) -> None:
    """Raise ValueError where indices take more memory than the values that they are for."""
    # Small blocks name more features than they have values: 16 MiB of that do no harm.
    if indices > values + (1 << 24):
        raise ValueError(f"{indices:,d} bytes of indices for {values:,d} bytes of values")


def _matrix(model: nn.Module, key: str, weight: WeightDelta) -> Tensor:
    tensor = tensor_of(model, key).detach()
    # experts, (E, out, in): one tall matrix, whose columns are common to all of them
    if tensor.dim() == 3:
        return tensor.view(-1, tensor.shape[-1])
    # of another shape: the caller says so
    return tensor.t() if weight.transposed and tensor.dim() == 2 else tensor


def _place(
    model: nn.Module, key: str, weight: WeightDelta, patch: SliceValues
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The matrix that holds a patch's values, and its rows and columns there."""
    if weight.added:
        matrix, cols = packed.columns(model, key, patch.cols)
    else:
        matrix, cols = _matrix(model, key, weight), patch.cols
    rows, cols = (None if i is None else i.to(matrix.device) for i in (patch.rows, cols))
    return matrix, rows, cols


def _read(
    model: nn.Module,
    key: str,
    weight: WeightDelta,
    patch: SliceValues,
) -> Tensor:
    if weight.added and packed.plain(model, key):
        # nothing is added so far
        return torch.zeros_like(patch.old)
    return read_slice(*_place(model, key, weight, patch)).to("cpu")


def _write(
    model: nn.Module, key: str, weight: WeightDelta, patch: SliceValues, values: Tensor
) -> None:
    matrix, rows, cols = _place(model, key, weight, patch)
    # a model that was cast: values follow it
    write_slice(matrix, rows, cols, values.to(matrix.device, matrix.dtype))


def _refuse_slices(model: nn.Module) -> None:
    if config_of(model) is not None:
        raise DeltaError(
            "the model has slices in training; use its load_adapter and set_adapter, or"
            " merge_and_unload() it first"
        )


def _load_in(dtype: torch.dtype) -> str:
    return f". Load the model with dtype={dtype}"


def _between(
    key: str,
    old: Tensor,
    new: Tensor,
    alpha: float,
) -> Tensor:
    # Copies, so the ends are exact also for float64, NaN and infinities.
    if alpha in (0, 1):
        return (new if alpha else old).clone()
    values = old.double() + alpha * (new.double() - old.double())
    if not bool(values.isfinite().all()):
        raise ValueError(f"{key} holds values that are not finite, which cannot be scaled")
    return (values if new.is_floating_point() else values.round()).to(new.dtype)
