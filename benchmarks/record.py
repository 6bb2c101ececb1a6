"""What every benchmark row needs beside its figure: quantiles, and where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def quantiles(values: list[float]) -> list[float]:
    """20th, 50th and 80th percentile."""
    return [
        float(q)
        for q in torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
    ]


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it; $SLICEFINE_COMMIT if set;
    else "unknown".
    """
    if os.environ.get("SLICEFINE_COMMIT"):
        return os.environ["SLICEFINE_COMMIT"]
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=9"],
            capture_output=True,
            text=True,
            cwd=here,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's as the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def where(device: str) -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""
    try:
        import triton
    except ImportError:
        triton = None
    gpu = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return {
        "device": device_name(device),
        "device_type": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        **gpu,
    }
