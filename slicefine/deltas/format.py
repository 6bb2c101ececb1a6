"""The file of a delta: one safetensors file whose header holds a manifest, with SHA-256 of every
tensor and of the file itself.

Written atomically; read once and only if every byte is what was written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slicefine.atomic import tensor_sha256, version_of
from slicefine.deltas import container

SUFFIX = ".safetensors"
FILE = "adapter_model" + SUFFIX
CONFIG_FILE = "adapter_config.json"
FORMAT = "slicefine-delta"
VERSION = 1
# stands where the file's own hash will
_BLANK = "0" * 64
# as it stands in the file: JSON within a string of JSON, so its quotes are escaped
_MARK = b'\\"file_sha256\\": \\"'


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

    Args:
        path: the file; folders above it are made.
        manifest: JSON.
        tensors: by name.
        kind: name and version of the format, which `read_file` insists on.

    Raises:
        TypeError: the manifest holds what JSON cannot.
        ValueError: the manifest is longer than a safetensors header, or holds NaN or an infinity.
        OSError: such as a full disk; what was there stays.
    """
    for name, value in manifest.items():
        _check_json(name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    hashes = {name: tensor_sha256(name, tensor) for name, tensor in tensors.items()}
    content = {
        **manifest,
        "format": kind[0],
        "version": kind[1],
        "file_sha256": _BLANK,
        "tensors": hashes,
    }
    text = json.dumps(content, sort_keys=True)
    # info may have a file_sha256 of its own, further on
    return container.write(path, tensors, {"slicefine": text}, seal=_MARK + _BLANK.encode())


def read_file(
    path: Path, kind: tuple[str, int] | None = (FORMAT, VERSION)
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file, once, and check every byte of it.

    Args:
        path: the file.
        kind: the format that it must be; None: any, for signatures.

    Returns:
        (manifest, tensors); they stay as they are whatever becomes of the file.

    Raises:
        DeltaError: naming the file, and the module where one is damaged.
        FileNotFoundError: there is none.
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
            # else it was replaced while it was read: a whole one is there now
            if version_of(path) == version:
                raise


def delta_path(path: str | os.PathLike[str]) -> Path:
    """The file of a delta that is named by its file or its folder."""
    path = Path(path)
    return path if path.suffix == SUFFIX and not path.is_dir() else path / FILE


def _check_json(name: str, value: Any) -> None:
    """Raise, naming where, for what JSON cannot hold: such as a tensor among the metrics."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}; JSON has strings for keys")
            _check_json(f"{name}[{key!r}]", entry)
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            _check_json(f"{name}[{number}]", entry)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{name} is {value}, which JSON cannot hold; leave it out, or give None"
        )
    elif not (value is None or isinstance(value, (str, int, float))):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which JSON cannot hold; give a number, string,"
            " list or dict"
        )


def _read_checked(
    path: Path, kind: tuple[str, int] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        content = container.read(path)
        manifest = container.parse_json(content.metadata["slicefine"])
        recorded = str(manifest["file_sha256"])
        blank = _with_blank_hash(content.header, recorded)
    except OSError as error:
        raise DeltaError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise DeltaError(f"{path} is larger than the memory that is free") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DeltaError(
            f"{path} is damaged or no delta: its header cannot be read ({type(error).__name__}:"
            f" {error})"
        ) from error
    if content.sha256(blank) != recorded:
        raise DeltaError(
            f"{path} is damaged: {_culprit(manifest, content.tensors)}. Take a copy that verifies."
        )
    # After the hash: a damaged name of the format is damage, not another version.
    found = manifest.get("format"), manifest.get("version")
    if kind is not None and found != kind:
        raise DeltaError(
            f"{path} has format {found[0]!r} version {found[1]!r}; expected {kind[0]!r} version"
            f" {kind[1]}"
        )
    return manifest, content.tensors


def _with_blank_hash(header: bytes, recorded: str) -> bytes:
    """The header as it was when the file's hash was taken, with zeros in the place of the hash."""
    where = header.find(_MARK + recorded.encode(errors="replace"))
    if where < 0 or len(recorded) != len(_BLANK):
        raise ValueError("it has no file_sha256")
    where += len(_MARK)
    return header[:where] + _BLANK.encode() + header[where + len(_BLANK) :]


def _culprit(manifest: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    recorded = manifest.get("tensors")
    if isinstance(recorded, dict):
        wrong = sorted(
            {
                n.split("/")[0]
                for n, t in tensors.items()
                if recorded.get(n) != tensor_sha256(n, t)
            }
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
        # start + length is the feature that goes on with the run
        if runs and feature == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([feature, 1])
    return runs


def count_runs(runs: Any, features: int) -> int:
    """How many features [start, length] runs name; None names all.

    Raises:
        ValueError: they are not ascending, apart and within 0 to ``features - 1``.
    """
    if runs is None:
        return features
    end = total = 0
    for start, length in runs:
        numbers = type(start) is int and type(length) is int
        if not numbers or start < end or length < 1 or start + length > features:
            raise ValueError(
                f"the run of features [{start!r}, {length!r}] does not follow {end} within"
                f" {features}"
            )
        end = start + length
        total += length
    if not runs:
        raise ValueError("a patch has no features")
    return total


def from_runs(runs: list[list[int]] | None) -> Tensor | None:
    """Counterpart of `to_runs`; takes 8 bytes for every feature that `count_runs` has counted."""
    if runs is None:
        return None
    return torch.cat([torch.arange(start, start + length) for start, length in runs])
