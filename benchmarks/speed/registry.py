"""What is measured, as data: ops, layers, moves, whole training steps of a model, and how their
cost grows.

A case is a set of methods that run in turns within one process; its first method is the base of its
ratios. To add a benchmark, add a case or a method here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks.methods import Method


@dataclass(frozen=True)
class Case:
    """name: unique. part: the module that builds it. measures: one line for the report.

    dtype: of weights and activations. tokens: batch x length for models. width, depth: of the
    model; width None means the real encoder. seconds: time for its rounds, of which there are at
    least min_rounds and at most max_rounds.
    """

    name: str
    part: str
    measures: str
    methods: tuple[Method, ...]
    dtype: str = "fp32"
    tokens: int = 1280
    in_features: int = 384
    out_features: int = 1536
    r: int = 16
    length: int = 40
    depth: int = 6
    width: int | None = None
    axis: str = ""
    memory: bool = False
    seconds: float = 4.0
    min_rounds: int = 5
    max_rounds: int = 31

    @property
    def base(self) -> str:
        return self.methods[0].name


FLOOR = Method("frozen floor", "floor", equal="trains the head only")
COLUMN = Method("slice column", "slice", 16, equal="r and parameters")
COLUMN_BWD = Method(
    "slice column, optimizer_in_bwd", "slice", 16, in_bwd=True, equal="r and parameters"
)
ROW = Method("slice row", "slice", 16, "row", equal="r and parameters")
BLOCK = Method("slice block", "slice", 16, "block", equal="r")
MASKED = Method(
    "masked gradient", "masked", 16, equal="the same slices; dense gradients and moments"
)
DENSE = Method("dense AdamW", "dense", equal="the same layers, all of their weights")
LORA = Method("LoRA", "lora", 16, equal="r")

ENCODER_METHODS = (
    FLOOR,
    COLUMN,
    COLUMN_BWD,
    ROW,
    BLOCK,
    MASKED,
    DENSE,
    LORA,
    Method("LoRA r=8", "lora", 8, equal="parameters"),
    Method("LoRA-FA", "lorafa", 16, equal="r and parameters"),
    Method("DoRA", "dora", 16, equal="r"),
    Method("MiSS", "miss", 16, equal="r and parameters"),
    Method("SHiRA", "shira", 8, equal="parameters"),
    Method("VeRA", "vera", 256, equal="neither: r is peft's default"),
    Method("IA3", "ia3", equal="neither: it has no r"),
)
# peft keeps adapters in float32 beside a bfloat16 model unless told not to; every peer gets the
# faster choice, LoRA both.
LORA_FP32 = Method(
    "LoRA, float32 adapters", "lora", 16, fp32_adapters=True, equal="r; peft's default"
)
BASICS = (FLOOR, COLUMN, MASKED, LORA)
GROWTH_METHODS = (FLOOR, COLUMN, ROW, MASKED, LORA)

OPS = ("slice_grad", "slice_adamw", "slice_grad_adamw")
OP_METHODS = (
    Method("torch", "torch", equal="plain PyTorch"),
    Method("slicefine", "slicefine"),
)
LAYER_METHODS = (FLOOR, COLUMN, COLUMN_BWD, ROW, BLOCK, MASKED, DENSE, LORA)
INTERVALS = (10, 50, 100, 500)
MOVES_STEPS = 500


def _ops() -> list[Case]:
    return [
        Case(
            f"{op}-r{r}-{dtype}",
            "ops",
            f"{op}, column slice",
            OP_METHODS,
            dtype,
            in_features=1024,
            out_features=2048,
            r=r,
            seconds=0.25,
            max_rounds=21,
        )
        for op in OPS
        for dtype in ("fp32", "bf16", "fp16")
        for r in (1, 8, 16, 64)
    ]


def _layers() -> list[Case]:
    return [
        Case(
            f"layer-{n_in}x{n_out}-{dtype}",
            "layers",
            "forward, backward and update of one linear layer",
            LAYER_METHODS,
            dtype,
            in_features=n_in,
            out_features=n_out,
            seconds=1.2,
            max_rounds=15,
        )
        for n_in, n_out in ((384, 1536), (1536, 384), (1024, 1024))
        for dtype in ("fp32", "bf16")
    ]


def _moves() -> list[Case]:
    methods = (
        Method("static", "static"),
        *(Method(f"interval {n}", "moving") for n in INTERVALS),
    )
    what = (
        f"SliceAdamW.step() for the encoder's 36 column slices, mean of {MOVES_STEPS} steps with"
        " their moves"
    )
    return [Case("moves", "moves", what, methods, seconds=4.0, min_rounds=3, max_rounds=11)]


def _models() -> list[Case]:
    step = "whole training step of all-MiniLM-L6-v2, batch 32 x 40 tokens"
    return [
        Case(
            "encoder-fp32",
            "models",
            step,
            ENCODER_METHODS,
            memory=True,
            seconds=50.0,
            max_rounds=21,
        ),
        Case(
            "encoder-bf16",
            "models",
            step,
            (*ENCODER_METHODS[:8], LORA_FP32, *ENCODER_METHODS[8:]),
            "bf16",
            memory=True,
            seconds=30.0,
            max_rounds=21,
        ),
    ]


def _growth() -> list[Case]:
    shared = {
        "part": "models",
        "methods": GROWTH_METHODS,
        "depth": 2,
        "memory": True,
        "length": 32,
        "max_rounds": 9,
        "min_rounds": 3,
    }
    over_r = [
        Case(
            name=f"growth-r{r}",
            measures="first two layers of the encoder",
            axis="r",
            r=r,
            tokens=512,
            seconds=2.0,
            **shared,
        )
        for r in (4, 8, 16, 32, 64)
    ]
    over_tokens = [
        Case(
            name=f"growth-tokens{n}",
            measures="first two layers of the encoder",
            axis="tokens",
            tokens=n,
            seconds=2.0,
            **shared,
        )
        for n in (256, 512, 1024, 2048)
    ]
    over_width = [
        Case(
            name=f"growth-width{w}",
            measures="two BERT layers, random weights",
            axis="width",
            width=w,
            tokens=512,
            seconds=2.0,
            **shared,
        )
        for w in (192, 384, 768)
    ]
    return over_r + over_tokens + over_width


CASES = (*_models(), *_growth(), *_layers(), *_moves(), *_ops())


def quick_cases() -> tuple[Case, ...]:
    """One case of each kind, small: for tests and for comparing two commits."""
    chosen = {case.name: case for case in CASES}
    shrink = dataclasses.replace
    encoder = shrink(
        chosen["encoder-fp32"],
        name="encoder-quick",
        measures="training step of the encoder's first layer, 4 x 40 tokens",
        depth=1,
        tokens=160,
        methods=(FLOOR, COLUMN, COLUMN_BWD, MASKED, LORA),
        seconds=2.0,
    )
    growth = [
        shrink(
            chosen[n], name=f"{n}-quick", depth=1, tokens=128, methods=BASICS, seconds=0.5
        )
        for n in ("growth-r4", "growth-r16", "growth-width192", "growth-width384")
    ]
    growth += [
        shrink(
            chosen["growth-tokens256"],
            name=f"growth-tokens{n}-quick",
            depth=1,
            tokens=n,
            methods=BASICS,
            seconds=0.5,
        )
        for n in (64, 128)
    ]
    layer = shrink(chosen["layer-384x1536-fp32"], tokens=256, seconds=1.0)
    ops = [shrink(chosen[f"{op}-r16-fp32"], seconds=0.3) for op in OPS]
    return (
        encoder,
        *growth,
        layer,
        shrink(
            chosen["moves"],
            depth=1,
            seconds=0.5,
            measures="the same for one layer's 6 slices",
        ),
        *ops,
    )
