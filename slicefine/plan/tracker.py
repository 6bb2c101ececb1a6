"""Peak memory of a piece of training, counted from the storages that tensors really hold, and what
it is made of.

On a GPU it is the allocator's own peak. On a CPU, and for fake tensors (`slicefine.plan.estimate`),
every operator's results are followed until their storage is freed: exact for tensors, blind to
buffers that a library allocates inside one operator (the same blindness for every method).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What a byte at the peak is held for; a storage that is several of these counts as the first of
# them.
KINDS = ("weights", "moments", "gradients", "logits", "activations", "temporaries")


@dataclass
class MemoryReport:
    """bytes_before: held by the tensors given. peak_bytes: most held at any one time, those
    included.

    breakdown: bytes of each of KINDS at that time; empty on a GPU, whose allocator does not tell.
    Activations are what autograd has saved for backward; logits are tensors whose last dimension is
    ``logits_width``. phases: name -> the breakdown at the peak within it, for each name given to
    ``begin``.
    """

    bytes_before: int = 0
    peak_bytes: int = 0
    breakdown: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    begin: Callable[[str], None] = lambda phase: None


class _StorageTracker(TorchDispatchMode):
    def __init__(self, logits_width: int | None = None) -> None:
        super().__init__()
        # storage -> bytes, kind
        self.live: dict[int, tuple[int, str]] = {}
        self.current = self.peak = 0
        self.totals: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.at_peak: dict[str, int] = dict(self.totals)
        self.phases: dict[str, dict[str, int]] = {}
        self.phase_peak = 0
        self.phase: str | None = None
        self.logits_width = logits_width

    def follow(self, tensor: Tensor, kind: str = "temporaries") -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        if tensor.layout == torch.sparse_coo:
            return self.follow_all((tensor._indices(), tensor._values()), kind)
        storage = tensor.untyped_storage()
        # the address of the storage in C++, which views and detached tensors share
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            self._promote(key, kind)
        elif size:
            if (
                kind == "temporaries"
                and tensor.dim() > 1
                and tensor.shape[-1] == self.logits_width
            ):
                kind = "logits"
            self.live[key] = size, kind
            self.totals[kind] += size
            self.current += size
            self._note_peak()
            # when the last tensor on it is gone, also from within autograd
            weakref.finalize(storage, self._freed, key)

    def _promote(self, key: int, kind: str) -> None:
        size, before = self.live[key]
        if KINDS.index(kind) < KINDS.index(before):
            self.live[key] = size, kind
            self.totals[before] -= size
            self.totals[kind] += size
            # This moment may be the peak: what is held at it has a better name now.
            if self.current == self.peak:
                self.at_peak = dict(self.totals)
            if self.phase is not None and self.current == self.phase_peak:
                self.phases[self.phase] = dict(self.totals)

    def _note_peak(self) -> None:
        if self.current > self.peak:
            self.peak, self.at_peak = self.current, dict(self.totals)
        if self.phase is not None and self.current > self.phase_peak:
            self.phase_peak, self.phases[self.phase] = self.current, dict(self.totals)

    def begin(self, phase: str) -> None:
        """From here on, until the next call, peaks are those of this phase too."""
        self.phase, self.phase_peak = phase, self.current
        self.phases[phase] = dict(self.totals)

    def follow_all(self, tensors: Iterable[Any], kind: str = "temporaries") -> None:
        # a loop of its own: its variable must not keep the last tensor alive
        for tensor in tensors:
            self.follow(tensor, kind)

    def save(self, tensor: Tensor) -> Tensor:
        self.follow(tensor, "activations")
        return tensor

    def _freed(self, key: int) -> None:
        size, kind = self.live.pop(key, (0, "temporaries"))
        self.current -= size
        self.totals[kind] -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            self.follow(leaf)
        return result


@contextmanager
def track_memory(
    held: Iterable[Tensor] = (),
    device: torch.device | str = "cpu",
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    logits_width: int | None = None,
) -> Iterator[MemoryReport]:
    """Measure what runs inside the block.

    held: tensors that exist already and count (parameters, optimizer state); on a GPU the allocator
    knows them. model, optimizer: held too, and told apart in the breakdown as weights, gradients
    and moments. logits_width: last dimension by which logits are known, the size of the vocabulary.
    out: a report, filled in when the block ends.
    """
    device = torch.device(device)
    report = MemoryReport()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        # The peak starts anew from these: what is allocated when the block begins counts.
        report.bytes_before = torch.cuda.memory_allocated(device)
        yield report
        torch.cuda.synchronize(device)
        report.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    tracker = _StorageTracker(logits_width)
    with _following(tracker, model, optimizer, held):
        report.bytes_before = tracker.current
        report.begin = tracker.begin
        # They change nothing, and are shown every tensor that autograd keeps for backward.
        with saved_tensors_hooks(tracker.save, lambda tensor: tensor), tracker:
            yield report
    report.peak_bytes, report.breakdown = tracker.peak, tracker.at_peak
    report.phases = tracker.phases


@contextmanager
def _following(
    tracker: _StorageTracker,
    model: nn.Module | None,
    optimizer: Optimizer | None,
    held: Iterable[Tensor],
) -> Iterator[None]:
    """Tell the tracker what is held already, and of gradients and moments as they come."""
    with ExitStack() as hooks:
        if model is not None:
            tracker.follow_all([*model.parameters(), *model.buffers()], "weights")
            tracker.follow_all((p.grad for p in model.parameters()), "gradients")
            for parameter in model.parameters():
                if parameter.requires_grad:
                    grown = parameter.register_post_accumulate_grad_hook(
                        lambda p: tracker.follow(p.grad, "gradients")
                    )
                    hooks.callback(grown.remove)
        if optimizer is not None:
            # after every step, too: the first one makes them
            moments = lambda *_: tracker.follow_all(
                tree_iter(list(optimizer.state.values())), "moments"
            )
            moments()
            hooks.callback(optimizer.register_step_post_hook(moments).remove)
        tracker.follow_all(held)
        yield


@dataclass
class CompiledTracking:
    """backend: for torch.compile(..., fullgraph=True). eager: around what runs outside its graphs,
    such as an optimizer's step.
    """

    report: MemoryReport
    backend: Any
    eager: TorchDispatchMode


@contextmanager
def track_compiled(
    held: Iterable[Tensor] = (),
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    logits_width: int | None = None,
) -> Iterator[CompiledTracking]:
    """`track_memory` for a function under torch.compile, on the CPU or with fake tensors.

    The backend runs the forward and backward graphs that torch.compile's own decompositions and
    partitioner make, so what is saved for backward and what is computed again is as compiled code
    has it. It runs them operator by operator, and each intermediate lives until its last use: the
    kernels into which inductor fuses operators allocate fewer. Activations are what the forward
    graphs hand on to the backward.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    tracker, report = _StorageTracker(logits_width), MemoryReport()

    def compiler(kind: str) -> Any:
        def compile(graph: torch.fx.GraphModule, example: Any) -> Any:
            def run(arguments: list[Any]) -> Any:
                with tracker:
                    result = torch.fx.Interpreter(graph).boxed_run(arguments)
                tracker.follow_all(tree_iter(result), kind)
                return result

            # the caller lets go of the arguments
            run._boxed_call = True
            return run

        return compile

    backend = aot_autograd(
        fw_compiler=compiler("activations"),
        bw_compiler=compiler("temporaries"),
        # inductor's own, or the saved tensors would not be those of compiled code
        decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition,
    )
    with _following(tracker, model, optimizer, held):
        report.bytes_before = tracker.current
        yield CompiledTracking(report, backend, tracker)
    report.peak_bytes, report.breakdown = tracker.peak, tracker.at_peak
