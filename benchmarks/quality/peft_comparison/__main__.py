"""Run slicefine and peft's methods under the settings of PEFT's MetaMathQA comparison, or compare
what was run.

python -m benchmarks.quality.peft_comparison --experiment slice/column-r16    one run; its result file goes to
--results
python -m benchmarks.quality.peft_comparison --all                            every experiment, each in a process
of its own
python -m benchmarks.quality.peft_comparison --table DIR                      the comparison, of these result
files or of PEFT's
python -m benchmarks.quality.peft_comparison --setting official --experiment ...    PEFT's model and data: a GPU
and the hub
"""

from __future__ import annotations

import argparse
import datetime as dt
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.peft_comparison import report, setup
from benchmarks.quality.peft_comparison.loop import Runner
from benchmarks.quality.peft_comparison.settings import (
    Experiment,
    Setting,
    experiment_names,
    load_experiment,
    load_setting,
)
from benchmarks.quality.peft_comparison.tasks import AnswerTask, load_task

ROOT = Path(__file__).resolve().parents[3]


def run_experiment(
    experiment: Experiment,
    setting: Setting,
    task: AnswerTask,
    load: Callable[..., tuple[Any, Any]] = setup.load_model,
) -> dict[str, Any]:
    """Train, evaluate and describe one experiment. load: (params, device) -> model and tokenizer."""
    from transformers import set_seed

    start, created = (
        time.perf_counter(),
        dt.datetime.now(dt.timezone.utc).replace(microsecond=0).isoformat(),
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    set_seed(experiment.params.seed)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    memory_at_start = torch.cuda.max_memory_reserved() if cuda else 0
    base, tokenizer = load(experiment.params, device)
    model, shown = setup.apply_method(base, experiment)
    result = Runner(model, tokenizer, task, experiment.params, memory_at_start).run()
    size, how = setup.file_size(model, experiment)
    run = {
        "created_at": created,
        "total_time": time.perf_counter() - start,
        "device": device,
        "file_size": size,
        "file_size_by": how,
        "visited_slices_bytes": setup.visited_bytes(model),
        "dataset_info": task.dataset_info,
        "accelerator_memory_max": (
            torch.cuda.max_memory_reserved() - memory_at_start if cuda else None
        ),
    }
    return report.result_dict(experiment, setting, result, shown, run)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", help="method/variant under experiments/")
    what.add_argument(
        "--all", action="store_true", help="every experiment; an older result is replaced"
    )
    what.add_argument("--list", action="store_true", help="the experiments")
    what.add_argument(
        "--table", type=Path, metavar="DIR", help="compare the result files of a folder"
    )
    parser.add_argument(
        "--setting", default="small", help="small, official or the path of a .json file"
    )
    parser.add_argument("--max-steps", type=int, help="fewer steps than the setting has")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "demo" / "peft_comparison",
        help="where result files go",
    )
    parser.add_argument(
        "--data", type=Path, default=ROOT / "demo", help="where downloads go"
    )
    options = parser.parse_args(arguments)
    try:
        if options.list:
            print("\n".join(experiment_names()))
            return 0
        if options.table:
            print(report.table(report.read(options.table)))
            return 0
        setting = load_setting(options.setting)
        if options.all:
            experiments = [
                load_experiment(name, setting, options.max_steps)
                for name in experiment_names()
            ]
            return max(
                _in_a_process(experiment.name, options) for experiment in experiments
            )
        experiment = load_experiment(options.experiment, setting, options.max_steps)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    print(
        f"{experiment.name}, {setting.name}: {experiment.params.max_steps} steps",
        flush=True,
    )
    values = run_experiment(experiment, setting, load_task(setting.task, options.data))
    print(f"  {report.write(values, options.results)}")
    if values["train_info"]["status"] != "success":
        print(
            f"  {values['train_info']['status']}: {values['run_info']['error_msg']}",
            file=sys.stderr,
        )
        return 1
    print(report.table([values]))
    return 0


def _in_a_process(name: str, options: argparse.Namespace) -> int:
    """So that one method's memory and kernels do not touch the next one's figures."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.quality.peft_comparison",
        "--experiment",
        name,
        "--setting",
        options.setting,
    ]
    command += [
        "--results",
        str(options.results.resolve()),
        "--data",
        str(options.data.resolve()),
    ]
    command += ["--max-steps", str(options.max_steps)] if options.max_steps else []
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
