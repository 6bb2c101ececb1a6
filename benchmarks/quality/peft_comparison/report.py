"""The result file, key by key PEFT's with one section more, and the table that compares result
files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

import slicefine
from benchmarks.quality.peft_comparison.loop import Result
from benchmarks.quality.peft_comparison.settings import PEFT_COMMIT, Experiment, Setting
from benchmarks.record import where

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
COLUMNS = (
    "experiment",
    "test accuracy",
    "peak memory",
    "train s",
    "ms per step",
    "file MB",
    "trainable",
    "forgetting",
)
MIB, MB = 2**20, 1e6


def _percentile(values: list[int], share: float) -> float | None:
    return (
        float(torch.tensor(values, dtype=torch.float64).quantile(share)) if values else None
    )


def _git(package: str, *arguments: str) -> str | None:
    """A question to git about a package in a checkout of its own; None for an installed one."""
    spec = util.find_spec(package)
    if spec is None or spec.origin is None or "-packages" in spec.origin:
        return None
    found = subprocess.run(
        ["git", *arguments],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(spec.origin),
    )
    return found.stdout.strip() if found.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package_info() -> dict[str, str | None]:
    info: dict[str, str | None] = {}
    for package in PACKAGES:
        info[f"{package}-version"] = _version(package)
        info[f"{package}-commit-hash"] = _git(package, "rev-parse", "HEAD")
    return info


def _model_info(model_id: str) -> dict[str, str | None]:
    none = {"sha": None, "created_at": None}
    if (
        not torch.cuda.is_available()
        or model_id.startswith("package:")
        or os.environ.get("HF_HUB_OFFLINE")
    ):
        return none
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().model_info(model_id)
    except (HfHubHTTPError, ConnectionError):
        return none
    return {
        "sha": found.sha,
        "created_at": found.created_at.isoformat() if found.created_at else None,
    }


def result_dict(
    experiment: Experiment,
    setting: Setting,
    result: Result,
    shown: dict[str, Any] | None,
    run: dict[str, Any],
) -> dict[str, Any]:
    """run: created_at, total_time, file_size, file_size_by, accelerator_memory_max, dataset_info,
    device.

    Where there is no GPU the accelerator_memory_* fields are None and twin_info tells the memory
    that was tracked.
    """
    device = run["device"]
    cuda = device.type == "cuda"
    average = sum(result.reserved) / len(result.reserved) if result.reserved else None
    p99 = _percentile(result.reserved, 0.99)
    dirty = _git("peft", "status", "--porcelain", "--untracked-files=no")
    return {
        "run_info": {
            "created_at": run["created_at"],
            "total_time": run["total_time"],
            "experiment_name": experiment.name,
            "peft_branch": _git("peft", "rev-parse", "--abbrev-ref", "HEAD"),
            "peft_worktree_is_dirty": None if dirty is None else bool(dirty),
            "train_config": dataclasses.asdict(experiment.params),
            "peft_config": shown,
            "error_msg": result.error_msg,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None if average is None else int(average),
            "accelerator_memory_max": run["accelerator_memory_max"],
            "accelerator_memory_reserved_99th": None if p99 is None else int(p99),
            "train_time": result.train_time,
            "file_size": run["file_size"],
            "num_trainable_params": result.trainable,
            "num_total_params": result.total,
            "status": result.status,
            "metrics": result.metrics,
        },
        "meta_info": {
            "model_info": _model_info(experiment.params.model_id),
            "dataset_info": run["dataset_info"],
            "package_info": _package_info(),
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": torch.cuda.get_device_name() if cuda else None,
            },
            "pytorch_info": torch.__config__.show(),
        },
        "twin_info": {
            "peft_source_commit": PEFT_COMMIT,
            "setting": setting.name,
            "task": setting.task,
            "short_run": dataclasses.asdict(setting.short_run),
            "kind": experiment.kind,
            "slicefine_version": slicefine.__version__,
            **where(device.type),
            "peak_memory_tracked": None,
            "held_memory_tracked": None,
            "peak_memory_tracked_by": None,
            "file_size_by": run["file_size_by"],
            "visited_slices_bytes": run["visited_slices_bytes"],
            **result.twin,
        },
    }


def write(values: dict[str, Any], folder: Path) -> Path:
    """folder/method--variant.json; a canceled run goes to folder/cancelled_results with its time in
    the name.
    """
    name = values["run_info"]["experiment_name"].replace("/", "--")
    if values["train_info"]["status"] != "success":
        folder, name = (
            folder / "cancelled_results",
            f"{name}--{values['run_info']['created_at'].replace(':', '-')}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """The successful runs of a folder, this harness's or PEFT's, the best test accuracy first."""
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    ]
    runs = [run for run in runs if run.get("train_info", {}).get("status") == "success"]
    if not runs:
        raise ValueError(f"{folder} holds no result of a successful run")
    return sorted(runs, key=lambda run: -run["train_info"]["metrics"][-1]["test accuracy"])


def table(runs: list[dict[str, Any]]) -> str:
    """One Markdown row per run. Peak memory is the accelerator's where there is one, else what was
    tracked (*).
    """
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    for run in runs:
        train, twin, last = (
            run["train_info"],
            run.get("twin_info", {}),
            run["train_info"]["metrics"][-1],
        )
        cuda, tracked = train["accelerator_memory_max"], twin.get("peak_memory_tracked")
        memory = (
            f"{cuda / MIB:,.0f} MiB"
            if cuda is not None
            else f"{tracked / MIB:,.0f} MiB*"
            if tracked
            else "-"
        )
        step = twin.get("step_ms", {}).get("p50")
        cells = [
            run["run_info"]["experiment_name"],
            f"{100 * last['test accuracy']:.1f} %",
            memory,
            f"{train['train_time']:,.0f}",
            f"{step:,.0f}" if step else "-",
            f"{train['file_size'] / MB:,.1f}",
            f"{train['num_trainable_params']:,d}",
            f"{last['forgetting']:+.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
