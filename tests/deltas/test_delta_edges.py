"""Deltas where they are likely to break: casts, adapters under slices, running statistics, odd
files and odd names.
"""

from __future__ import annotations

import copy
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slicefine
from slicefine import Delta, DeltaError, SliceAdamW, SliceModel
from slicefine.atomic import replacing, tensor_sha256
from slicefine.deltas.delta import FILE, FullDelta, SliceValues, WeightDelta
from slicefine.deltas.format import delta_path, write_file
from slicefine.layer import SliceLayer
from slicefine.model import named_slice_layers
from slicefine.originals import Originals
from slicefine.slices import SliceSpec, read_slice
from tests.configs import slices_alone
from tests.deltas import test_delta

# the methods of a model with slices are mixed into its class, where no type checker sees them
get_slice_model: Any = slicefine.get_slice_model
state: Any = test_delta.state
trained: Any = test_delta.trained
base: Any = test_delta.base
config, same, train, two_deltas = (
    test_delta.config,
    test_delta.same,
    test_delta.train,
    test_delta.two_deltas,
)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


# The originals


@pytest.mark.parametrize("seed", range(12))
def test_any_run_reverts_to_its_base(tmp_path, seed):
    """Random shapes, slices and events, several sweeps long: copies, resumes, deltas, disabling;
    against a copy of the base.
    """
    rng = random.Random(seed)
    out_features, in_features = rng.randint(3, 14), rng.randint(3, 14)
    slice_type = ["column", "row", "block", "row_column"][seed % 4]
    options = {
        "r": rng.randint(1, min(out_features, in_features)),
        "slice_type": slice_type,
        "switch_interval": 1,
    }
    options |= {
        "switch_mode": rng.choice(["ascending", "random", "descending"]),
        "contiguous": rng.random() < 0.5,
    }
    if slice_type == "block":
        options["r_out"] = rng.randint(1, out_features)
    dtype = rng.choice([torch.float32, torch.bfloat16])
    torch.manual_seed(seed)
    pristine = nn.Sequential(nn.Linear(in_features, out_features)).to(dtype)
    before = state(pristine)

    def fresh() -> tuple[Any, SliceAdamW]:
        model = get_slice_model(copy.deepcopy(pristine), slices_alone(**options))
        return model, SliceAdamW(model.parameters(), lr=0.1)

    model, optimizer = fresh()
    for _ in range(rng.randint(20, 120)):
        model(torch.randn(3, in_features, dtype=dtype)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        event = rng.random()
        if event < 0.05:
            with model.disable_adapter():
                assert same(state(model), before)
        elif event < 0.07:
            model = copy.deepcopy(model)
            optimizer = SliceAdamW(model.parameters(), lr=0.1)
        elif event < 0.10:
            saved = [model.state_dict(), optimizer.state_dict()]
            model, optimizer = fresh()
            for i in rng.sample([0, 1], 2):
                [model, optimizer][i].load_state_dict(saved[i])
        elif event < 0.12:
            model.save_pretrained(tmp_path)
            model = SliceModel.from_pretrained(
                copy.deepcopy(pristine), tmp_path, is_trainable=True
            )
            optimizer = SliceAdamW(model.parameters(), lr=0.1)
    after = state(model)
    assert not same(after, before)
    plain = copy.deepcopy(pristine)
    model.delta().apply_to(plain)
    assert same(state(plain), after)
    model.delta().revert_from(plain)
    assert same(state(plain), before)
    with model.disable_adapter():
        assert same(state(model), before)
    assert same(state(model), after)


def test_a_ledger_stays_small():
    """Blocks and columns are joined as they come, and no entry is kept by both axes once one of
    them is complete.
    """
    for slice_type, positions in (("block", 16 * 16), ("row_column", 16)):
        spec = SliceSpec(64, 64, slice_type, 4, 4)
        originals, weight = Originals(spec), torch.randn(64, 64)
        for position in range(positions):
            for axis in spec.axes:
                rows, cols = spec.features(axis, position)
                originals.record(read_slice(weight, rows, cols), rows, cols)
        originals.join()
        assert len(originals.slices) == (16 if slice_type == "block" else 2)
        assert originals.nbytes <= weight.numel() * 4 * (
            1 if slice_type == "block" else 31 / 16
        )
        assert originals.holds(weight)


def test_many_blocks_fit_in_a_file(tmp_path):
    """One patch per row of blocks: one per block would pass safetensors' largest header on a real
    model.
    """
    model = get_slice_model(
        nn.Sequential(nn.Linear(64, 64, bias=False)),
        slices_alone(r=1, slice_type="block", switch_interval=1),
    )
    layer = model[0]
    for _ in range(64 * 64):
        layer.schedule.move(lambda axis: torch.zeros(1))
        layer.select_slice()
    model.save_pretrained(tmp_path)
    assert len(Delta.load(tmp_path).weights["0.weight"].patches) == 64
    with open(tmp_path / FILE, "rb") as file:
        assert int.from_bytes(file.read(8), "little") < 64_000


def test_a_header_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    _, model = trained()
    model.save_pretrained(tmp_path)
    good = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr("slicefine.deltas.container.LONGEST_HEADER", 100)
    with pytest.raises(
        ValueError, match="would have a header of .* bytes; safetensors reads at most 100"
    ):
        model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == good


# What the originals are


def test_loading_weights_into_a_run_that_goes_on_from_a_delta_keeps_its_base(tmp_path):
    """Trainer loads a checkpoint before the first step."""
    before, model = trained()
    model.save_pretrained(tmp_path)
    again = SliceModel.from_pretrained(base(), tmp_path, is_trainable=True)
    again.load_state_dict(again.state_dict())
    again.revert()
    assert all(
        torch.equal(state(again)[k], before[k]) for k in before if "classifier" not in k
    )


def test_a_resume_without_the_slices_own_state_does_not_take_the_checkpoint_for_the_base():
    """torch's AdamW in Trainer: a delta from the checkpoint would be of a base that nobody has."""
    _, model = trained()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(
        model, 2, optimizer=optimizer
    )  # between two moves: right after one the moments tell nothing
    resumed = get_slice_model(base(), config())
    resumed.load_state_dict(model.state_dict())
    other = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad])
    other.load_state_dict(optimizer.state_dict())
    with pytest.warns(
        UserWarning, match="what the base was is lost: load_slice_state_dict"
    ):
        train(resumed, 1, optimizer=other)
    with pytest.raises(
        RuntimeError,
        match="original values were not kept .* resume with the slices' own state",
    ):
        resumed.delta()


