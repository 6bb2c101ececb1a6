"""What is kept from step to step: made once, made anew when it must be, and never in anybody's way.

Times are in docs/benchmarks.md; here is what they follow from.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops
from slicefine import kept as kept_module
from slicefine.backends import cpu
from slicefine.model import slice_layers
from slicefine.moves import _WRITES
from slicefine.slices import read_slice
from tests.configs import slices_alone

KINDS = ("column", "row", "block", "row_column")


def build(kind: str = "column", interval: int | None = None, layers: int = 3) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(layers)])
    config = SliceConfig(
        r=3, slice_type=kind, switch_interval=interval, target_modules=r"\d+"
    )
    return get_slice_model(model, config)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, 12, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()


def made_by(optimizer: Any) -> kept_module.Kept:
    (kept,) = optimizer._updates.values()
    return kept


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_operands_are_made_once_and_once_after_each_move(kind, bits):
    model = build(kind, interval=4)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2, optim_bits=bits)
    train(model, optimizer, 12)
    # the third move comes with the last step: nothing has been made for its position yet
    assert made_by(optimizer).times_made == 3
    still = build(kind)
    optimizer = SliceAdamW(still.parameters(), lr=1e-2, optim_bits=bits)
    train(still, optimizer, 12)
    assert made_by(optimizer).times_made == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_another_optimizer_writes_all_layers_in_one_call(kind, fused, monkeypatch):
    calls = []
    real = cpu.write_table
    monkeypatch.setattr(cpu, "write_table", lambda table: (calls.append(1), real(table)))
    model = build(kind, interval=3)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused
    )
    train(model, optimizer, 8)
    assert len(calls) == 8
    # a move rewrites the indices where they are; only another axis needs other operands
    assert _WRITES[optimizer].times_made == (3 if kind == "row_column" else 1)
    for layer in slice_layers(model):
        truth = read_slice(layer.weight, layer.rows, layer.cols)
        assert torch.equal(truth, layer.active(layer.slice_weight))


def transpose(layer: Any) -> None:
    # neither the address nor the dtype of the weight changes
    layer.weight.data = layer.weight.data.t()
    layer.refresh_master()


def new_memory(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.clone()


def as_float16(model: Any, optimizer: Any) -> None:
    """The bits of bfloat16 weights as those of another dtype, where they are."""
    train(model.bfloat16(), optimizer, 1)
    for layer in model:
        # what has been recorded has the dtype of before
        layer.originals = None
        for tensor in (layer.weight, layer.bias):
            tensor.data = tensor.data.view(torch.float16)
        layer.refresh_master()


def new_weight(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "weights written by hand": lambda m, o: [
        layer.weight.data.mul_(2) for layer in slice_layers(m)
    ],
    "masters written by hand": lambda m, o: [
        layer.slice_weight.data.mul_(2) for layer in slice_layers(m)
    ],
    "masters in other memory": lambda m, o: new_memory(*[x.slice_weight for x in m]),
    "weights in other memory": lambda m, o: new_memory(*[x.weight for x in m]),
    "another dtype in the same memory": as_float16,
    "a transposed weight": lambda m, o: transpose(next(slice_layers(m))),
    "another weight": lambda m, o: new_weight(next(slice_layers(m))),
    "bfloat16": lambda m, o: m.to(torch.bfloat16),
    "float64": lambda m, o: m.double(),
    "a slice that is frozen": lambda m, o: next(
        slice_layers(m)
    ).slice_weight.requires_grad_(False),
    "the state of the optimizer, loaded": lambda m, o: o.load_state_dict(
        copy.deepcopy(o.state_dict())
    ),
    "weights, loaded": lambda m, o: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}
    ),
    "weights, assigned": lambda m, o: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}, assign=True
    ),
    "moments that were replaced": lambda m, o: [
        state.update(exp_avg=state["exp_avg"] + 1) for state in o.state.values()
    ],
    "moments in other memory": lambda m, o: [
        setattr(state["exp_avg"], "data", state["exp_avg"].data + 1)
        for state in o.state.values()
    ],
    "a forgotten state": lambda m, o: o.state.clear(),
}


@pytest.mark.parametrize("kind", ["column", "row_column"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed_as_if_nothing_had_been_kept(change, kind):
    """Bit for bit, beside an optimizer whose operands are made anew at every step."""

    def run(forget: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
        if forget:
            monkeypatch.setattr(kept_module.Kept, "_right", lambda *_: False)
        model = build(kind, interval=5)
        optimizer = SliceAdamW(model.parameters(), lr=1e-2)
        train(model, optimizer, 3)
        CHANGES[change](model, optimizer)
        train(model, optimizer, 1, seed=1)
        masters = {f"master {i}": x.slice_weight.clone() for i, x in enumerate(model)}
        train(model, optimizer, 3, seed=2)
        return {**model.state_dict(), **masters}

    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = run(True, monkeypatch)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = run(False, monkeypatch)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_other_memory_under_another_optimizer():
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, optimizer, 2)
    for layer in slice_layers(model):
        new_memory(layer.weight, layer.slice_weight)
    junk = [torch.full((12, 12), 7.0) for _ in range(20)]
    train(model, optimizer, 2)
    assert _WRITES[optimizer].times_made == 2
    assert all(bool((t == 7).all()) for t in junk)
    for layer in slice_layers(model):
        assert torch.equal(layer.weight[:, layer.cols], layer.slice_weight)


def test_the_transposed_weight_of_conv1d_in_other_memory():
    """A view of the weight is among the operands, and would go on pointing to the old memory."""
    from transformers.pytorch_utils import Conv1D

    model = get_slice_model(
        nn.Sequential(Conv1D(12, 12)), slices_alone(r=3, target_modules="0")
    )
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    new_memory(model[0].weight)
    train(model, optimizer, 2)
    assert made_by(optimizer).times_made == 2
    assert torch.equal(model[0].weight[:3], model[0].slice_weight.t())


@pytest.mark.parametrize("ours", [True, False])
def test_an_optimizer_that_outlives_its_model_keeps_no_weights(ours):
    model = build()
    slices = [layer.slice_weight for layer in slice_layers(model)]
    kind: Any = SliceAdamW if ours else torch.optim.AdamW
    optimizer = kind(slices, lr=1e-2)
    train(model, optimizer, 2)
    weights = [weakref.ref(layer.weight) for layer in slice_layers(model)]
    del model
    gc.collect()
    assert [weight() for weight in weights] == [None] * 3
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_copies_of_an_optimizer_share_nothing():
    model = build()
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    pair = copy.deepcopy((model, optimizer))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(*pair, 2)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not all(torch.equal(before[k], v) for k, v in pair[0].state_dict().items())


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_without_gradients_runs_the_operators_of_nn_linear(
    kind, bias, monkeypatch
):
    """No more and no others: it takes no columns and copies nothing."""
    monkeypatch.setattr(ops, "take_columns", None)
    plain = nn.Linear(12, 12, bias=bias).requires_grad_(False)
    layer = get_slice_model(
        nn.Sequential(copy.deepcopy(plain)),
        SliceConfig(r=3, slice_type=kind, target_modules="0"),
    )[0]
    for shape in ((12,), (4, 12), (2, 3, 12), (0, 12)):
        x = torch.randn(shape)
        for context in (torch.no_grad, torch.inference_mode):
            with context(), Operators() as expected:
                y = plain(x)
            with context(), Operators() as found:
                mine = layer(x)
            assert torch.equal(mine, y)
            assert found.seen == expected.seen
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.bfloat16
    for wrong in (torch.randn(3, 11), torch.tensor(1.0)):
        with pytest.raises((RuntimeError, IndexError)) as ours, torch.no_grad():
            layer(wrong)
        with pytest.raises((RuntimeError, IndexError)) as theirs, torch.no_grad():
            plain(wrong)
        assert str(ours.value) == str(theirs.value)


def test_a_wrong_width_raises_in_the_words_of_nn_linear_with_gradients_too():
    layer, plain = build()[0], nn.Linear(12, 12)
    for wrong in (torch.randn(3, 2), torch.randn(3, 13)):
        with pytest.raises(RuntimeError) as ours:
            layer(wrong)
        with pytest.raises(RuntimeError) as theirs:
            plain(wrong)
        assert str(ours.value) == str(theirs.value)


def test_the_columns_of_few_and_of_many_tokens_are_the_same():
    cols = torch.tensor([0, 3, 7])
    x = torch.randn(300, 12)
    taken = ops.take_columns(x, cols)
    assert torch.equal(taken, x[:, cols])
    assert torch.equal(ops.take_columns(x[:5], cols), taken[:5])
    assert ops.take_columns(x[:5], cols).untyped_storage().size() == 5 * 3 * 4
