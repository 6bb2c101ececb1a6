"""A step of a Llama-3.2-3B-shaped model, random weights: slices beside the frozen floor, masked
gradients, dense AdamW and peft.

Every method gets the same input: embeddings that need a gradient, so that the floor (nothing
    trains, dX through every layer) is
what no method that keeps its weights dense can undercut. Memory is read with the method's model
alone on the device; times are
taken in turns with a floor model beside it, and a ratio is the median over the rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import MaskedGradient
from benchmarks.gpu.correctness import backends
from benchmarks.gpu.job import Job, bar
from benchmarks.layers import MissingPeerError
from benchmarks.record import quantiles
from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT = {"lora": "LoraConfig", "miss": "MissConfig", "shira": "ShiraConfig"}
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
class Method:
    """kind: "floor", "slice", "masked", "full" or a peft method; targets: which linear layers
    train.
    """

    name: str
    kind: str
    targets: tuple[str, ...]
    r: int = 16
    slice_type: str = "column"
    in_bwd: bool = False
    fp32_adapters: bool = False

    @property
    def layers(self) -> str:
        return "q, v" if self.targets == QV else "all linears" if self.targets == ALL else "none"


FLOOR = Method("floor", "floor", ())
# The important ones first: time may not be enough for all.
METHODS = (
    Method("slice column", "slice", ALL),
    Method("lora", "lora", ALL),
    Method("slice column", "slice", QV),
    Method("lora", "lora", QV),
    Method("slice column, optimizer_in_bwd", "slice", ALL, in_bwd=True),
    Method("masked gradient", "masked", QV),
    Method("slice row", "slice", ALL, slice_type="row"),
    Method("full AdamW", "full", ALL),
    Method("miss", "miss", ALL),
    Method("shira", "shira", ALL),
    Method("lora", "lora", ALL, r=32),
    Method("lora", "lora", QV, r=32),
    Method("lora, fp32 adapters (peft's default)", "lora", ALL, fp32_adapters=True),
    Method("miss", "miss", QV),
    Method("shira", "shira", QV),
    Method("slice row", "slice", QV, slice_type="row"),
    Method("slice column, optimizer_in_bwd", "slice", QV, in_bwd=True),
    Method("masked gradient", "masked", ALL),
)
SMALL = (METHODS[0], METHODS[1], METHODS[5], METHODS[8], METHODS[9])


@dataclass
class Trainer:
    """step(): forward, backward, update and zero_grad of one batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    before: Callable[[], None] | None
    ids: Tensor

    def step(self) -> Tensor:
        embeddings = self.model.get_input_embeddings()(self.ids)
        if not embeddings.requires_grad:
            embeddings.requires_grad_()
        loss = self.model(inputs_embeds=embeddings, labels=self.ids, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            if self.before is not None:
                self.before()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
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


def random_mask(base_layer: nn.Linear, r: int, **_: Any) -> Tensor:
    """What peft's own mask for SHiRA is, drawn on the layer's device: drawn on the host it takes a
    minute for this model.
    """
    weight = base_layer.weight
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]] = True
    return mask.view(weight.shape)


def peft_model(method: Method, model: nn.Module) -> nn.Module:
    """Raises MissingPeerError where peft, or the method in it, is missing."""
    try:
        import peft
    except ImportError as error:
        raise MissingPeerError(f"peft is missing: {error}") from None
    if not hasattr(peft, PEFT[method.kind]):
        raise MissingPeerError(f"peft {peft.__version__} has no {PEFT[method.kind]}")
    options: dict[str, Any] = {"r": method.r, "target_modules": list(method.targets)}
    if method.kind == "lora":
        options["lora_alpha"] = method.r
    config = getattr(peft, PEFT[method.kind])(**options)
    if method.kind == "shira":
        config.mask_fn = random_mask
    return peft.get_peft_model(model, config, autocast_adapter_dtype=method.fp32_adapters)


def trainer(method: Method, ids: Tensor, shape: dict[str, Any]) -> Trainer:
    """A new model, prepared for the method, with its optimizer."""
    device = ids.device.type
    fused = device == "cuda"
    model, before = llama(device, shape), None
    if method.kind == "floor":
        return Trainer(model, None, None, ids)
    if method.kind == "slice":
        config = SliceConfig(
            r=method.r,
            slice_type=method.slice_type,
            switch_interval=None,
            target_modules=list(method.targets),
        )
        get_slice_model(model, config)
        return Trainer(
            model, SliceAdamW(model.parameters(), optimizer_in_bwd=method.in_bwd), None, ids
        )
    if method.kind == "masked":
        names = [
            name for name, _ in model.named_modules() if name.rpartition(".")[2] in method.targets
        ]
        chosen = torch.arange(method.r, device=device)
        masked = MaskedGradient(model, names, lambda name, move: (None, chosen), None)
        parameters, before = list(masked.parameters()), masked.mask
    else:
        model = model.requires_grad_(True) if method.kind == "full" else peft_model(method, model)
        parameters = [p for p in model.parameters() if p.requires_grad]
    return Trainer(
        model, torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused), before, ids
    )


def clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(
    method: Method, ids: Tensor, shape: dict[str, Any], steps: int = 3
) -> tuple[Trainer, dict[str, float]]:
    """Peaks of the first steps, in GiB, and the trainer that took them; on a CPU nothing is read."""
    device = ids.device.type
    clean(device)
    found = trainer(method, ids, shape)
    clean(device)
    losses = [found.step() for _ in range(steps)]
    if not bool(torch.stack(losses).isfinite().all()):
        raise RuntimeError(f"{method.name}: losses {torch.stack(losses).tolist()}")
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
    method: Method, ids: Tensor, shape: dict[str, Any], floor: dict[str, float], rounds: int
) -> dict[str, Any]:
    """Memory first, then times beside a floor model."""
    ours, peaks = memory(method, ids, shape)
    beside = trainer(FLOOR, ids, shape)
    times = in_turns({"floor": beside.step, "method": ours.step}, ids.device.type, rounds)
    ratios = quantiles([m / f for m, f in zip(times["method"], times["floor"], strict=True)])
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
    shape, methods, batch, rounds = (
        (TINY, SMALL, (2, 8), 1) if job.small else (LLAMA_3B, METHODS, (4, 768), 10)
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
    for method in job.within_time(methods, 8.0):
        label = {"method": method.name, "layers": method.layers, "r": method.r}
        with job.attempt(peer=method.kind in PEFT, **label), ops.use_backend(names[0]):
            try:
                row = method_row(method, ids, shape, floor, rounds)
            except MissingPeerError as error:
                job.row(**label, absent=str(error))
                continue
            job.row(**label, **row)
            if method.kind == "slice" and method.slice_type == "column":
                what = f"model step, {method.name}, {method.layers}"
                job.bars.append(
                    bar(f"{what}: time / frozen floor", row["ratio_to_floor"], 1.05, most=True)
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
