"""The main job on a real model and real data: `make demo`.

Fine-tunes all-MiniLM-L6-v2 on movie-review sentences with moving column slices and prints it beside
frozen features and
the masked-gradient baseline. `--full` (`make demo-full`) adds LoRA and full fine-tuning. Writes
demo/report.json and
demo/report.png.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two jobs side by side, one core each
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.methods import MaskedGradient
from benchmarks.quality import movie_reviews
from benchmarks.quality.sentiment import (
    SentenceClassifier,
    SentimentTask,
    Trainee,
    accuracy,
    data_folder,
    frozen_accuracy,
    groups,
)
from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.model import named_slice_layers

# As many parameters as LoRA r=8. Scattered: sixteen neighboring columns of an attention output are
# half a head.
CONFIG = SliceConfig(
    r=16,
    slice_type="column",
    contiguous=False,
    switch_interval=100,
    target_modules="all-linear",
    modules_to_save=["classifier"],
    # slices and the head alone, as LoRA of the same number of parameters beside them
    bias="none",
    norms="none",
)
LR = 2e-3
# The 60 steps beside the masked baseline move twice, so that moves are compared too.
PAIRED_STEPS, PAIRED_CONFIG = 60, replace(CONFIG, switch_interval=20)


def new_model(seed: int) -> SentenceClassifier:
    torch.manual_seed(seed)
    return SentenceClassifier()


def slicefine_trainee(
    seed: int, steps: int, bf16: bool, config: SliceConfig = CONFIG
) -> Trainee:
    model = get_slice_model(new_model(seed), config)
    return Trainee(model, SliceAdamW(groups(model, LR)), steps, bf16)


def masked_trainee(
    seed: int, steps: int, bf16: bool, config: SliceConfig = CONFIG
) -> Trainee:
    """Full dW, mask, dense Adam: the same start, the same slices."""
    twin = get_slice_model(new_model(seed), config)
    slices = {id(layer.slice_weight) for _, layer in named_slice_layers(twin)}
    # biases, norms and the new head
    whole = [
        n for n, p in twin.named_parameters() if p.requires_grad and id(p) not in slices
    ]
    specs = {name: layer.spec for name, layer in named_slice_layers(twin)}
    model = new_model(seed)
    features = lambda name, move: specs[name].features(
        "column", move % specs[name].positions("column")
    )
    masked = MaskedGradient(
        model, list(specs), features, config.switch_interval, also=tuple(whole)
    )
    optimizer = torch.optim.AdamW(groups(model, LR), weight_decay=0.0)
    return Trainee(
        model, optimizer, steps, bf16, masked.mask, lambda: masked.after_step(optimizer)
    )


def paired_run(
    task: SentimentTask,
    seed: int,
    config: SliceConfig = PAIRED_CONFIG,
    steps: int = PAIRED_STEPS,
) -> dict[str, Any]:
    """slicefine and the masked baseline in turns, step by step, in float32: losses, time and memory
    under one condition.
    """
    ours, masked = (
        slicefine_trainee(seed, task.steps, False, config),
        masked_trainee(seed, task.steps, False, config),
    )
    for i, (batch, labels) in enumerate(task.training_batches(seed)):
        if i == steps:
            break
        for trainee in (ours, masked) if i % 2 else (masked, ours):
            trainee.step(batch, labels, seed=i, measure_memory=i in (2, 3, 4))
    difference = float(np.abs(np.array(ours.losses) - np.array(masked.losses)).max())
    ratios = np.array(ours.milliseconds) / np.array(masked.milliseconds)
    return {
        "ours": ours.row("slicefine", None, seed),
        "masked": masked.row("masked", None, seed),
        "difference": difference,
        "time_ratio": [float(q) for q in np.percentile(ratios, (20, 50, 80))],
        "losses": [ours.losses, masked.losses],
    }


def _side_jobs(seed: int) -> tuple[float, dict[str, Any]]:
    torch.set_num_threads(1)
    task = SentimentTask(movie_reviews.load(data_folder()))
    return frozen_accuracy(task, bf16=True), paired_run(task, seed)


def train(trainee: Trainee, task: SentimentTask, seed: int, name: str) -> None:
    from tqdm import tqdm

    with tqdm(total=task.steps, desc=name, unit="step", mininterval=2.0) as bar:
        for i, (batch, labels) in enumerate(task.training_batches(seed)):
            loss = trainee.step(batch, labels, seed=i, measure_memory=i in (2, 3, 4))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()


def lora_trainee(seed: int, steps: int) -> Trainee:
    from peft import LoraConfig, inject_adapter_in_model

    model = new_model(seed)
    targets = ["query", "key", "value", "dense"]
    model.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=8, lora_alpha=16, target_modules=targets), model.encoder
    )
    model.classifier.requires_grad_(True)
    return Trainee(
        model, torch.optim.AdamW(groups(model, 1e-3), weight_decay=0.0), steps, True
    )


def full_trainee(seed: int, steps: int) -> Trainee:
    model = new_model(seed)
    return Trainee(
        model, torch.optim.AdamW(groups(model, 8e-5), weight_decay=0.0), steps, True
    )


def coverage_map(model: torch.nn.Module) -> dict[str, list[bool]]:
    """Module name -> which input features have trained."""
    covered = {}
    for name, layer in named_slice_layers(model):
        mask = torch.zeros(layer.in_features, dtype=torch.bool)
        for position in layer.schedule.visited["column"].nonzero().flatten().tolist():
            mask[layer.spec.features("column", position)[1]] = True
        covered[name] = mask.tolist()
    return covered


def draw(
    path: Path, pair: dict[str, Any], losses: list[float], covered: dict[str, list[bool]]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.6), width_ratios=(1, 1, 1.2)
    )
    left.plot(pair["losses"][1], lw=3, color="0.7", label="masked gradient")
    left.plot(pair["losses"][0], lw=1, color="C0", label="slicefine")
    left.set(
        title=f"{len(pair['losses'][0])} steps in turns, float32",
        xlabel="step",
        ylabel="loss",
    )
    left.legend(frameon=False)
    smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
    middle.plot(np.arange(len(smooth)) + 20, smooth, color="C0")
    for move in range(
        CONFIG.switch_interval or len(losses),
        len(losses),
        CONFIG.switch_interval or len(losses),
    ):
        middle.axvline(move, color="0.85", lw=0.8, zorder=0)
    middle.set(
        title="slicefine, bfloat16, mean of 20 steps",
        xlabel="step (lines: the slice moves)",
        ylabel="loss",
    )
    width = 384
    image = np.array(
        [
            np.interp(
                np.linspace(0, len(row) - 1, width),
                np.arange(len(row)),
                np.array(row, float),
            )
            for row in covered.values()
        ]
    )
    right.imshow(
        image,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1.4,
        interpolation="nearest",
        extent=(0, 100, len(image), 0),
    )
    right.set(
        title="input features that have trained",
        xlabel="% of the layer's input",
        ylabel="layer",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    names = {
        "frozen": "frozen features + logistic regression",
        "slicefine": "slicefine, moving column slices",
        "masked": "masked gradient, dense Adam",
        "lora": "LoRA r=8 (peft)",
        "full": "full fine-tuning",
    }
    lines = [
        f"{'method':<38}{'accuracy':>9}{'trainable':>12}{'peak memory':>13}{'time/step':>11}{'steps':>7}"
        "  measured in"
    ]
    for row in rows:
        score = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
        memory = f"{row['peak_bytes'] / 2**20:.0f} MiB" if row["peak_bytes"] else "-"
        duration = f"{row['ms_per_step']:.0f} ms" if row["ms_per_step"] else "-"
        lines.append(
            f"{names[row['method']]:<38}{score:>9}{row['trainable']:>12,d}{memory:>13}{duration:>11}{row['steps']:>7}"
            f"  {row['measured_in']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="add LoRA and full fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, seed, start = data_folder(), options.seed, time.perf_counter()
    task = SentimentTask(movie_reviews.load(folder))
    print(
        f"{len(task.train):,d} sentences to train on, {len(task.test):,d} to test on; one thread"
        " per job, two jobs",
        flush=True,
    )

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        side: Future[tuple[float, dict[str, Any]]] = pool.submit(_side_jobs, seed)
        ours = slicefine_trainee(seed, task.steps, bf16=True)
        print(ours.model.planned_coverage(task.steps), flush=True)
        train(ours, task, seed, "slicefine")
        score = accuracy(ours.model, task, bf16=True)
        frozen, pair = side.result()

    frozen_row = {
        "method": "frozen",
        "accuracy": frozen,
        "trainable": 385,
        "peak_bytes": 0,
        "ms_per_step": 0.0,
        "steps": 0,
        "seed": seed,
        "measured_in": "bfloat16",
    }
    whole_run = ours.row("slicefine", score, seed)
    others = []
    if options.full:
        for name, trainee in (
            ("lora", lora_trainee(seed, task.steps)),
            ("full", full_trainee(seed, task.steps)),
        ):
            train(trainee, task, seed, name)
            others.append(trainee.row(name, accuracy(trainee.model, task, bf16=True), seed))

    # In the report slicefine's memory and time are those beside the masked baseline; its whole run
    # stands under training_run.
    rows = [
        frozen_row,
        {**pair["ours"], "accuracy": score, "steps": len(ours.losses)},
        pair["masked"],
        *others,
    ]
    report = {
        "task": "movie-review sentiment, binary",
        "model": "all-MiniLM-L6-v2",
        "max_loss_difference_to_masked": pair["difference"],
        "time_ratio_to_masked_p20_p50_p80": pair["time_ratio"],
        "training_run": whole_run,
        "rows": rows,
        "config": CONFIG.to_dict(),
        "torch": torch.__version__,
    }
    (folder / "report.json").write_text(
        json.dumps(report, indent=2) + "\n", encoding="utf-8"
    )
    draw(folder / "report.png", pair, ours.losses, coverage_map(ours.model))
    low, middle, high = pair["time_ratio"]
    print(f"\n{table([frozen_row, whole_run, *others, pair['ours'], pair['masked']])}\n")
    print(
        f"Same start, same slices, {len(pair['losses'][0])} steps in turns, a move every"
        f" {PAIRED_CONFIG.switch_interval}:"
    )
    print(
        "  largest difference of the losses, slicefine and masked gradient:"
        f" {pair['difference']:.2e}"
    )
    print(
        f"  time per step, slicefine / masked: {middle:.2f} ({low:.2f} to {high:.2f}, 20th to 80th"
        " percentile)"
    )
    print(
        f"{time.perf_counter() - start:.0f} s. Written: {folder / 'report.json'},"
        f" {folder / 'report.png'}"
    )
