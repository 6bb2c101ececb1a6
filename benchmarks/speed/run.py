"""One run of the suite in a process of its own, and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_suite(tree: Path, arguments: list[str], output: Path) -> tuple[int, str]:
    """The suite of a checkout in a process of its own, one thread; (exit status, what it printed)."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    # set by tests in several processes; pytest-benchmark would switch itself off
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/speed",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
        "--benchmark-columns=median",
        f"--benchmark-json={output}",
        *arguments,
    ]
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def entries_in(path: Path) -> list[dict[str, Any]]:
    """What the suite left in a pytest-benchmark file: {"row", "roofs", "package"}; nothing if there
    is no file.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    return [
        b["extra_info"] for b in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    ]