def test_running_statistics_belong_to_the_fine_tune(tmp_path):
    model = base().train()
    before = state(model)
    get_slice_model(model, config())
    train(model)
    after = state(model)
    assert not torch.equal(before["body.3.running_mean"], after["body.3.running_mean"])
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert same(state(model), before)
    assert same(state(model), after)
    assert same(state(SliceModel.from_pretrained(base(), tmp_path)), after)
    _, still = trained()  # in evaluation mode they do not change, and are in nobody's way
    assert not any("running" in key for key in still.delta().whole)


def test_a_state_dict_hook_that_hands_out_copies():
    model = base()
    model._register_state_dict_hook(
        lambda module, tensors, prefix, meta: {k: v.clone() for k, v in tensors.items()}
    )
    before = state(model)
    get_slice_model(model, config())
    train(model)
    after = state(model)
    with model.disable_adapter():
        assert same(state(model), before)
    assert same(state(model), after)
    model.delta().check_base(base())


def test_nan_and_minus_zero_are_bits_like_others(tmp_path):
    model = base()
    with torch.no_grad():
        model.body[0].weight[0, :2] = torch.tensor([float("nan"), -0.0])
    plain = copy.deepcopy(model)
    get_slice_model(model, slices_alone(r=3, target_modules=["body.0"]))
    model.save_pretrained(tmp_path)
    Delta.load(tmp_path).apply_to(plain)
    Delta.load(tmp_path).revert_from(plain)
    with torch.no_grad():
        plain.body[0].weight[0, 1] = 0.0
    with pytest.raises(DeltaError, match=r"does not hold this delta: body.0.weight"):
        Delta.load(tmp_path).revert_from(plain)


