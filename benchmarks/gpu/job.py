"""What a part of the GPU suite is given: where it runs, how long it may take, and where its rows
go.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A step of the suite. seconds: its share of eight minutes; least: with less than that it is
    not begun.
    """

    name: str
    # module:function, imported when its turn comes, so that an import that fails is a part that
    # fails
    where: str
    seconds: int
    least: int = 5
    on_cpu: bool = True


# Correctness first, after the build that it needs; then by importance.
PARTS = (
    Part("build", "benchmarks.gpu.build:build", 75, on_cpu=False),
    Part("gradients", "benchmarks.gpu.correctness:gradients", 55),
    Part("updates", "benchmarks.gpu.correctness:updates", 35),
    Part("graphs", "benchmarks.gpu.graphs:graphs", 15),
    # parts of their own, so that a fault of one backend, which ends the process, leaves the other's
    # results
    Part("gradients_cuda", "benchmarks.gpu.correctness:gradients_cuda", 10),
    Part("updates_cuda", "benchmarks.gpu.correctness:updates_cuda", 8),
    Part("graphs_cuda", "benchmarks.gpu.graphs:graphs_cuda", 7),
    Part("training", "benchmarks.gpu.correctness:training", 20),
    Part("lean", "benchmarks.gpu.lean:lean", 15),
    Part("layers", "benchmarks.gpu.layer_steps:layers", 55, least=10),
    Part("kernels", "benchmarks.gpu.kernels:kernels", 55, least=10),
    Part("model", "benchmarks.gpu.model:model", 90, least=20),
    Part("sanitizer", "benchmarks.gpu.build:sanitizer", 40, least=20, on_cpu=False),
)


def seconds_for(part: Part, after: Sequence[Part], left: float, minutes: float) -> float:
    """A part may use its share and what the parts before it left over, never more than there is; 0:
    it no longer fits.
    """
    scale = minutes / 8
    if left < part.least * min(1.0, scale):
        return 0.0
    return min(
        left, max(part.seconds * scale, left - scale * sum(p.seconds for p in after))
    )


def bar(name: str, value: float, limit: float, *, most: bool) -> dict[str, Any]:
    """A figure beside the one it is compared with; most: it should be at most the limit, otherwise
    at least.
    """
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "most": most,
        "met": value <= limit if most else value >= limit,
    }


@dataclass
class Job:
    """device: "cuda" or "cpu"; small: tiny shapes, for Triton's interpreter; modules: folder of
    what `build` built.
    """

    device: str
    small: bool
    # time.time()
    deadline: float
    modules: Path
    # rows go there at once, so that a crash loses none
    sink: Path | None = None
    # backends whose correctness part ended in an error, as a lost device is
    broken: frozenset[str] = frozenset()
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    # what this machine lacks for the part
    missing: str | None = None
    incomplete: bool = False

    def left(self) -> float:
        return self.deadline - time.time()

    def row(self, **values: Any) -> None:
        """ok: False fails the part; absent: why there is no figure."""
        self.rows.append(values)
        if self.sink is not None:
            with self.sink.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def within_time(self, cases: Iterable[T], each: float = 1.0) -> Iterator[T]:
        """The cases, in order, for as long as `each` seconds are left; a note counts those that are
        not reached.
        """
        cases = list(cases)
        for i, case in enumerate(cases):
            if i and self.left() < each:
                self.notes.append(
                    f"no time left for {len(cases) - i} of {len(cases)} cases"
                )
                self.incomplete = True
                return
            yield case

    @contextmanager
    def attempt(self, peer: bool = False, **label: Any) -> Iterator[None]:
        """An exception inside becomes a row that fails, and the part goes on; not if it has taken
        the device with it.

        peer: what runs inside is another library's; where it fails there is no figure, and nothing
            of ours is wrong.
        """
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            self.row(**label, absent=f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:
            if peer:
                self.row(**label, absent=f"{type(error).__name__}: {str(error)[:300]}")
            else:
                self.row(
                    **label,
                    ok=False,
                    error="".join(traceback.format_exception(error))[-3000:],
                )
            if self.device == "cuda":
                torch.cuda.synchronize()

    def result(self, error: str | None = None) -> dict[str, Any]:
        """What the report keeps of the part."""
        failed = error is not None or any(row.get("ok") is False for row in self.rows)
        done = "ok, as far as it came" if self.incomplete else "ok"
        status = (
            "failed" if failed else f"missing: {self.missing}" if self.missing else done
        )
        found = {
            "status": status,
            "rows": self.rows,
            "notes": self.notes,
            "bars": self.bars,
        }
        return found if error is None else {**found, "error": error}
