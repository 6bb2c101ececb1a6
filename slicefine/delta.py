"""A delta: what a fine-tune has changed, as the values before and after. Its file, its checks, its way in and out of a model.

Never a difference: both values are stored, so applying and reverting are copies and bit-exact. The file is one safetensors file
whose header holds a manifest: which entries, SHA-256 of every tensor, of the base model and of the file itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slicefine.files import dtype_name, replacing, tensor_sha256, version_of
from slicefine.ledger import Piece, same_bits
from slicefine.reference import read_slice, write_slice
from slicefine.sharding import is_sharded

SUFFIX = ".safetensors"
FILE = "adapter_model" + SUFFIX
CONFIG_FILE = "adapter_config.json"
FORMAT = "slicefine-delta"
VERSION = 1
_BLANK = "0" * 64  # stands where the file's own hash will
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one


class DeltaError(ValueError):
    """A delta that is damaged, of another base, or in the way of another one."""


@dataclass
class Patch:
    """Entries ``weight[rows][:, cols]``, before and after. rows, cols: int64, ascending, None for all; old, new: (R, K)."""

    rows: Tensor | None
    cols: Tensor | None
    old: Tensor
    new: Tensor


@dataclass
class WeightDelta:
    """What changed in one weight. shape: (out, in); transposed: stored as (in, out), as Conv1D's.

    base_sha256: of the whole weight before anything changed.
    """

    shape: tuple[int, int]
    transposed: bool
    base_sha256: str
    patches: list[Patch]

    @property
    def dtype(self) -> torch.dtype:
        return self.patches[0].new.dtype

    def check(self, key: str) -> None:
        """Raise ValueError unless every patch has values of its own shape and all have one dtype."""
        if not self.patches:
            raise ValueError(f"{key} has no patches")
        for patch in self.patches:
            shape = tuple(n if i is None else len(i) for i, n in zip((patch.rows, patch.cols), self.shape, strict=True))
            if not tuple(patch.old.shape) == tuple(patch.new.shape) == shape:
                raise ValueError(
                    f"{key} has values of shape {tuple(patch.old.shape)} and {tuple(patch.new.shape)} for {shape}"
                )
            if not patch.old.dtype == patch.new.dtype == self.dtype:
                raise ValueError(f"{key} has values of several dtypes")


@dataclass
class WholeDelta:
    """A parameter or buffer that trained whole: a new head (``replaces`` nothing of the base), a bias."""

    old: Tensor
    new: Tensor
    replaces: bool


@dataclass
class Delta:
    """weights and whole: by state-dict key. config: the SliceConfig as a dict. base: name and SHA-256 of the base model.

    info: whatever else the file should say (metrics, data, parent), JSON. sha256: of the file it was read from or saved to.
    """

    weights: dict[str, WeightDelta]
    whole: dict[str, WholeDelta] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the delta, atomically; a folder gets ``adapter_model.safetensors``. Returns the file's SHA-256 identity.

        Raises TypeError for info that JSON cannot hold, ValueError for more patches than a safetensors header can.
        """
        path = _file(path)
        for name in ("base", "config", "info"):
            _check_json(name, getattr(self, name))
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"slicefine": json.dumps(self._manifest(tensors), sort_keys=True)})
            self.sha256, where = _identity(temporary, _BLANK)
            with open(temporary, "rb+") as file:
                file.seek(where)
                file.write(self.sha256.encode())
        return self.sha256

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Delta:
        """Read a delta and check every byte of it.

        Raises DeltaError naming the file, and the module where one is damaged; FileNotFoundError.
        """
        path = _file(path)
        if not path.is_file():
            raise FileNotFoundError(f"no delta at {path}: expected a file, or a folder with {FILE} in it")
        while True:
            version = version_of(path)
            try:
                manifest, tensors = _read_checked(path)
                break
            except DeltaError:
                if version_of(path) == version:  # else it was replaced while it was read: a whole one is there now
                    raise
        try:
            return cls._from(manifest, tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DeltaError(
                f"{path} is whole but no well-formed delta ({type(error).__name__}: {error}); it was not written by slicefine"
            ) from error

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        for key, weight in self.weights.items():
            for number, patch in enumerate(weight.patches):
                yield f"{key}/{number}/old", patch.old
                yield f"{key}/{number}/new", patch.new
        for key, whole in self.whole.items():
            yield f"{key}/old", whole.old
            yield f"{key}/new", whole.new

    def _manifest(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "format": FORMAT, "version": VERSION, "file_sha256": _BLANK, "base": self.base, "config": self.config, "info": self.info,
            "weights": {
                key: {
                    "shape": list(w.shape), "transposed": w.transposed, "base_sha256": w.base_sha256,
                    "patches": [{"rows": to_ranges(p.rows), "cols": to_ranges(p.cols)} for p in w.patches],
                }
                for key, w in self.weights.items()
            },
            "whole": {key: {"replaces": w.replaces} for key, w in self.whole.items()},
            "tensors": {name: tensor_sha256(name, tensor) for name, tensor in tensors.items()},
        }  # fmt: skip

    @classmethod
    def _from(cls, manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
        weights = {}
        for key, entry in manifest["weights"].items():
            out_features, in_features = entry["shape"]
            patches = []
            for i, p in enumerate(entry["patches"]):
                rows, cols = from_ranges(p["rows"], out_features), from_ranges(p["cols"], in_features)
                patches.append(Patch(rows, cols, tensors[f"{key}/{i}/old"], tensors[f"{key}/{i}/new"]))
            weights[key] = WeightDelta((out_features, in_features), entry["transposed"], entry["base_sha256"], patches)
            weights[key].check(key)
        whole = {
            key: WholeDelta(tensors[f"{key}/old"], tensors[f"{key}/new"], entry["replaces"])
            for key, entry in manifest["whole"].items()
        }
        for key, entry in whole.items():
            if (entry.old.shape, entry.old.dtype) != (entry.new.shape, entry.new.dtype):
                raise ValueError(f"{key} has old and new values of different shape or dtype")
        for name in ("config", "base", "info"):
            if not isinstance(manifest[name], dict):
                raise TypeError(f"{name} is no object")
        return cls(weights, whole, manifest["config"], manifest["base"], manifest["info"], manifest["file_sha256"])

    def config_json(self) -> str:
        """adapter_config.json: what people and tools look for; the truth is in the safetensors file."""
        content = {
            "peft_type": "SLICEFINE", "base_model_name_or_path": self.base.get("model"), "base_model_sha256": self.base.get("sha256"),
            "delta_sha256": self.sha256, **self.config,
        }  # fmt: skip
        return json.dumps(content, indent=2) + "\n"

    # -- in and out of a model --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def check_base(self, model: nn.Module, everything: bool = True) -> None:
        """Raise DeltaError, naming what differs, unless the model is the base of this delta.

        everything: compare hashes of the whole base model; False: only the entries that the delta replaces.
        """
        for key, weight in self.weights.items():
            tensor = tensor_of(model, key)
            stored = weight.shape[::-1] if weight.transposed else weight.shape
            if tuple(_matrix(model, key, weight).shape) != weight.shape or tensor.dtype != weight.dtype:
                raise DeltaError(
                    f"{key} is {dtype_name(tensor)} {tuple(tensor.shape)} in the model; the delta was made for {dtype_name(weight.patches[0].new)} "
                    f"{tuple(stored)}{_load_in(weight.dtype) if tensor.dtype != weight.dtype else ''}"
                )
        for key, whole in self.whole.items():
            tensor = tensor_of(model, key)
            if tensor.shape != whole.new.shape or tensor.dtype != whole.new.dtype:
                raise DeltaError(
                    f"{key} is {dtype_name(tensor)} {tuple(tensor.shape)} in the model; the delta holds {dtype_name(whole.new)} {tuple(whole.new.shape)}"
                )
        wrong = self._wrong_hashes(model) if everything else self._wrong_entries(model)
        if wrong:
            raise DeltaError(
                f"the delta was made for another base model: {len(wrong)} tensors differ, such as {', '.join(wrong[:3])}. "
                f"Load the model it was made for ({self.base.get('model') or 'unnamed'}), unchanged and in the same dtype."
            )

    def _wrong_hashes(self, model: nn.Module) -> list[str]:
        """Keys of the base that differ; all of them are hashed, those beside the delta by one common hash."""
        hashes = base_hashes(model, {key for key, whole in self.whole.items() if not whole.replaces})
        wrong = [key for key, weight in self.weights.items() if hashes.get(key) != weight.base_sha256]
        if not wrong and combined_hash(hashes) != self.base["sha256"]:
            recorded = self.base.get("tensors", {})
            beside = [key for key in hashes if recorded.get(key) not in (None, hashes[key][:16])]
            beside += sorted(recorded.keys() ^ hashes.keys())
            wrong = beside or ["something the delta has no record of"]
        return wrong

    def _wrong_entries(self, model: nn.Module) -> list[str]:
        wrong = []
        for key, weight in self.weights.items():
            matrix = _matrix(model, key, weight)
            if not all(same_bits(_read(matrix, p), p.old) for p in weight.patches):
                wrong.append(key)
        return wrong

    @torch.no_grad()
    def apply_to(self, model: nn.Module, verify: bool = True) -> None:
        """Write the new values into a plain model, in place. verify: hash the whole base first; the entries replaced are
        compared in any case. Raises DeltaError for another base; nothing is changed then."""
        _refuse_slices(model)
        self.check_base(model, everything=verify)
        if verify:
            self.check_base(model, everything=False)
        self.write(model, "new")

    @torch.no_grad()
    def revert_from(self, model: nn.Module) -> None:
        """Write the old values back, bit for bit. Raises DeltaError if the model does not hold the new ones."""
        _refuse_slices(model)
        wrong = [
            key for key, w in self.weights.items() for p in w.patches if not same_bits(_read(_matrix(model, key, w), p), p.new)
        ]  # fmt: skip
        wrong += [key for key, w in self.whole.items() if not same_bits(tensor_of(model, key), w.new)]
        if wrong:
            raise DeltaError(
                f"the model does not hold this delta: {', '.join(wrong[:3])} have other values. Revert what came after it first."
            )
        self.write(model, "old")

    @torch.no_grad()
    def write(self, model: nn.Module, which: str) -> None:
        """Write the ``"old"`` or ``"new"`` values, unchecked."""
        for key, weight in self.weights.items():
            self.write_one(model, key, weight, which)
        for key, whole in self.whole.items():
            tensor_of(model, key).copy_(getattr(whole, which))

    def write_one(self, model: nn.Module, key: str, weight: WeightDelta, which: str) -> None:
        for patch in weight.patches:
            _write(_matrix(model, key, weight), patch, getattr(patch, which))

    @torch.no_grad()
    def read(self, model: nn.Module) -> Delta:
        """The same entries as they stand in a model now, as the new values of another delta: for the way back."""
        weights = {}
        for key, w in self.weights.items():
            matrix = _matrix(model, key, w)
            patches = [Patch(p.rows, p.cols, p.old, _read(matrix, p)) for p in w.patches]
            weights[key] = WeightDelta(w.shape, w.transposed, w.base_sha256, patches)
        whole = {
            key: WholeDelta(w.old, tensor_of(model, key).detach().to("cpu", copy=True), w.replaces)
            for key, w in self.whole.items()
        }
        return Delta(weights, whole, self.config, self.base, self.info)

    def overlap(self, other: Delta) -> list[str]:
        """Keys at which two deltas change the same entries; empty: they can be applied in any order."""
        shared = [
            key for key in self.weights.keys() & other.weights.keys()
            if any(meet(a, b) for a in self.weights[key].patches for b in other.weights[key].patches)
        ]  # fmt: skip
        mine, theirs = ({*d.whole, *d.weights} for d in (self, other))
        return sorted({*shared, *(self.whole.keys() & theirs), *(other.whole.keys() & mine)})


# -- the base model -----------------------------------------------------------------------------------------------------


def base_hashes(
    model: nn.Module, leave_out: set[str], original: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, str]:
    """SHA-256 by key of everything in a model's state dict but ``leave_out``.

    original: (key, tensor in the model) -> what stands for it; asked one by one, so that no second model is in memory.
    """
    return {
        key: tensor_sha256(key, original(key, value) if original else value)
        for key, value in whole_state(model).items()
        if key not in leave_out and isinstance(value, Tensor)
    }


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model of one process. Raises DeltaError if its tensors are spread over several."""
    state = model.state_dict()
    if sharded := [key for key, value in state.items() if is_sharded(value)]:
        raise DeltaError(
            f"{sharded[0]} and {len(sharded) - 1} others are sharded over processes; deltas are made of whole tensors. Gather them "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) and load them into a model of "
            "one process"
        )
    return state


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over the hashes of all tensors, in the order of their keys."""
    return hashlib.sha256("".join(f"{key} {hashes[key]}\n" for key in sorted(hashes)).encode()).hexdigest()


def tensor_of(model: nn.Module, key: str) -> Tensor:
    path, _, name = key.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(path), name)
    except AttributeError as error:
        near = ", ".join(k for k in model.state_dict() if k.endswith(name))[:200]
        raise DeltaError(
            f"the model has no {key}, which the delta changes; it has {near or 'nothing of that name'}"
        ) from error
    if isinstance(
        tensor, nn.Module
    ):  # a parameter that a module uses itself and that is sliced now is a module of its name
        tensor = getattr(tensor, "weight", tensor)
    if not isinstance(tensor, Tensor):
        raise DeltaError(
            f"{key}, which the delta changes, is a {type(tensor).__name__} in the model; expected a tensor"
        )
    return tensor


def _matrix(model: nn.Module, key: str, weight: WeightDelta) -> Tensor:
    tensor = tensor_of(model, key).detach()
    if tensor.dim() == 3:  # experts
        return tensor.view(-1, tensor.shape[-1])
    return tensor.t() if weight.transposed else tensor


def _read(matrix: Tensor, patch: Patch) -> Tensor:
    rows, cols = (None if i is None else i.to(matrix.device) for i in (patch.rows, patch.cols))
    return read_slice(matrix, rows, cols).to("cpu")


def _write(matrix: Tensor, patch: Patch, values: Tensor) -> None:
    rows, cols = (None if i is None else i.to(matrix.device) for i in (patch.rows, patch.cols))
    write_slice(matrix, rows, cols, values.to(matrix.device, matrix.dtype))  # a model that was cast: values follow it


def _refuse_slices(model: nn.Module) -> None:
    if "slice_config" in model.__dict__:
        raise DeltaError(
            "the model has slices in training; use its load_adapter and set_adapter, or merge_and_unload() it first"
        )


def _load_in(dtype: torch.dtype) -> str:
    return f". Load the model with dtype={dtype}"


def meet(a: Patch, b: Patch) -> bool:
    return all(x is None or y is None or bool(torch.isin(x, y).any()) for x, y in ((a.rows, b.rows), (a.cols, b.cols)))


# -- making patches -----------------------------------------------------------------------------------------------------


def patches_of(pieces: Iterable[Piece], current: Iterable[Tensor]) -> list[Patch]:
    """Patches from a ledger's pieces and what stands there now."""
    return [Patch(p.rows, p.cols, p.values, new) for p, new in zip(pieces, current, strict=True)]


def to_ranges(index: Tensor | None) -> list[list[int]] | None:
    """Ascending features as [start, length] runs; None for all."""
    if index is None:
        return None
    runs: list[list[int]] = []
    for feature in index.tolist():
        if runs and feature == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([feature, 1])
    return runs


def from_ranges(runs: list[list[int]] | None, features: int) -> Tensor | None:
    """Counterpart of `to_ranges`. Raises ValueError unless the runs are ascending, apart and within 0 to features - 1."""
    if runs is None:
        return None
    end = 0
    for start, length in runs:
        if type(start) is not int or type(length) is not int or start < end or length < 1 or start + length > features:
            raise ValueError(f"the run of features [{start!r}, {length!r}] does not follow {end} within {features}")
        end = start + length
    if not runs:
        raise ValueError("a patch has no features")
    return torch.cat([torch.arange(start, start + length) for start, length in runs])


# -- reading a file that may be damaged ---------------------------------------------------------------------------------


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == SUFFIX and not path.is_dir() else path / FILE


def _check_json(name: str, value: Any) -> None:
    """Raise TypeError, naming where, for what JSON cannot hold: such as a tensor among the metrics."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}; JSON has strings for keys")
            _check_json(f"{name}[{key!r}]", entry)
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            _check_json(f"{name}[{number}]", entry)
    elif not (value is None or isinstance(value, (str, int, float))):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which JSON cannot hold; give a number, string, list or dict"
        )


def _identity(path: Path, recorded: str) -> tuple[str, int]:
    """SHA-256 of a file with its own recorded hash taken as zeros, and where in the file that hash stands."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > _LONGEST_HEADER:
            raise ValueError(
                f"{path} would have a header of {length:,d} bytes; safetensors reads at most {_LONGEST_HEADER:,d}"
            )
        header = file.read(length)
        mark = b'\\"file_sha256\\": \\"'
        where = header.find(mark + recorded.encode(errors="replace")) + len(
            mark
        )  # info may have a file_sha256 of its own, further on
        if where < len(mark) or len(recorded) != len(_BLANK):
            raise DeltaError(f"{path} is damaged or no delta: its header has no file_sha256")
        digest = hashlib.sha256(start + header[:where] + _BLANK.encode() + header[where + len(_BLANK) :])
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest(), 8 + where


def _read_checked(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})["slicefine"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recorded = str(manifest["file_sha256"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DeltaError(
            f"{path} is damaged or no delta: its header cannot be read ({type(error).__name__}: {error})"
        ) from error
    if _identity(path, recorded)[0] != recorded:
        raise DeltaError(f"{path} is damaged: {_culprit(manifest, tensors)}. Take a copy that verifies.")
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise DeltaError(
            f"{path} has format {manifest.get('format')!r} version {manifest.get('version')!r}; this slicefine reads {FORMAT!r} version {VERSION}"
        )
    return manifest, tensors


def _culprit(manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    recorded = manifest.get("tensors")
    if isinstance(recorded, dict):
        wrong = sorted({n.split("/")[0] for n, t in tensors.items() if recorded.get(n) != tensor_sha256(n, t)})
        if wrong:
            return f"the values of {', '.join(wrong[:3])} are not those that were saved"
    return "its header is not the one that was saved"
