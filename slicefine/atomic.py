"""Files that are never seen half written, and hashes of tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; when the block ends without an error it takes
    the place of ``path``.

    Whoever reads ``path``, also after a crash or a power cut, finds the whole old file or the whole
    new one.
    """
    path = Path(path)
    # a name of its own for each writer: two processes may replace one file at a time
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    # not mkstemp, whose files are for their owner alone: to mend that, the umask of the whole
    # process would have to be changed
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode & 0o777
    try:
        yield temporary
        # Before the rename: after a power cut the new name must not stand for blocks never written.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # safetensors puts a file of its own there
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name is an entry of the folder, which has to reach the disk as well.
    _sync_folder(path.parent)


def version_of(path: Path) -> tuple[int, int, int]:
    """Differs before and after a file has been replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    # Windows does not open folders
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def tensor_sha256(name: str, tensor: Tensor) -> str:
    """SHA-256 in hex over name, dtype, shape and the bytes of a tensor in row-major order.

    Raises TypeError for a tensor without bytes of its own: on the meta device, sharded, or
        quantized by a wrapper class.
    """
    if not tensor.is_meta:
        tensor = tensor.detach().to("cpu").contiguous()
    # A wrapper class has a shape but no storage: its address is 0.
    if tensor.is_meta or (tensor.numel() and not tensor.data_ptr()):
        raise TypeError(
            f"{name} is a {type(tensor).__name__} on {tensor.device} without values of its own to"
            " hash; load or gather the weights first"
        )
    # Without dtype and shape, tensors of the same bytes would pass for each other.
    digest = hashlib.sha256(f"{name}|{dtype_name(tensor)}|{tuple(tensor.shape)}|".encode())
    size = tensor.numel() * tensor.element_size()
    if size:
        # By address, without a copy: numpy, the usual way to bytes, has no bfloat16.
        buffer: Any = (ctypes.c_char * size).from_address(tensor.data_ptr())
        digest.update(buffer)
    return digest.hexdigest()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill; when the block ends without an error it takes the
    place of ``path``.

    Whoever looks at ``path`` finds the whole old folder or the whole new one: the two are exchanged
    in one step where the system can (Linux). Elsewhere a crash in the moment between two renames
    leaves the old folder as ``.NAME.before``.
    """
    # a link stays one; what it points to is replaced
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                # a copy may be read-only
                with (
                    suppress(PermissionError),
                    open(file, "rb+") as handle,
                ):
                    os.fsync(handle.fileno())
        if not path.exists():
            os.rename(temporary, path)
        # A rename does not replace a folder that holds something.
        elif not _exchange(temporary, path):
            before = path.with_name(f".{path.name}.before")
            shutil.rmtree(before, ignore_errors=True)
            os.rename(path, before)
            os.rename(temporary, path)
            shutil.rmtree(before)
        _sync_folder(path.parent)
    finally:
        # what was written, or the old folder after an exchange
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system cannot."""
    try:
        # glibc 2.28
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    # AT_FDCWD, RENAME_EXCHANGE
    here, exchange = -100, 2
    return call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
