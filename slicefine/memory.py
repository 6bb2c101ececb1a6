"""Peak memory of a piece of training, counted from the storages that tensors really hold.

On a GPU it is the allocator's own peak. On a CPU every operator's results are followed until their storage is freed: exact
for tensors, blind to buffers that a library allocates inside one operator (the same blindness for every method).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass
class MemoryReport:
    """bytes_before: held by the tensors given. peak_bytes: most held at any one time, those included."""

    bytes_before: int = 0
    peak_bytes: int = 0


class _StorageTracker(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.current = self.peak = 0

    def follow(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self.live:
            self.live[key] = size
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._freed, key)

    def follow_all(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:  # a loop of its own: its variable must not keep the last tensor alive
            self.follow(tensor)

    def _freed(self, key: int) -> None:
        self.current -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            self.follow(leaf)
        return result


@contextmanager
def track_memory(held: Iterable[Tensor] = (), device: torch.device | str = "cpu") -> Iterator[MemoryReport]:
    """Measure what runs inside the block.

    held: tensors that exist already and count (parameters, optimizer state); on a GPU the allocator knows them.
    out: a report, filled in when the block ends.
    """
    device = torch.device(device)
    report = MemoryReport()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        report.bytes_before = torch.cuda.memory_allocated(device)
        yield report
        torch.cuda.synchronize(device)
        report.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    tracker = _StorageTracker()
    tracker.follow_all(held)
    report.bytes_before = tracker.current
    with tracker:
        yield report
    report.peak_bytes = tracker.peak
