"""Every kernel against the oracle on a GPU, then timings: one command, no network.

python -m benchmarks.gpu [--device cpu] [--parts a,b] [--minutes 8] [--results DIR]

Writes <device>-<commit>.json and .md into the folder of results after every part, and copies them
to $OUT where that is set. The parts run in a process of their own: where one crashes, hangs or
loses the device, it is recorded and the rest run in a new one. Exit status 1 if a part failed; 2
without a GPU, where the results say that nothing could run. --device cpu runs the same parts with tiny shapes through Triton's interpreter.
SLICEFINE_COMMIT=name says what is measured where there is no git.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.job import PARTS, Part
from benchmarks.gpu.report import markdown, summary
from benchmarks.gpu.worker import DEVICE_LOST
from benchmarks.record import where

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# seconds past a part's deadline before it counts as hung and is killed
GRACE = 20.0


def lacks_gpu(device: str) -> bool:
    return device == "cuda" and not torch.cuda.is_available()


class Report:
    """The results so far, written after every part."""

    def __init__(self, device: str, results: Path) -> None:
        self.found: dict[str, Any] = {
            "where": where("cpu" if lacks_gpu(device) else device),
            "parts": {},
        }
        if lacks_gpu(device):
            self.found["where"] |= {"device": "no GPU", "device_type": "none"}
        name = f"{self.found['where']['device']}-{self.found['where']['commit'].replace('+', '-changed')}"
        self.path = results / f"{re.sub(r'[^A-Za-z0-9._]+', '-', name)}.json"

    def add(self, part: str, result: dict[str, Any]) -> None:
        self.found["parts"][part] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(markdown(self.found), encoding="utf-8")
        if os.environ.get("OUT"):
            for path in (self.path, self.path.with_suffix(".md")):
                shutil.copy(path, os.environ["OUT"])
        print(summary(part, result), flush=True)


def collect(waiting: list[Part], folder: Path, report: Report) -> None:
    """Move the parts that have finished from the waiting ones into the report."""
    while waiting and (path := folder / f"{waiting[0].name}.json").exists():
        report.add(waiting.pop(0).name, json.loads(path.read_text(encoding="utf-8")))


def overdue(folder: Path, end: float, grace: float) -> bool:
    """Whether the part that runs should have been over long ago."""
    path = folder / "deadline"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return time.time() > grace + min(end, float(text) if text else end)


def record_loss(
    waiting: list[Part], folder: Path, report: Report, what: str, said: str
) -> None:
    """The part that was running when its process ended: its rows so far, and what is known of the
    end.
    """
    part = waiting.pop(0)
    rows = folder / f"{part.name}.rows"
    kept = (
        [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        if rows.exists()
        else []
    )
    result = {
        "status": "failed",
        "error": f"{what}\n{said}",
        "rows": kept,
        "notes": [],
        "bars": [],
        "seconds": 0,
    }
    # for the next worker to see
    (folder / f"{part.name}.json").write_text(json.dumps(result), encoding="utf-8")
    report.add(part.name, result)


def not_run(reason: str) -> dict[str, Any]:
    """The result of a part that could not start."""
    empty: dict[str, Any] = {"rows": [], "notes": [], "bars": [], "seconds": 0}
    return {"status": f"missing: {reason}", **empty}


def supervise(
    parts: Sequence[Part],
    device: str,
    minutes: float,
    report: Report,
    worker: Sequence[str],
    grace: float = GRACE,
) -> None:
    """Run the parts in worker processes until each has a result. worker: the command, without its
    options.
    """
    end, waiting = time.time() + 60 * minutes, list(parts)
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while waiting:
            command = [
                *worker,
                "--device",
                device,
                "--folder",
                name,
                "--end",
                str(end),
                "--minutes",
                str(minutes),
                "--parts",
                ",".join(part.name for part in waiting),
            ]
            log, left = folder / "log", len(waiting)
            with log.open("w", encoding="utf-8") as output:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                (folder / "deadline").unlink(missing_ok=True)
                while process.poll() is None and not overdue(folder, end, grace):
                    collect(waiting, folder, report)
                    time.sleep(0.1)
                hung = process.poll() is None
                if hung:
                    process.kill()
                status = process.wait()
            collect(waiting, folder, report)
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            if waiting and (hung or len(waiting) == left or status not in (0, DEVICE_LOST)):
                how = (
                    f"still running {grace:.0f} s after its time: killed"
                    if hung
                    else f"its process ended with status {status}"
                )
                record_loss(waiting, folder, report, how, said)


def chosen(names: str | None, device: str) -> list[Part]:
    """Raises SystemExit for a name that no part has."""
    if names is None:
        return [part for part in PARTS if part.on_cpu or device == "cuda"]
    known = {part.name for part in PARTS}
    if unknown := set(names.split(",")) - known:
        raise SystemExit(
            f"no part {', '.join(sorted(unknown))}; expected some of"
            f" {', '.join(p.name for p in PARTS)}"
        )
    return [part for part in PARTS if part.name in names.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--parts", help=f"some of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    parts = chosen(options.parts, options.device)
    report = Report(options.device, options.results)
    if lacks_gpu(options.device):
        reason = "no GPU here: torch.cuda.is_available() is False"
        for part in parts:
            report.add(part.name, not_run(reason))
        print(
            f"{reason}, so nothing ran; written: {report.path}. --device cpu runs the same parts"
            " small, through Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    supervise(
        parts,
        options.device,
        options.minutes,
        report,
        [sys.executable, "-m", "benchmarks.gpu.worker"],
    )
    print(markdown(report.found, rows=False))
    print(f"written: {report.path} and {report.path.with_suffix('.md').name}")
    return (
        1
        if any(part["status"] == "failed" for part in report.found["parts"].values())
        else 0
    )


if __name__ == "__main__":
    sys.exit(main())
