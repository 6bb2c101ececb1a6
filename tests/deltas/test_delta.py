"""Deltas: what a fine-tune changed goes to a file and back, on and off, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slicefine import (
    Delta,
    DeltaError,
    SliceAdamW,
    SliceConfig,
    SliceModel,
    get_slice_model,
)
from slicefine.deltas.delta import CONFIG_FILE, FILE
from slicefine.layer import SliceLayer
from slicefine.model import named_slice_layers
from tests.configs import slices_alone

ROOT = Path(__file__).parents[2]
SLICE_TYPES = ["column", "row", "block", "row_column"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 7), nn.BatchNorm1d(7)
        )
        self.classifier = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def train(model: nn.Module, steps: int = 9, seed: int = 0, optimizer=None) -> SliceAdamW:
    """Nine steps move a slice with interval 2 four times; more than a sweep for the narrow weights
    here.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or SliceAdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator).to(next(model.parameters()).dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def config(**options) -> SliceConfig:
    return slices_alone(
        **{
            "r": 3,
            "switch_interval": 2,
            "modules_to_save": ["classifier"],
            "bias": "slice_only",
            **options,
        }
    )


def trained(
    seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> tuple[dict[str, Tensor], SliceModel]:
    """(state of the base, the trained model)."""
    model = base(dtype=dtype)
    before = state(model)
    get_slice_model(model, config(**options))
    train(model, seed=seed)
    return before, model  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("slice_type", SLICE_TYPES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_revert_and_load_are_bit_exact(tmp_path, slice_type, contiguous, dtype):
    before, model = trained(dtype=dtype, slice_type=slice_type, contiguous=contiguous)
    after = state(model)
    # two weights and biases, the head's; biases in float16 stay frozen
    changed = 4 if dtype == torch.float16 else 6
    assert sum(not torch.equal(before[k], after[k]) for k in before) == changed
    model.save_pretrained(tmp_path)

    fresh = SliceModel.from_pretrained(base(dtype=dtype), tmp_path)
    assert same(state(fresh), after) and isinstance(fresh, Net)
    assert not any(isinstance(m, SliceLayer) for m in fresh.modules())
    with fresh.disable_adapter():
        assert same(state(fresh), before)
    assert same(state(fresh), after)

    model.revert()
    assert same(state(model), before)
    assert model.delta().weights.keys() == {"body.0.weight", "body.2.weight"}
    assert all(
        torch.equal(p.old, p.new) for w in model.delta().weights.values() for p in w.patches
    )


@pytest.mark.parametrize("slice_type", SLICE_TYPES)
def test_what_the_ledger_holds_is_what_trained_and_nothing_else(slice_type):
    """Against a copy of the whole model: the patches cover every changed entry, with the base's
    values as old.
    """
    before, model = trained(slice_type=slice_type, switch_mode="random")
    after = state(model)
    for key, weight in model.delta().weights.items():
        covered = torch.zeros(weight.shape, dtype=torch.bool)
        rebuilt = before[key].clone()
        for patch in weight.patches:
            rows = torch.arange(weight.shape[0]) if patch.rows is None else patch.rows
            cols = torch.arange(weight.shape[1]) if patch.cols is None else patch.cols
            where = rows.unsqueeze(1), cols
            covered[where] = True
            assert torch.equal(before[key][where], patch.old)
            rebuilt[where] = patch.new
        assert torch.equal(rebuilt, after[key])
        assert torch.equal(before[key][~covered], after[key][~covered])
        module = model.get_submodule(key.removesuffix(".weight"))
        assert covered.double().mean().item() >= module.schedule.coverage() - 1e-12


def test_a_delta_is_as_large_as_its_values(tmp_path):
    wide = nn.Sequential(nn.Linear(512, 512, bias=False))
    get_slice_model(wide, slices_alone(r=16, switch_interval=1))
    optimizer = SliceAdamW(wide.parameters())
    for _ in range(3):
        wide(torch.randn(2, 512)).sum().backward()
        optimizer.step()
    wide.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    values = (
        2 * 4 * 16 * 512 * 4
    )  # old and new, four positions (the last just begun), float32
    assert values < (tmp_path / FILE).stat().st_size < 1.1 * values
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["peft_type"] == "SLICEFINE"
    assert "library_name: slicefine" in (tmp_path / "README.md").read_text()


def test_statistics_that_training_moves_are_part_of_the_delta(tmp_path):
    """BatchNorm in training mode: its buffers come back with the base, and go along with the delta."""
    model = base().train()
    before = state(model)
    get_slice_model(model, config())
    train(model)
    after = state(model)
    assert not torch.equal(before["body.3.running_mean"], after["body.3.running_mean"])
    assert int(after["body.3.num_batches_tracked"]) == 9
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    with model.disable_adapter():  # pyright: ignore[reportAttributeAccessIssue]
        assert same({k: v for k, v in state(model).items()}, before)
    assert same(state(model), after)
    delta, fresh = Delta.load(tmp_path), base()
    assert {k for k, w in delta.whole.items() if w.replaces and "3." in k} == {
        f"body.3.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    delta.apply_to(fresh)
    assert same(state(fresh), after)
    delta.revert_from(fresh)
    assert same(state(fresh), before)


def test_disabled_slices_have_no_gradient_and_cannot_be_stepped():
    before, model = trained()
    after, masters = (
        state(model),
        [m.slice_weight.clone() for _, m in named_slice_layers(model)],
    )
    x = torch.randn(4, 12)
    expected = base()(x)
    optimizer = SliceAdamW(model.parameters())
    model(x).sum().backward()
    with pytest.raises(KeyError, match="mine"), model.disable_adapter():
        model.eval()
        assert torch.equal(model(x), expected)
        with model.disable_adapter():
            assert same(state(model), before)
        with pytest.raises(
            RuntimeError,
            match=(
                r"an optimizer step while the slices are disabled would be lost: leave"
                r" disable_adapter"
            ),
        ):
            optimizer.step()
        with pytest.raises(
            RuntimeError, match="loading weights while the slices are disabled"
        ):
            model.load_state_dict(before)
        optimizer.zero_grad()
        model(x).sum().backward()
        assert all(m.slice_weight.grad is None for _, m in named_slice_layers(model))
        raise KeyError("mine")  # whatever happens inside, the slices come back
    assert same(state(model), after)
    assert all(
        torch.equal(a, m.slice_weight)
        for a, (_, m) in zip(masters, named_slice_layers(model), strict=True)
    )


def test_disabling_between_forward_and_backward_keeps_the_gradient():
    """Preference training asks the base for reference values while the policy's graph waits."""
    _, model = trained()
    model.eval()
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = model(x).square().sum()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))

    with model.disable_adapter():
        stale = model.body[0](
            x.requires_grad_()
        ).sum()  # the base's weight is what this graph needs
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_a_resumed_run_still_knows_its_base(tmp_path):
    before, model = trained()
    torch.save(
        {"model": model.state_dict(), "optimizer": train(model, 3, 1).state_dict()},
        tmp_path / "c.pt",
    )
    saved = state(model)
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    for weights_first in (True, False):
        fresh = get_slice_model(base(), config())
        optimizer = SliceAdamW(fresh.parameters())
        if weights_first:
            fresh.load_state_dict(saved)
            optimizer.load_state_dict(checkpoint["optimizer"])
        else:
            optimizer.load_state_dict(checkpoint["optimizer"])
            fresh.load_state_dict(saved)
        fresh.eval()
        assert same(state(fresh), saved)
        with fresh.disable_adapter():
            assert same(state(fresh), before)
        train(fresh, 3, 2, optimizer)
        fresh.revert()
        assert same(state(fresh), before)


def test_going_back_to_an_earlier_checkpoint_of_the_same_run():
    """load_best_model_at_end: the originals stay those of the base."""
    before, model = trained()
    best = state(model)
    train(model, 6, 1)
    model.load_state_dict(best)
    with model.disable_adapter():
        assert same(state(model), before)
    assert same(state(model), best)


def test_weights_loaded_before_training_are_the_originals():
    model = get_slice_model(base(), config())
    other = state(base(seed=5))
    model.load_state_dict(other)
    train(model)
    model.revert()
    assert all(
        torch.equal(state(model)[k], other[k]) for k in ("body.0.weight", "body.2.weight")
    )


def test_copies_and_pickles_know_their_base():
    before, model = trained()
    after = state(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(state(twin), after)
        twin.revert()
        assert same(state(twin), before)
    assert same(state(model), after)


def test_a_cast_model_goes_back_to_the_cast_base():
    before, model = trained(dtype=torch.bfloat16)
    model.float()
    model.revert()
    assert same(
        state(model),
        {k: v.float() if v.is_floating_point() else v for k, v in before.items()},
    )


def test_training_goes_on_from_a_delta(tmp_path):
    before, model = trained()
    after = state(model)
    model.save_pretrained(tmp_path)
    again = SliceModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert same(state(again), after) and again.slice_config == config()
    train(again, 4, 1)
    assert not same(state(again), after)
    second = again.delta()
    fresh = base()
    second.apply_to(fresh)
    assert same(state(fresh), state(again))
    again.revert()
    assert all(
        torch.equal(state(again)[k], before[k]) for k in before if "classifier" not in k
    )


def test_conv1d_and_tied_weights(tmp_path):
    Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.c = Conv1D(6, 8)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    torch.manual_seed(0)
    plain = Tied()
    before = state(plain)
    model = get_slice_model(
        copy.deepcopy(plain), slices_alone(r=2, switch_interval=2, tied_weights="share")
    )
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = state(model)
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    delta = Delta.load(tmp_path)
    assert (
        delta.weights.keys() == {"a.weight", "c.weight"}
        and delta.weights["c.weight"].transposed
    )
    delta.apply_to(plain)
    assert same(state(plain), after) and isinstance(plain.c, Conv1D)
    delta.revert_from(plain)
    assert same(state(plain), before)
    with model.disable_adapter():  # pyright: ignore[reportCallIssue]
        assert same(state(model), before)
    assert same(state(model), after)


def test_faq_21_merged_equals_unmerged_in_bfloat16():
    _, model = trained(dtype=torch.bfloat16)
    model.eval()
    x = torch.randn(64, 12, dtype=torch.bfloat16)
    unmerged = model(x)
    model.merge_and_unload()
    assert not any(isinstance(m, SliceLayer) for m in model.modules())
    assert torch.equal(model(x), unmerged)


# Several on one base


def two_deltas(
    tmp_path, start: int = 4
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Folders a and b with deltas of different columns (start 2 positions apart), and the states of
    base, a and b.
    """
    states = []
    for name, first in (("a", 0), ("b", start)):
        model = base()
        model.body[2].requires_grad_(False)
        get_slice_model(
            model,
            slices_alone(
                r=3,
                switch_interval=2,
                start_position=first,
                target_modules=["body.0"],
                modules_to_save=[],
            ),
        )
        train(model, 3, seed=first)
        model.save_pretrained(tmp_path / name)  # pyright: ignore[reportCallIssue]
        states.append(state(model))
    return state(base()), *states


def test_disjoint_deltas_compose_in_any_order(tmp_path):
    before, a, b = two_deltas(tmp_path, 2)
    expected = {k: torch.where(a[k] != before[k], a[k], b[k]) for k in before}
    results = []
    for order in (["a", "b"], ["b", "a"]):
        model = SliceModel.from_pretrained(base(), tmp_path / "a", "a")
        model.load_adapter(tmp_path / "b", "b")
        assert model.active_adapters == ["a"] and model.adapters == ["a", "b"]
        model.set_adapter(order)
        results.append(state(model))
        model.set_adapter("b")
        assert same(state(model), b) and model.active_adapter == "b"
        model.set_adapter("a")
        assert same(state(model), a)
        model.set_adapter([])
        assert same(state(model), before)
        model.set_adapter(order)
        model.delete_adapter("a")
        assert same(state(model), b) and model.adapters == ["b"]
        assert type(model.merge_and_unload()) is Net and same(state(model), b)
    assert same(results[0], expected) and same(results[1], expected)


def test_overlapping_deltas_are_refused_or_stacked(tmp_path):
    before, a, b = two_deltas(tmp_path, 1)
    model = SliceModel.from_pretrained(base(), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    with pytest.raises(
        DeltaError,
        match=(
            r"adapters 'a' and 'b' change the same entries of body.0.weight. stack=True lets the"
            r" later one win"
        ),
    ):
        model.set_adapter(["a", "b"])
    assert same(state(model), a)
    model.set_adapter(["a", "b"], stack=True)
    changed_by_b = {k: v for k, v in b.items() if not torch.equal(v, before[k])}
    for key, value in changed_by_b.items():
        touched = torch.zeros(value.shape, dtype=torch.bool)
        patch = Delta.load(tmp_path / "b").weights[key].patches[0]
        touched[:, patch.cols] = True
        assert torch.equal(state(model)[key], torch.where(touched, b[key], a[key]))
    model.delete_adapter("a")
    assert same(state(model), b)
    model.revert()
    assert same(state(model), before)


def test_slices_in_training_are_an_adapter_too(tmp_path):
    before, a, _ = two_deltas(tmp_path, 2)
    model = get_slice_model(
        base(),
        slices_alone(r=3, start_position=2, target_modules=["body.0"]),
        adapter_name="mine",
    )
    assert model.adapters == ["mine"]
    train(model, 3)
    mine = state(model)
    model.load_adapter(tmp_path / "a", "a")
    model.set_adapter("a")
    assert same(state(model), a)
    with pytest.raises(
        DeltaError, match=r"the slices in training \('mine'\) are not applied"
    ):
        model.delta("mine")
    with pytest.raises(RuntimeError, match="the slices in training are switched off"):
        model.merge_and_unload()
    with pytest.raises(DeltaError, match="they must be the last"):
        model.set_adapter(["mine", "a"])
    model.set_adapter(["a", "mine"])
    assert same(
        state(model), {k: torch.where(a[k] != before[k], a[k], mine[k]) for k in before}
    )
    model.set_adapter("mine")
    assert same(state(model), mine)

    model.set_adapter(["a", "mine"])
    layer = model.body[0]
    layer.schedule.position["column"] = 0  # the slice moves to columns that a has changed
    layer.select_slice()
    train(model, 1)
    both = state(model)
    with pytest.raises(
        DeltaError,
        match=r"of body.0 started from other values than are there with no adapter below them",
    ):
        model.set_adapter("mine")
    assert same(state(model), both) and model.active_adapters == ["a", "mine"]
    model.set_adapter([])
    assert same(state(model), before)


def test_a_second_task_on_top_of_a_first(tmp_path):
    """Slices made on a model with an applied delta: their base is what they started from."""
    _, a, _ = two_deltas(tmp_path, 1)
    model = SliceModel.from_pretrained(base(), tmp_path / "a", "a")
    get_slice_model(
        model, slices_alone(r=3, target_modules=["body.0"]), adapter_name="second"
    )
    train(model, 3)
    both = state(model)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    delta = Delta.load(tmp_path / "second")
    assert delta.info["parents"] == [
        {"name": "a", "sha256": Delta.load(tmp_path / "a").sha256}
    ]
    with pytest.raises(
        DeltaError,
        match="trained on top of 'a', which is not loaded: load_adapter them first",
    ):
        SliceModel.from_pretrained(base(), tmp_path / "second")
    again = SliceModel.from_pretrained(base(), tmp_path / "a", "first")
    again.load_adapter(tmp_path / "second", "second")
    assert same(state(again), a)
    with pytest.raises(
        DeltaError,
        match=(
            r"adapter 'second' was trained on top of 'first': set_adapter\(\['first', 'second'\]\)"
        ),
    ):
        again.set_adapter("second")
    again.set_adapter(["first", "second"])
    assert same(state(again), both)
    again.set_adapter("first")
    assert same(state(again), a)
    again.set_adapter([])
    assert same(state(again), state(base()))
    fresh = base()
    Delta.load(tmp_path / "a").apply_to(fresh)
    delta.apply_to(fresh)
    assert same(state(fresh), both)
    model.set_adapter([])
    assert same(state(model), state(base()))


def test_weighted_merging_is_a_copy_where_it_can_be(tmp_path):
    before, a, b = two_deltas(tmp_path, 2)
    model = SliceModel.from_pretrained(base(), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.set_adapter("both")
    assert same(
        state(model), {k: torch.where(a[k] != before[k], a[k], b[k]) for k in before}
    )
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "mixed")
    model.set_adapter("mixed")
    for key, value in state(model).items():
        if value.is_floating_point():
            exact = (
                before[key].double()
                + 0.5 * (a[key].double() - before[key])
                - 2 * (b[key].double() - before[key])
            )
            assert torch.equal(value, exact.float())
    two_deltas(tmp_path, 1)  # overlapping in a column
    model.load_adapter(tmp_path / "b", "c")
    model.add_weighted_adapter(["a", "c"], [0.5, 0.25], "sum")
    c = Delta.load(tmp_path / "b")
    model.set_adapter("c")
    of_c = state(model)["body.0.weight"]
    model.set_adapter("sum")
    key = "body.0.weight"
    exact = (
        before[key].double()
        + 0.5 * (a[key].double() - before[key])
        + 0.25 * (of_c.double() - before[key])
    )
    assert torch.equal(state(model)[key], exact.float()) and c.overlap(
        Delta.load(tmp_path / "a")
    ) == [key]
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        model.add_weighted_adapter(["a", "b"], [1.0], "x")


# What must not happen


def test_another_base_is_refused_and_nothing_changes(tmp_path):
    _, model = trained()
    model.save_pretrained(tmp_path)
    cases = {
        "another base model: 2 tensors differ, such as body.0.weight, body.2.weight": base(
            seed=1
        ),
        r"body.0.weight is bfloat16 \(20, 12\) in the model; the delta was made for float32 .* dtype=torch.float32": base(
            dtype=torch.bfloat16
        ),
        "the model has no body.0.weight": nn.Sequential(nn.Linear(3, 3)),
    }
    off_slice = base()
    with torch.no_grad():
        off_slice.body[3].weight[2] += 1  # a parameter that no slice ever touches
    cases["another base model: 1 tensors differ, such as body.3.weight"] = off_slice
    for message, wrong in cases.items():
        before = state(wrong)
        with pytest.raises(DeltaError, match=message):
            SliceModel.from_pretrained(wrong, tmp_path)
        with pytest.raises(DeltaError, match=message):
            Delta.load(tmp_path).apply_to(wrong)
        assert same(state(wrong), before) and not isinstance(wrong, SliceModel)
    SliceModel.from_pretrained(
        off_slice, tmp_path, verify=False
    )  # asked for: only the replaced entries are compared
    with pytest.raises(DeltaError, match="does not hold this delta"):
        Delta.load(tmp_path).revert_from(base())


def test_names_and_missing_things_are_told(tmp_path):
    _, model = trained()
    model.save_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"expected a file, or a folder with {FILE}"
    ):
        Delta.load(tmp_path / "nowhere")
    with pytest.raises(DeltaError, match="no adapter 'x'; there are 'default'"):
        model.set_adapter("x")
    with pytest.raises(DeltaError, match="there is an adapter 'default' already"):
        model.load_adapter(tmp_path)
    with pytest.raises(DeltaError, match="are the slices in training"):
        model.delete_adapter("default")
    with pytest.raises(DeltaError, match="has slices in training; use its load_adapter"):
        Delta.load(tmp_path).apply_to(model)
    with pytest.raises(TypeError, match="Net has no save_pretrained of its own"):
        model.save_pretrained(tmp_path, whole_model=True)
    with pytest.raises(TypeError, match="expected the base model"):
        SliceModel.from_pretrained("name", tmp_path)
    loaded = SliceModel.from_pretrained(base(), tmp_path, "one")
    with pytest.raises(ValueError, match="there is an adapter 'one' already"):
        get_slice_model(loaded, config(), "one")
    loaded.set_adapter([])
    with pytest.raises(DeltaError, match="no adapter is applied"):
        loaded.save_pretrained(tmp_path)


def test_without_originals_nothing_pretends():
    _, model = trained(keep_originals=False)
    assert all(m.originals is None for _, m in named_slice_layers(model))
    for call in (model.revert, model.delta, lambda: model.disable_adapter().__enter__()):
        with pytest.raises(
            RuntimeError,
            match=r"original values were not kept \(SliceConfig\(keep_originals=False\)\)",
        ):
            call()


def test_a_thousand_corruptions_and_none_loads(tmp_path):
    """Bytes flipped, replaced, cut off, appended, moved: the file is refused with a message, by
    slicefine and nobody else.
    """
    _, model = trained(slice_type="row_column")
    model.save_pretrained(tmp_path)
    good = (tmp_path / FILE).read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    broken = tmp_path / "broken.safetensors"
    named = 0
    for number in range(1000):
        data = bytearray(good)
        # half of them in the header, where every byte of padding counts as well
        where = rng.randrange(header) if number % 2 else rng.randrange(header, len(data))
        kind = number % 5
        if kind == 0:
            data[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[where] = (data[where] + rng.randrange(1, 256)) % 256
        elif kind == 2:
            del data[where:]
        elif kind == 3:
            data[where:where] = bytes([rng.randrange(256)])
        else:
            other = rng.randrange(len(data))
            data[where], data[other] = data[other], data[where]
        if bytes(data) == good:
            continue
        broken.write_bytes(bytes(data))
        with pytest.raises(DeltaError, match="broken.safetensors is damaged") as error:
            Delta.load(broken)
        named += "the values of body." in str(
            error.value
        ) or "the values of classifier." in str(error.value)
    assert named > 100  # flips in the values name their module
    flipped = bytearray(good)
    flipped[-1] ^= 1
    broken.write_bytes(bytes(flipped))
    names = {
        entry.split("/")[0] for entry in Delta.load(tmp_path)._manifest()["weights"]
    } | set(Delta.load(tmp_path).whole)
    with pytest.raises(DeltaError) as error:
        Delta.load(broken)
    assert any(f"the values of {name} " in str(error.value) for name in names)


# A process of its own forks the ones that are killed: importing torch takes longer than the test.
KILLED = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/kernels"]
from slicefine import Delta
delta = Delta.load({folder!r})
for attempt in range(4):
    child = os.fork()
    while child == 0:
        delta.info["number"] = delta.info.get("number", 0) + 1
        delta.save({folder!r})
    time.sleep(0.1 + 0.037 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    delta = Delta.load({folder!r})
    print(delta.info.get("number"))
"""


def test_kill_9_during_save_leaves_a_whole_file(tmp_path):
    wide = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    get_slice_model(wide, slices_alone(r=256))
    wide.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    script = KILLED.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = done.stdout.split()
    # it was killed while it was saving
    assert len(numbers) == 4 and len(set(numbers)) > 1, numbers


def test_a_save_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    _, model = trained()
    model.save_pretrained(tmp_path)
    good = (tmp_path / FILE).read_bytes()
    train(model, 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slicefine.deltas.container._write_values", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == good and not list(tmp_path.glob(".*.tmp"))


def test_the_same_delta_is_the_same_file(tmp_path):
    first = trained()[1].delta().save(tmp_path / "a")
    assert first == trained()[1].delta().save(tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert Delta.load(tmp_path / "a").sha256 == first


def test_push_to_hub_uploads_what_save_pretrained_writes(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    uploads = {}

    class Api:
        def __init__(self, token):
            assert token == "t"

        def create_repo(self, repo_id, exist_ok, private):
            assert exist_ok and private
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            for path in Path(folder_path).iterdir():
                uploads[path.name] = path.read_bytes()
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    _, model = trained()
    assert model.push_to_hub("task", token="t", private=True) == "https://hub/me/task"
    assert uploads.keys() == {FILE, CONFIG_FILE, "README.md"}

    def download(repo_id, allow_patterns):
        for name, content in uploads.items():
            (tmp_path / name).write_bytes(content)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert same(state(SliceModel.from_pretrained(base(), "me/task")), state(model))
