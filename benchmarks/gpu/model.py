"""A step of a Llama-3.2-3B-shaped model, random weights: slices beside the frozen baseline, masked
gradients, dense AdamW and peft.

Every method gets the same input: embeddings that need a gradient, so that the floor (nothing
trains, dX through every layer) is what no method that keeps its weights dense can undercut. Memory
is read with the method's model alone on the device; times are taken in turns with a floor model
beside it, and a ratio is the median over the rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.correctness import backends
from benchmarks.gpu.job import Job, bar
from benchmarks.methods import (
    PEFT,
    RANK,
    Method,
    MissingPeerError,
    Prepared,
    linear_names,
    prepare,
)
from benchmarks.record import quantiles
from slicefine import ops
from slicefine.lean.apply import lean

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Run:
    """A method on some of the linear layers, by the last part of their names."""

    method: Method
    targets: tuple[str, ...]
    # the switches of `slicefine.lean`; None leaves the model as it is
    lean: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        switches = "" if self.lean is None else ", ".join(["", "lean", *self.lean])
        return self.method.name + switches

    @property
    def layers(self) -> str:
        return {QV: "q, v", ALL: "all linears"}.get(self.targets, "none")


FLOOR = Run(Method("floor", "floor"), ())
COLUMN = Method("slice column", "slice", RANK)
COLUMN_BWD = Method("slice column, optimizer_in_bwd", "slice", RANK, in_bwd=True)
ROW = Method("slice row", "slice", RANK, slice_type="row")
MASKED = Method("masked gradient", "masked", RANK)
FULL = Method("full AdamW", "full")
LORA = Method("lora", "lora", RANK)
LORA_32 = Method("lora", "lora", 32)
LORA_FP32 = Method("lora, fp32 adapters (peft's default)", "lora", RANK, fp32_adapters=True)
MISS = Method("miss", "miss", RANK)
SHIRA = Method("shira", "shira", RANK)
# The important ones first: time may not be enough for all.
RUNS = (
    Run(COLUMN, ALL),
    Run(LORA, ALL),
    Run(COLUMN, QV),
    Run(LORA, QV),
    Run(COLUMN_BWD, ALL),
    Run(MASKED, QV),
    Run(ROW, ALL),
    Run(FULL, ALL),
    Run(MISS, ALL),
    Run(SHIRA, ALL),
    Run(COLUMN, ALL, {}),
    Run(COLUMN, ALL, {"checkpoint": "full"}),
    Run(ROW, ALL, {}),
    Run(COLUMN, ALL, {"checkpoint": "full", "offload": "activations"}),
    Run(LORA_32, ALL),
    Run(LORA_32, QV),
    Run(LORA_FP32, ALL),
    Run(MISS, QV),
    Run(SHIRA, QV),
    Run(ROW, QV),
    Run(COLUMN_BWD, QV),
    Run(MASKED, ALL),
)
SMALL = (RUNS[0], RUNS[1], RUNS[5], RUNS[8], RUNS[9], RUNS[10])


@dataclass
class Trainer:
    """step(): forward, backward, update and zero_grad of one batch."""

    prepared: Prepared
    ids: Tensor

    def step(self) -> Tensor:
        model: Any = self.prepared.model
        embeddings = model.get_input_embeddings()(self.ids)
        if not embeddings.requires_grad:
            embeddings.requires_grad_()
        loss = model(inputs_embeds=embeddings, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.prepared.update()
        return loss.detach()


def llama(device: str, shape: dict[str, Any]) -> nn.Module:
    """Random bfloat16 weights, made on the device. Raises MissingPeerError without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingPeerError(f"transformers is missing: {error}") from None
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def trainer(run: Run, ids: Tensor, shape: dict[str, Any]) -> Trainer:
    """A new model, prepared for the method, with its optimizer."""
    device = ids.device.type
    model = llama(device, shape)
    names = linear_names(model, run.targets)
    prepared = prepare(run.method, model, names, fused=device == "cuda")
    if run.lean is not None:
        lean(prepared.model, verbose=False, **run.lean)
    return Trainer(prepared, ids)


def clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(
    run: Run, ids: Tensor, shape: dict[str, Any], steps: int = 3
) -> tuple[Trainer, dict[str, float]]:
    """Peaks of the first steps, in GiB, and the trainer that took them; on a CPU nothing is read."""
    device = ids.device.type
    clean(device)
    found = trainer(run, ids, shape)
    clean(device)
    losses = [found.step() for _ in range(steps)]
    if not bool(torch.stack(losses).isfinite().all()):
        raise RuntimeError(f"{run.method.name}: losses {torch.stack(losses).tolist()}")
    if device != "cuda":
        return found, {"allocated_gib": 0.0, "reserved_gib": 0.0}
    torch.cuda.synchronize()
    return found, {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def in_turns(
    steps: dict[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each in each round, the device idle at both ends; the order turns. Two rounds
    warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for i in range(rounds + 2):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def method_row(
    run: Run, ids: Tensor, shape: dict[str, Any], floor: dict[str, float], rounds: int
) -> dict[str, Any]:
    """Memory first, then times beside a floor model."""
    ours, peaks = memory(run, ids, shape)
    beside = trainer(FLOOR, ids, shape)
    times = in_turns({"floor": beside.step, "method": ours.step}, ids.device.type, rounds)
    ratios = quantiles(
        [m / f for m, f in zip(times["method"], times["floor"], strict=True)]
    )
    p20, p50, p80 = quantiles(times["method"])
    row = {
        "ms": p50,
        "p20_ms": p20,
        "p80_ms": p80,
        "floor_ms": quantiles(times["floor"])[1],
        "ratio_to_floor": ratios[1],
        "ratio_p20": ratios[0],
        "ratio_p80": ratios[2],
        "tokens_per_s": ids.numel() / p50 * 1e3,
        **peaks,
    }
    for name, value in floor.items():
        if value:
            row[f"{name.removesuffix('_gib')}_to_floor"] = peaks[name] / value
    return row


def model(job: Job) -> None:
    """Batch 4 x 768, q and v as well as all linear layers."""
    names = backends(job)
    shape, runs, batch, rounds = (
        (TINY, SMALL, (2, 8), 1) if job.small else (LLAMA_3B, RUNS, (4, 768), 10)
    )
    ids = torch.randint(0, shape["vocab_size"], batch, device=job.device)
    try:
        alone, floor = memory(FLOOR, ids, shape)
    except MissingPeerError as error:
        job.missing = str(error)
        return
    ms = quantiles(in_turns({"floor": alone.step}, job.device, rounds)["floor"])[1]
    job.row(
        method="floor",
        layers="none",
        ms=ms,
        ratio_to_floor=1.0,
        tokens_per_s=ids.numel() / ms * 1e3,
        **floor,
    )
    del alone
    for run in job.within_time(runs, 8.0):
        method = run.method
        label = {"method": run.name, "layers": run.layers, "r": method.r}
        with job.attempt(peer=method.kind in PEFT, **label), ops.use_backend(names[0]):
            try:
                row = method_row(run, ids, shape, floor, rounds)
            except MissingPeerError as error:
                job.row(**label, absent=str(error))
                continue
            job.row(**label, **row)
            # a lean step is below the floor in memory, and with checkpoints above it in time
            if (
                method.kind == "slice"
                and method.slice_type == "column"
                and run.lean is None
            ):
                what = f"model step, {method.name}, {run.layers}"
                job.bars.append(
                    bar(
                        f"{what}: time / frozen baseline",
                        row["ratio_to_floor"],
                        1.05,
                        most=True,
                    )
                )
                for peak in ("allocated", "reserved"):
                    if f"{peak}_to_floor" in row:
                        job.bars.append(
                            bar(
                                f"{what}: peak {peak} memory / floor",
                                row[f"{peak}_to_floor"],
                                1.01,
                                most=True,
                            )
                        )
