"""Run the benchmark suite and write JSON, a Markdown report and plots; or compare two commits.

python -m benchmarks.bench [--quick] [--device cuda] [--part ops] [--results FOLDER]
python -m benchmarks.bench --base REV [--pairs 4]      # faster, slower or no difference

Every case's correctness check runs before its timing; where one is red the run fails and no report
is written. The suite is ordinary pytest-benchmark too: `pytest benchmarks/speed --benchmark-only
--benchmark-autosave`, then --benchmark-compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.run import ROOT, entries_in, run_suite


def rounded(value: Any) -> Any:
    """Floats to five digits, in rows and lists of them: no clock here tells more."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return (
        [rounded(v) for v in value]
        if isinstance(value, list)
        else float(f"{value:.5g}")
        if isinstance(value, float)
        else value
    )


def as_json(content: dict[str, Any]) -> str:
    """A row per line."""
    head = json.dumps(
        {key: value for key, value in content.items() if key != "rows"}, indent=1
    )
    return (
        head[:-2]
        + ',\n "rows": [\n'
        + ",\n".join(json.dumps(row) for row in content["rows"])
        + "\n]}\n"
    )


def load() -> str:
    return (
        " ".join(f"{value:.2f}" for value in os.getloadavg())
        if hasattr(os, "getloadavg")
        else "unknown"
    )


def stem_of(where: dict[str, Any]) -> str:
    name = (
        re.sub(r"\W+", "-", re.sub(r"\(.*\)|NVIDIA", "", where["device"]).strip())
        .strip("-")
        .lower()
    )
    return f"bench-{name}-{where['commit'].replace('+', '-dirty')}"


def bench(arguments: list[str], command: str, results: Path, pictures: Path) -> int:
    """One run: JSON and its report in results, plots in pictures. 1 if a check was red."""
    from benchmarks.speed import report

    before, start = load(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        status, printed = run_suite(ROOT, arguments, output)
        if status != 0:
            print(printed[-8000:])
            print("a check or a benchmark failed: no report (no speed without green)")
            return 1
        entries = entries_in(output)
    rows = [entry["row"] for entry in entries]
    first = rows[0]
    keys = (
        "device",
        "device_type",
        "threads",
        "torch",
        "triton",
        "python",
        "peft",
        "commit",
        "date",
        "backend",
    )
    content = {
        "where": {key: first[key] for key in keys},
        "command": command,
        "seconds": time.perf_counter() - start,
        "load_before": before,
        "load_after": load(),
        "cores": os.cpu_count(),
        "roofs": entries[0]["roofs"],
        "rows": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    stem = stem_of(content["where"])
    path = results / f"{stem}.json"
    path.write_text(as_json(rounded(content)), encoding="utf-8")
    page = report.write(content, stem, results, pictures)
    print(report.bar(rows), *report.shortfalls(rows), *report.verdict(rows), sep="\n")
    print(f"{content['seconds']:.0f} s. Written: {path}, {page}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small case of each kind, under a minute"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--part", action="append", choices=("models", "layers", "moves", "ops")
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument(
        "--base",
        metavar="REV",
        help="compare this checkout with a commit, on the quick cases",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=4,
        help="runs of this checkout beside one more of the other",
    )
    options = parser.parse_args()
    arguments = ["--quick"] if options.quick or options.base else []
    arguments += [f"--device={options.device}"] if options.device else []
    arguments += [f"--part={part}" for part in options.part or ()]
    if options.base:
        from benchmarks.speed import compare

        return compare.main(options.base, options.pairs, arguments)
    command = " ".join(["python -m benchmarks.bench", *sys.argv[1:]])
    return bench(arguments, command, options.results, options.pictures)


if __name__ == "__main__":
    sys.exit(main())
