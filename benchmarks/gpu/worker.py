"""The process that runs the parts, one after another. The one that started it (`__main__`) outlives
its crashes and hangs.

For each part it writes <folder>/<part>.json; <part>.rows has the rows so far, `deadline` when the
part that runs should be over.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.job import PARTS, Job, Part, seconds_for

# exit status: what came after the last part written could not run in this process
DEVICE_LOST = 3


def use_modules(folder: Path) -> None:
    """Let `slicefine._C` and `slicefine._CUDA` come from what `build` built, before anything
    imports them.
    """
    import slicefine

    built = str(folder / "slicefine")
    if built not in slicefine.__path__:
        slicefine.__path__.insert(0, built)


def device_is_lost(device: str) -> bool:
    """Whether an earlier kernel's fault (an illegal address, say) has taken this process's context
    with it.
    """
    if device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return True
    return False


def broken_backends(folder: Path) -> frozenset[str]:
    """Backends of which an earlier part of their own has ended in an error or in the death of its
    process.
    """
    found = set()
    for part in PARTS:
        path = folder / f"{part.name}.json"
        backend = part.name.rpartition("_")[2]
        if (
            part.name.endswith("_cuda")
            and path.exists()
            and "error" in json.loads(path.read_text(encoding="utf-8"))
        ):
            found.add(backend)
    return frozenset(found)


def run_part(part: Part, job: Job) -> dict:
    """The part's result; whatever it raises is in it."""
    start = time.perf_counter()
    error = None
    try:
        import torch

        torch.manual_seed(0)
        module, _, function = part.where.partition(":")
        getattr(importlib.import_module(module), function)(job)
    except Exception:
        error = traceback.format_exc()
    return {**job.result(error), "seconds": round(time.perf_counter() - start, 2)}


def work(
    parts: Sequence[Part], device: str, folder: Path, end: float, minutes: float
) -> int:
    """end: time.time() by which all of it should be over. Exit status 0, or DEVICE_LOST."""
    use_modules(folder / "modules")
    for i, part in enumerate(parts):
        seconds = seconds_for(part, parts[i + 1 :], end - time.time(), minutes)
        if seconds > 0:
            deadline = time.time() + seconds
            (folder / "deadline").write_text(str(deadline), encoding="utf-8")
            job = Job(
                device,
                device == "cpu",
                deadline,
                folder / "modules",
                folder / f"{part.name}.rows",
                broken_backends(folder),
            )
            result = run_part(part, job)
        else:
            result = {
                "status": "skipped: no time left",
                "rows": [],
                "notes": [],
                "bars": [],
                "seconds": 0.0,
            }
        unfinished = folder / f"{part.name}.tmp"
        unfinished.write_text(json.dumps(result), encoding="utf-8")
        unfinished.rename(folder / f"{part.name}.json")
        if result["status"] == "failed" and device_is_lost(device):
            return DEVICE_LOST
    return 0


def main(known: Sequence[Part] = PARTS) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--end", type=float, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--parts", required=True)
    options = parser.parse_args()
    by_name = {part.name: part for part in known}
    parts = [by_name[name] for name in options.parts.split(",")]
    return work(parts, options.device, options.folder, options.end, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
