"""safetensors files, read with suspicion and written in one pass.

A reader believes nothing before it has compared it with the size of the file: no header makes it
take more memory than the file is large. A writer makes the same bytes as the safetensors library.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from slicefine.atomic import replacing

# bytes; what the safetensors library reads at most
LONGEST_HEADER = 100_000_000
# In the library's order: the tensors of a file are sorted by it, the last first.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES.values())}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# What a parsed header may take in memory beyond the size of its file, and what one of its values
# takes at most: a key, an integer and their places in a dict.
_ALLOWANCE = 1 << 26
_PER_VALUE = 120


class Content:
    """The content of one safetensors file, in memory.

    Args:
        header: its JSON, as bytes.
        metadata: its strings.
        tensors: views of ``values``, by name.
        values: the bytes behind the header.
    """

    def __init__(self, header: bytes, values: bytearray) -> None:
        entries = parse_json(header)
        if not isinstance(entries, dict):
            raise ValueError("the header is no JSON object")
        self.header, self.values = header, values
        self.metadata = entries.pop("__metadata__", {})
        _check_metadata(self.metadata)
        _check_layout(entries, len(values))
        self.tensors = {name: _view(values, entry) for name, entry in entries.items()}

    def sha256(self, header: bytes) -> str:
        """Hash of the file with another header of the same length."""
        digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
        # the values as they were read: the file may have been replaced since
        digest.update(self.values)
        return digest.hexdigest()


def read(path: Path) -> Content:
    """Read a file once; what is returned does not change with the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file, or its header would take more memory than it may.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(
                f"a header of {length:,d} bytes does not fit a file of {size:,d}"
            )
        header = file.read(length)
        check_header(header, size)
        # The layout is checked before memory is taken for the values, and again with them.
        entries = parse_json(header)
        if not isinstance(entries, dict):
            raise ValueError("the header is no JSON object")
        entries.pop("__metadata__", None)
        _check_layout(entries, size - 8 - length)
        del entries
        values = bytearray(size - 8 - length)
        rest = memoryview(values)
        # A read may bring less than it was asked for: Linux stops at 2 GiB.
        while rest and (count := file.readinto(rest)):  # type: ignore[attr-defined]
            rest = rest[count:]
        if rest or file.read(1):
            raise ValueError("its size changed while it was read")
    return Content(header, values)


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    seal: bytes | None = None,
) -> str:
    """Replace a file, atomically.

    Args:
        path: the file.
        tensors: by name; copied to the host one by one.
        metadata: strings for the header.
        seal: a mark in the header that ends in 64 zeros; the SHA-256 of the file as it was before
            takes their place.

    Returns:
        The SHA-256 of the file as it was before the seal.

    Raises:
        OSError: such as a full disk; what was there stays.
        ValueError: the header would be longer than readers take.
    """
    # wide types first, as the library sorts: each tensor begins at a multiple of its item size
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
    header = _header(names, tensors, metadata)
    size = 8 + len(header) + sum(t.numel() * t.element_size() for t in tensors.values())
    if len(header) > LONGEST_HEADER:
        raise ValueError(
            f"{path} would have a header of {len(header):,d} bytes; safetensors reads at most"
            f" {LONGEST_HEADER:,d}"
        )
    check_header(header, size)
    start = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(start)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(start)
        for name in names:
            _write_values(tensors[name], file, digest)
        if seal is not None:
            # The hash is of the file with the zeros in it; putting it there changes no length.
            file.seek(start.index(seal) + len(seal) - 64)
            file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def parse_json(text: bytes | str) -> Any:
    """JSON without a second meaning: no key twice in one object.

    NaN and infinities, which are no JSON but were written by earlier versions, become strings.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=str)


def check_header(header: bytes, size: int) -> None:
    """Raise ValueError if a header would take more memory, parsed, than a file of ``size`` bytes
    may.
    """
    # one wide character makes every character of a string take four bytes
    wide = 1 if header.isascii() and b"\\u" not in header else 4
    values = sum(header.count(sign) for sign in (b",", b":", b"[", b"{"))
    needed = 3 * wide * len(header) + _PER_VALUE * values
    if needed > size + _ALLOWANCE:
        raise ValueError(
            f"a header with {values:,d} values would take {needed:,d} bytes of memory, more than a"
            f" file of {size:,d} bytes may"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return content


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise ValueError("__metadata__ is no JSON object")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds something else than strings")


def _check_layout(entries: dict[str, Any], size: int) -> None:
    """Raise ValueError unless the tensors fill ``size`` bytes, without a gap or an overlap."""
    spans = []
    for name, entry in entries.items():
        try:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            dtype = _DTYPES[entry["dtype"]]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{name} has no dtype, shape and offsets that are known"
            ) from error
        numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
        # bounded, like the dimensions below: a product of hostile sizes has no end of digits
        if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
            raise ValueError(f"{name} has a shape or offsets that are no sizes")
        if len(shape) > 16 or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(
                f"{name} has a shape that its {end - begin:,d} bytes do not fill"
            )
        spans.append((begin, end))
    last = 0
    for begin, end in sorted(spans):
        # In a gap there could be bytes that no check looks at.
        if begin != last:
            raise ValueError("tensors overlap, or leave a gap")
        last = end
    if last != size:
        raise ValueError(f"tensors take {last:,d} bytes of {size:,d}")


def _view(values: bytearray, entry: dict[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    count = math.prod(shape)
    # frombuffer takes no empty tensors
    if not count:
        return torch.empty(shape, dtype=dtype)
    begin = entry["data_offsets"][0]
    tensor = torch.frombuffer(values, dtype=dtype, count=count, offset=begin).reshape(shape)
    # other writers may align less than the processor's vector instructions want
    return tensor if begin % dtype.itemsize == 0 else tensor.clone()


def _header(
    names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    # so that values begin at a multiple of 8 bytes, for readers that map the file
    return text + b" " * (-len(text) % 8)


def _write_values(tensor: Tensor, file: BinaryIO, digest: Any) -> None:
    tensor = tensor.detach().to("cpu").contiguous()
    size = tensor.numel() * tensor.element_size()
    if size:
        # the tensor's own memory: hashed and written without a copy of it
        buffer: Any = (ctypes.c_char * size).from_address(tensor.data_ptr())
        digest.update(buffer)
        file.write(buffer)
