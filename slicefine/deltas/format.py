"""The file of a delta: one safetensors file whose header holds a manifest, with SHA-256 of every
tensor and of the file itself.

Written atomically; read only if every byte is what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slicefine.atomic import replacing, tensor_sha256, version_of

SUFFIX = ".safetensors"
FILE = "adapter_model" + SUFFIX
CONFIG_FILE = "adapter_config.json"
FORMAT = "slicefine-delta"
VERSION = 1
_BLANK = "0" * 64  # stands where the file's own hash will
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one


class DeltaError(ValueError):
    """A delta that is damaged, of another base, or in the way of another one."""


def write_file(
    path: Path,
    manifest: dict[str, Any],
    tensors: Mapping[str, Tensor],
    kind: tuple[str, int] = (FORMAT, VERSION),
) -> str:
    """Write tensors and manifest, atomically; adds the SHA-256 of each tensor and of the file, and
    returns the latter.

    kind: name and version of the format, which `read` insists on.

    Raises TypeError for a manifest that JSON cannot hold, ValueError for one longer than a
    safetensors header.
    """
    for name, value in manifest.items():
        _check_json(name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    hashes = {name: tensor_sha256(name, tensor) for name, tensor in tensors.items()}
    content = {
        **manifest,
        "format": kind[0],
        "version": kind[1],
        "file_sha256": _BLANK,
        "tensors": hashes,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"slicefine": json.dumps(content, sort_keys=True)})
        sha256, where = _identity(temporary, _BLANK)
        with open(temporary, "rb+") as file:
            file.seek(where)
            file.write(sha256.encode())
    return sha256


def read_file(
    path: Path, kind: tuple[str, int] | None = (FORMAT, VERSION)
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(manifest, tensors), checked byte for byte. kind: the format that it must be; None: any, for
    signatures.

    Raises DeltaError naming the file, and the module where one is damaged; FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no delta at {path}: expected a file, or a folder with {FILE} in it"
        )
    while True:
        version = version_of(path)
        try:
            return _read_checked(path, kind)
        except DeltaError:
            if (
                version_of(path) == version
            ):  # else it was replaced while it was read: a whole one is there now
                raise


def delta_path(path: str | os.PathLike[str]) -> Path:
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
            f"{name} is a {type(value).__name__}, which JSON cannot hold; give a number, string,"
            " list or dict"
        )


def _identity(path: Path, recorded: str) -> tuple[str, int]:
    """SHA-256 of a file with its own recorded hash taken as zeros, and where in the file that hash
    stands.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > _LONGEST_HEADER:
            raise ValueError(
                f"{path} would have a header of {length:,d} bytes; safetensors reads at most"
                f" {_LONGEST_HEADER:,d}"
            )
        header = file.read(length)
        mark = b'\\"file_sha256\\": \\"'
        # info may have a file_sha256 of its own, further on
        where = header.find(mark + recorded.encode(errors="replace")) + len(mark)
        if where < len(mark) or len(recorded) != len(_BLANK):
            raise DeltaError(f"{path} is damaged or no delta: its header has no file_sha256")
        digest = hashlib.sha256(
            start + header[:where] + _BLANK.encode() + header[where + len(_BLANK) :]
        )
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest(), 8 + where


def _read_checked(
    path: Path, kind: tuple[str, int] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})["slicefine"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recorded = str(manifest["file_sha256"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DeltaError(
            f"{path} is damaged or no delta: its header cannot be read ({type(error).__name__}:"
            f" {error})"
        ) from error
    if _identity(path, recorded)[0] != recorded:
        raise DeltaError(
            f"{path} is damaged: {_culprit(manifest, tensors)}. Take a copy that verifies."
        )
    found = manifest.get("format"), manifest.get("version")
    if kind is not None and found != kind:
        raise DeltaError(
            f"{path} has format {found[0]!r} version {found[1]!r}; expected {kind[0]!r} version"
            f" {kind[1]}"
        )
    return manifest, tensors


def _culprit(manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    recorded = manifest.get("tensors")
    if isinstance(recorded, dict):
        wrong = sorted(
            {n.split("/")[0] for n, t in tensors.items() if recorded.get(n) != tensor_sha256(n, t)}
        )
        if wrong:
            return f"the values of {', '.join(wrong[:3])} are not those that were saved"
    return "its header is not the one that was saved"


def to_runs(index: Tensor | None) -> list[list[int]] | None:
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


def from_runs(runs: list[list[int]] | None, features: int) -> Tensor | None:
    """Counterpart of `to_runs`. Raises ValueError unless the runs are ascending, apart and within
    0 to features - 1.
    """
    if runs is None:
        return None
    end = 0
    for start, length in runs:
        if (
            type(start) is not int
            or type(length) is not int
            or start < end
            or length < 1
            or start + length > features
        ):
            raise ValueError(
                f"the run of features [{start!r}, {length!r}] does not follow {end} within"
                f" {features}"
            )
        end = start + length
    if not runs:
        raise ValueError("a patch has no features")
    return torch.cat([torch.arange(start, start + length) for start, length in runs])