# Casts


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_adapters_follow_a_cast(tmp_path, dtype):
    before, model = trained()
    after = state(model)
    model.save_pretrained(tmp_path)
    for applied in (True, False):
        loaded = SliceModel.from_pretrained(base(), tmp_path)
        loaded.set_adapter("default" if applied else [])
        loaded.to(dtype)
        loaded.set_adapter("default")
        assert same(state(loaded), cast(after, dtype))
        with loaded.disable_adapter():
            assert same(state(loaded), cast(before, dtype))
        assert same(state(loaded), cast(after, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_cast_while_disabled_leaves_masters_that_agree(dtype):
    """A step that changes nothing must change nothing: the masters had more bits than the bfloat16
    weights.
    """
    before, model = trained(dtype=torch.bfloat16)
    after = state(model)
    with model.disable_adapter():
        model.to(dtype)
        assert same(state(model), cast(before, dtype))
    assert same(state(model), cast(after, dtype))
    for _, layer in named_slice_layers(model):
        truth = read_slice(layer.weight_matrix, layer.rows, layer.cols)
        assert torch.equal(layer.active(layer.slice_weight).to(dtype), truth)
    train(model, 1, optimizer=SliceAdamW(model.parameters(), lr=0.0))
    assert same(state(model), cast(after, dtype))


def test_a_resume_in_another_dtype_can_be_reverted():
    before, model = trained(dtype=torch.bfloat16)
    optimizer = train(model, 3)
    wider = get_slice_model(base(dtype=torch.bfloat16).float(), config())
    wider.load_state_dict(model.state_dict())
    SliceAdamW(wider.parameters()).load_state_dict(optimizer.state_dict())
    with wider.disable_adapter():
        assert same(state(wider), cast(before, torch.float32))


def test_an_update_in_backward_is_refused_while_disabled():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 5))
    before = state(model)
    get_slice_model(model, slices_alone(r=2))
    optimizer = SliceAdamW(model.parameters(), optimizer_in_bwd=True)
    loss = model(torch.randn(4, 6)).square().sum()
    with (
        model.disable_adapter(),
        pytest.raises(
            RuntimeError, match="an update in backward while the slices are disabled"
        ),
    ):
        loss.backward()
    optimizer.zero_grad()
    with model.disable_adapter():
        assert same(state(model), before)


# Slices on top of an adapter


def on_top(tmp_path) -> SliceModel:
    """Slices that have swept over what the adapter a below them has changed."""
    two_deltas(tmp_path, 1)
    model = SliceModel.from_pretrained(base(), tmp_path / "a", "a")
    get_slice_model(
        model,
        slices_alone(r=3, switch_interval=1, target_modules=["body.0"]),
        adapter_name="second",
    )
    train(model, 5)
    return model


def test_slices_over_an_adapter_come_back(tmp_path):
    model = on_top(tmp_path)
    both = state(model)
    model.set_adapter([])
    assert same(state(model), state(base()))
    model.set_adapter(["a", "second"])
    assert same(state(model), both)


def test_an_adapter_below_slices_cannot_be_pulled_out(tmp_path):
    model = on_top(tmp_path)
    both = state(model)
    with pytest.raises(
        DeltaError,
        match="started from other values than are there with no adapter below them",
    ):
        model.delete_adapter("a")
    assert model.adapters == ["second", "a"] and same(state(model), both)


def test_reverted_slices_have_the_base_for_their_originals(tmp_path):
    model = on_top(tmp_path)
    model.revert()
    with model.disable_adapter():
        assert same(state(model), state(base()))
    model.delta().check_base(base())


