"""The three ops on a column slice, beside plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.registry import Case
from benchmarks.speed.turns import DTYPES, Contestant
from benchmarks.updates import CopyBack
from slicefine import ops
from slicefine.backends import reference
from slicefine.backends.operands import AdamWOptions, AdamWSlice

ADAMW = AdamWOptions(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
# slices that slice_adamw updates in one call
LAYERS = 8


def op_of(case: Case) -> str:
    return case.name.split("-")[0]


class Slice:
    """Operands of one column slice, made from a seed: grad (n, out), input (n, r), weight (out,
    in), master and moments.
    """

    def __init__(self, case: Case, device: str, seed: int) -> None:
        generator, dtype = torch.Generator().manual_seed(seed), DTYPES[case.dtype]
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)
        self.grad_output, self.input = (
            normal(case.tokens, case.out_features).to(dtype),
            normal(case.tokens, case.r).to(dtype),
        )
        self.weight = normal(case.out_features, case.in_features).mul_(0.02).to(dtype)
        self.cols = torch.arange(case.r, device=device)
        self.master = self.weight[:, : case.r].float().contiguous()
        self.grad = normal(case.out_features, case.r)
        self.exp_avg, self.exp_avg_sq = (
            torch.zeros_like(self.master),
            torch.zeros_like(self.master),
        )
        self.step = torch.zeros((), device=device)

    def active(self) -> AdamWSlice:
        moments = self.exp_avg, self.exp_avg_sq
        return AdamWSlice(
            self.master, self.grad, *moments, self.weight, None, self.cols, self.step
        )

    def state(self) -> tuple[Tensor, ...]:
        return self.master, self.exp_avg, self.exp_avg_sq


def adamw(slices: list[Slice], implementation: Any) -> None:
    for s in slices:
        s.step += 1
    implementation.slice_adamw([s.active() for s in slices], ADAMW)


def grad_adamw(s: Slice, implementation: Any) -> None:
    s.step += 1
    implementation.slice_grad_adamw(s.grad_output, s.input, s.active(), ADAMW)


def in_torch(case: Case, slices: list[Slice]) -> Any:
    """The same work in plain PyTorch, as a call."""
    first, op = slices[0], op_of(case)
    gradient = lambda: (first.grad_output.t() @ first.input).float()
    if op == "slice_grad":
        return gradient
    torchs = CopyBack(
        [s.weight for s in slices],
        [(None, s.cols) for s in slices],
        [s.master for s in slices],
    )
    for master, s in zip(torchs.masters, slices, strict=True):
        master.grad = s.grad

    def step() -> None:
        if op == "slice_grad_adamw":
            torchs.masters[0].grad = gradient()
        torchs.step()

    return step


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    try:
        from benchmarks.roofline import op_bytes, op_flops
    except ImportError:
        # rows then have no share of the roofline
        op_bytes = op_flops = None
    op, count = op_of(case), LAYERS if op_of(case) == "slice_adamw" else 1
    ours, theirs = ([Slice(case, device, i) for i in range(count)] for _ in range(2))
    calls = {
        "slice_grad": lambda: ops.slice_grad(ours[0].grad_output, ours[0].input, None),
        "slice_adamw": lambda: adamw(ours, ops),
        "slice_grad_adamw": lambda: grad_adamw(ours[0], ops),
    }
    shape = (case.tokens, case.out_features, case.r)
    needs = {}
    if op_bytes is not None and op_flops is not None:
        needs["nbytes"] = count * op_bytes(op, *shape, DTYPES[case.dtype].itemsize)
        needs["flops"] = count * op_flops(op, *shape)
    entries = count * case.out_features * case.r
    return {
        "torch": Contestant(in_torch(case, theirs), entries, **needs),
        "slicefine": Contestant(calls[op], entries, **needs),
    }


def check(case: Case, device: str, _: dict[str, Contestant]) -> None:
    """Against float64: at most twice float32 PyTorch's error and, for a product, two roundings of
    its sum of |products|.

    A product over many tokens is summed in another order than PyTorch's. Raises AssertionError.
    """
    op = op_of(case)
    found, plain, exact = (
        Slice(case, device, 0),
        Slice(case, device, 0),
        Slice(case, device, 0),
    )
    for name in (
        "grad_output",
        "input",
        "weight",
        "master",
        "exp_avg",
        "exp_avg_sq",
        "grad",
    ):
        setattr(exact, name, getattr(exact, name).double())
    sums = reference.slice_grad(exact.grad_output.abs(), exact.input.abs()).max().item()
    order = 0.0 if op == "slice_adamw" else 2 * torch.finfo(torch.float32).eps * sums
    if op == "slice_grad":
        truth = reference.slice_grad(exact.grad_output, exact.input)
        ours, theirs = (
            (module.slice_grad(found.grad_output, found.input, None).double() - truth)
            .abs()
            .max()
            .item()
            for module in (ops, reference)
        )
        assert ours <= 2 * theirs + order, (
            f"{case.name}: error {ours:.1e}, allowed {2 * theirs + order:.1e}"
        )
        return
    run = {
        "slice_adamw": lambda s, module: adamw([s], module),
        "slice_grad_adamw": lambda s, module: grad_adamw(s, module),
    }
    before = found.weight.clone()
    for _ in range(3):
        run[op](found, ops)
        run[op](plain, reference)
        run[op](exact, reference)
    for a, b, c in zip(found.state(), plain.state(), exact.state(), strict=True):
        bound = (
            2 * (b.double() - c).abs().max().item() + 1e-6 * c.abs().max().item() + order
        )
        assert (a.double() - c).abs().max().item() <= bound, (
            f"{case.name}: further from float64 than {bound:.1e}"
        )
    r = case.r
    assert torch.equal(found.weight[:, :r], found.master.to(found.weight.dtype)), (
        f"{case.name}: weight is not master"
    )
    assert torch.equal(found.weight[:, r:], before[:, r:]), (
        f"{case.name} wrote outside its slice"
    )
