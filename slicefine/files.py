"""Files that are never seen half written, and hashes of tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; when the block ends without an error it takes the place of ``path``.

    Whoever reads ``path``, also after a crash or a power cut, finds the whole old file or the whole new one.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows does not open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def tensor_sha256(name: str, tensor: Tensor) -> str:
    """SHA-256 in hex over name, dtype, shape and the bytes of a tensor in row-major order."""
    tensor = tensor.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{name}|{dtype_name(tensor)}|{tuple(tensor.shape)}|".encode())
    size = tensor.numel() * tensor.element_size()
    if size:
        buffer: Any = (ctypes.c_char * size).from_address(tensor.data_ptr())
        digest.update(buffer)
    return digest.hexdigest()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