def test_a_head_below_slices_is_the_head_they_started_from(tmp_path):
    _, first = trained()
    first.save_pretrained(tmp_path)
    model = SliceModel.from_pretrained(base(), tmp_path, "first")
    get_slice_model(model, config(), adapter_name="second")
    train(model, 3)
    both = state(model)
    with pytest.raises(DeltaError, match="started from other values"):
        model.set_adapter("second")
    assert same(state(model), both)
    model.set_adapter("first")
    assert same(state(model), state(first))
    model.set_adapter(["first", "second"])
    assert same(state(model), both)


def test_deleting_inside_disable_adapter(tmp_path):
    before, _, b = two_deltas(tmp_path, 2)
    model = SliceModel.from_pretrained(base(), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    model.set_adapter(["a", "b"])
    with model.disable_adapter():
        model.delete_adapter("a")
        assert same(state(model), before)
    assert model.active_adapters == ["b"] and same(state(model), b)


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_an_error_in_the_middle_of_a_switch_leaves_what_was(
    tmp_path, fails_at, monkeypatch
):
    """Such as running out of memory: every write of the switch fails once, the ones that repair do
    not.
    """
    two_deltas(tmp_path, 1)
    before, model = trained()
    after = state(model)
    model.load_adapter(tmp_path / "b", "b")
    calls = 0

    def failing(call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise MemoryError("here")
            return call(*args, **kwargs)

        return wrapper

    for owner, name in (
        (Originals, "exchange"),
        (Originals, "write"),
        (Delta, "write"),
        (Delta, "read"),
    ):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    try:
        model.set_adapter("b")
    except MemoryError:
        assert same(state(model), after) and model.active_adapters == ["default"]
    model.set_adapter("default")
    assert same(state(model), after)
    with model.disable_adapter():
        assert same(state(model), before)


def test_a_delta_that_its_config_does_not_fit_leaves_the_model_plain(tmp_path):
    for name in ("body.0", "body.2"):
        model = get_slice_model(base(), slices_alone(r=3, target_modules=[name]))
        train(model, 3)
        model.save_pretrained(tmp_path / name)
    model = SliceModel.from_pretrained(base(), tmp_path / "body.0", "a")
    model.load_adapter(tmp_path / "body.2", "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="linear")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    plain = base()
    before = state(plain)
    with pytest.raises(
        DeltaError,
        match=r"the delta changes body.2.weight, which its own SliceConfig does not train",
    ):
        SliceModel.from_pretrained(plain, tmp_path / "both", is_trainable=True)
    assert same(state(plain), before) and not isinstance(plain, SliceModel)
    assert not any(isinstance(m, SliceLayer) for m in plain.modules())


def test_merging_deltas_of_blocks(tmp_path):
    """Joined blocks of one row of blocks are added up entry by entry, against float64."""
    before, states = state(base()), []
    for name, start in (("a", 0), ("b", 1)):
        model = get_slice_model(
            base(),
            slices_alone(
                r=4,
                r_out=5,
                slice_type="block",
                switch_interval=1,
                start_position=start,
                target_modules=["body.0"],
            ),
        )
        train(model, 2, seed=start)
        model.save_pretrained(tmp_path / name)
        states.append(state(model))
    model = SliceModel.from_pretrained(base(), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum")
    model.set_adapter("sum")
    exact = before["body.0.weight"].double()
    exact = exact + sum(
        w * (s["body.0.weight"].double() - before["body.0.weight"])
        for w, s in zip((0.5, 2.0), states, strict=True)
    )
    assert torch.equal(state(model)["body.0.weight"], exact.float())
    with pytest.raises(ValueError, match="combination_type is 'ties'; expected 'linear'"):
        model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "other", combination_type="ties")


# Files


def one_patch(
    rows: list[int] | None, cols: list[int] | None, old: Tensor, new: Tensor
) -> Delta:
    index = [None if i is None else torch.tensor(i) for i in (rows, cols)]
    return Delta(
        {
            "body.0.weight": WeightDelta(
                (20, 12), False, "x", [SliceValues(index[0], index[1], old, new)]
            )
        },
        base={"sha256": "x"},
    )


@pytest.mark.parametrize(
    ("delta", "problem"),
    {
        "negative": (
            one_patch(None, [-1, 0], torch.zeros(20, 2), torch.ones(20, 2)),
            "does not follow 0 within 12",
        ),
        "outside": (
            one_patch(None, [5, 500], torch.zeros(20, 2), torch.ones(20, 2)),
            r"\[500, 1\] does not follow 6",
        ),
        "descending": (
            one_patch(None, [3, 1], torch.zeros(20, 2), torch.ones(20, 2)),
            "does not follow 4 within 12",
        ),
        "twice": (
            one_patch(None, [3, 3], torch.zeros(20, 2), torch.ones(20, 2)),
            "does not follow 4 within 12",
        ),
        "broadcast": (
            one_patch([0, 1], [3, 4], torch.zeros(1), torch.ones(1)),
            r"of shape \(1,\) and \(1,\) for \(2, 2\)",
        ),
        "narrow": (
            one_patch(None, [3, 4], torch.zeros(20, 2), torch.ones(20, 1)),
            r"and \(20, 1\) for \(20, 2\)",
        ),
        "dtypes": (
            one_patch(None, [3, 4], torch.zeros(20, 2), torch.ones(20, 2).half()),
            "several dtypes",
        ),
        "empty": (
            Delta({"body.0.weight": WeightDelta((20, 12), False, "x", [])}),
            "has no patches",
        ),
        "whole": (
            Delta({}, {"b": FullDelta(torch.zeros(2), torch.ones(1), True)}),
            "different shape or dtype",
        ),
    }.values(),
)
def test_a_whole_file_with_nonsense_in_it_is_refused(tmp_path, delta, problem):
    """Hashes tell damage, not malice: indices out of range would be a device-side assertion on a
    GPU. What a reader refuses is not written either.
    """
    with pytest.raises(ValueError):
        delta.save(tmp_path)
    assert not (tmp_path / FILE).exists()
    forge(delta, tmp_path)
    with pytest.raises(
        DeltaError,
        match=rf"passes its checksum but is not a valid delta \(ValueError: .*{problem}",
    ):
        Delta.load(tmp_path)


def forge(delta: Delta, path: Path) -> None:
    """Write a delta that its own check would refuse."""
    write_file(delta_path(path), delta._manifest(), dict(delta._tensors()))


@pytest.mark.parametrize(
    "content",
    [{"weights": []}, {"weights": None}, {"base": None}, {"info": 3}, {"whole": {"a": {}}}],
)
def test_a_whole_file_with_another_manifest_is_refused(tmp_path, content, monkeypatch):
    delta, manifest = (
        one_patch(None, [1], torch.zeros(20, 1), torch.ones(20, 1)),
        Delta._manifest,
    )
    monkeypatch.setattr(Delta, "_manifest", lambda self: {**manifest(self), **content})
    delta.save(tmp_path)
    with pytest.raises(DeltaError, match="passes its checksum but is not a valid delta"):
        Delta.load(tmp_path)


def test_ranges_too_long_for_memory_are_refused_before_they_are_made(tmp_path, monkeypatch):
    delta = one_patch(None, [1], torch.zeros(20, 1), torch.ones(20, 1))
    monkeypatch.setattr(
        "slicefine.deltas.delta.to_runs",
        lambda index: None if index is None else [[0, 10**13]],
    )
    delta.save(tmp_path)
    with pytest.raises(DeltaError, match=r"the run of features \[0, 10000000000000\]"):
        Delta.load(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "body.0.in_features",
        "body.0.forward",
        "body",
        "__class__",
        "body.0.__dict__",
        "training",
        "",
        "a/b",
    ],
)
def test_keys_that_are_no_tensors_are_refused(tmp_path, key):
    Delta(
        {}, {key: FullDelta(torch.zeros(2), torch.ones(2), True)}, base={"sha256": "x"}
    ).save(tmp_path)
    with pytest.raises(DeltaError, match="which the delta changes"):
        Delta.load(tmp_path).apply_to(base())


def test_info_is_checked_and_kept(tmp_path):
    _, model = trained()
    for info, message in (
        (
            {"loss": torch.tensor(1.0)},
            r"info\['loss'\] is a Tensor, which JSON cannot hold",
        ),
        (
            {"by": [{"x": {1: 2}}]},
            r"info\['by'\]\[0\]\['x'\] has the key 1; JSON has strings",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            model.save_pretrained(tmp_path, info=info)
        assert not (tmp_path / FILE).exists()
    info = {
        "file_sha256": "of something else",
        "coverage": "80 %",
        "note": "a | b\n---\nx",
        "nested": {"loss": [0.5, None]},
    }
    model.save_pretrained(tmp_path, info=info)
    assert {**Delta.load(tmp_path).info, **info} == Delta.load(tmp_path).info
    card = (tmp_path / "README.md").read_text()
    assert "| note | a \\| b --- x |\n" in card and card.count("\n---\n") == 1
    loaded = SliceModel.from_pretrained(base(), tmp_path, "x")
    loaded.save_pretrained(tmp_path, info={"accuracy": 0.9})
    again = Delta.load(tmp_path / "x")
    assert (
        again.info["accuracy"] == 0.9
        and again.info["steps"] == 9
        and "accuracy" not in loaded.delta().info
    )


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "a\\b", "C:x", "", ".", "..", ".hidden", "x.safetensors"]
)
def test_names_that_are_no_folders_are_refused(tmp_path, name):
    _, model = trained()
    model.save_pretrained(tmp_path)
    with pytest.raises(DeltaError, match="an adapter cannot be called"):
        SliceModel.from_pretrained(base(), tmp_path, name)
    with pytest.raises(DeltaError, match="an adapter cannot be called"):
        get_slice_model(base(), config(), adapter_name=name)


def test_a_folder_may_be_called_anything(tmp_path):
    _, model = trained()
    model.save_pretrained(tmp_path / "run.safetensors")
    assert same(
        state(SliceModel.from_pretrained(base(), tmp_path / "run.safetensors")),
        state(model),
    )


def test_save_pretrained_does_not_swallow_arguments(tmp_path):
    _, model = trained()
    with pytest.raises(
        TypeError,
        match=(
            r"save_pretrained got push_to_hub, which a delta has no use for: push_to_hub\(repo_id\)"
        ),
    ):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path, is_main_process=False, safe_serialization=True)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, is_main_process=True, max_shard_size="5GB")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_files_have_the_umask_and_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os,
        "umask",
        lambda mask: pytest.fail(
            "the umask is the whole process's, other threads' files too"
        ),
    )
    (tmp_path / "plain").write_text("")
    _, model = trained()
    model.save_pretrained(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_threads_that_save_to_one_place_leave_one_whole_file(tmp_path):
    """Two runs with one output folder: the last wins, and readers never see a mixture."""
    deltas = [trained(seed)[1].delta() for seed in range(3)]
    hashes = {delta.save(tmp_path) for delta in deltas}
    errors: list[BaseException] = []

    def work(delta: Delta) -> None:
        try:
            for _ in range(10):
                delta.save(tmp_path)
                assert Delta.load(tmp_path).sha256 in hashes
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(delta,)) for delta in deltas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [path.name for path in tmp_path.iterdir()] == [FILE]


def test_replacing_cleans_up_after_an_error(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "x") as temporary:
        Path(temporary).write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_tensors_without_bytes_are_refused():
    """Their address is 0: reading there would end the process."""

    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (2, 3), dtype=torch.float32)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return args[0]

    for tensor in (Wrapper(), torch.empty(3, device="meta")):
        with pytest.raises(TypeError, match="without values of its own to hash"):
            tensor_sha256("x", tensor)


def test_fake_tensors_have_no_originals():
    """Memory is planned with any SliceConfig, not only with keep_originals=False."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = get_slice_model(
            nn.Sequential(nn.Linear(8, 8)),
            slices_alone(r=2, slice_type="row_column", switch_interval=1),
        )
        optimizer = SliceAdamW(model.parameters())
        for _ in range(2):
            model(torch.randn(3, 8)).sum().backward()
            optimizer.step()
        assert all(layer.originals is None for _, layer in named_slice_layers(model))
