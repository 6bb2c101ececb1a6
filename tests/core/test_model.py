"""Swapping slices in and out of whole models."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slicefine import (
    SliceAdamW,
    SliceLinear,
    SliceModel,
    get_slice_model,
    list_targets,
)
from slicefine.model import slice_layers
from tests.configs import slices_alone


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12))
        self.alias = self.body[2]  # one module under two names
        self.twin = nn.Linear(12, 12)
        if tied:
            self.twin.weight = self.body[2].weight
        self.classifier = nn.Linear(12, 3)

    def forward(self, x):
        return self.classifier(self.twin(self.alias(self.body(x))))


def train(model, steps=5):
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    for i in range(steps):
        optimizer.zero_grad()
        model(
            torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        ).square().sum().backward()
        optimizer.step()


ROOT = Path(__file__).parents[2]
SNIPPET = """\
from torch import nn
from slicefine import SliceConfig, get_slice_model

model = get_slice_model(nn.Sequential(nn.Linear(8, 8)), SliceConfig(slice_type="row"))
model.print_trainable_parameters()
model.train().requires_grad_(False)
with model.disable_adapter():
    shares: dict[str, float] = model.coverage()
SliceConfig(slice_type="rows")
"""
CONFIG = slices_alone(r=3, switch_interval=2, modules_to_save=["classifier"])


def test_a_sliced_model_keeps_one_key_of_its_own():
    model = get_slice_model(Net(), CONFIG)
    # the list for DDP has the name that DDP reads
    added = {"_slicefine", "_ddp_params_and_buffers_to_ignore"}
    assert model.__dict__.keys() - Net().__dict__.keys() == added


def test_editors_know_the_methods_of_a_sliced_model(tmp_path):
    if not shutil.which("pyright", path=str(Path(sys.executable).parent)):
        pytest.skip("pyright is not installed")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET, encoding="utf-8")
    pyright = [
        str(Path(sys.executable).with_name("pyright")),
        "--pythonpath",
        sys.executable,
    ]
    run = subprocess.run([*pyright, str(snippet)], capture_output=True, text=True, cwd=ROOT)
    errors = [line for line in run.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and "snippet.py:9" in errors[0], run.stdout + run.stderr
    assert "row_column" in run.stdout


def test_the_model_stays_what_it_was():
    model = Net()
    keys, x = list(model.state_dict()), torch.randn(4, 6)
    before = model(x)
    assert get_slice_model(model, CONFIG) is model
    assert (
        isinstance(model, Net)
        and type(model).__name__ == "Net"
        and list(model.state_dict()) == keys
    )
    assert torch.equal(model(x), before)
    assert model.alias is model.body[2] and isinstance(model.alias, SliceLinear)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        "body.0.slice_weight",
        "body.2.slice_weight",
        "twin.slice_weight",
        "classifier.weight",
        "classifier.bias",
    }


def test_trainable_parameters_are_counted_and_printed(capsys):
    model = get_slice_model(Net(), CONFIG)
    total = sum(p.numel() for p in Net().parameters())
    assert model.get_nb_trainable_parameters() == (12 * 3 * 3 + 12 * 3 + 3, total)
    model.print_trainable_parameters()
    assert (
        capsys.readouterr().out
        == f"trainable params: 147 || all params: {total} || trainable%: {100 * 147 / total:.4f}\n"
    )


def test_merging_is_bit_equal_and_gives_plain_layers():
    model = get_slice_model(Net(), CONFIG)
    train(model)
    x = torch.randn(4, 6)
    trained = model(x)
    assert model.merge_and_unload() is model
    assert type(model) is Net and torch.equal(model(x), trained)
    assert (
        not any(isinstance(m, SliceLinear) for m in model.modules())
        and model.alias is model.body[2]
    )
    assert all(p.requires_grad for p in model.parameters())  # as before get_slice_model
    assert (
        repr(model) == repr(Net())
        and model.body[0].__dict__.keys() == nn.Linear(6, 12).__dict__.keys()
    )
    train(get_slice_model(model, CONFIG))  # and again


def test_state_dicts_load_both_ways():
    model, plain = get_slice_model(Net(), CONFIG), Net()
    train(model)
    x = torch.randn(4, 6)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))
    fresh = get_slice_model(Net(), CONFIG)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_copies_and_pickles():
    model = get_slice_model(Net(), CONFIG)
    train(model)
    x = torch.randn(4, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(x), model(x))
        train(twin)
        assert not torch.equal(twin(x), model(x))
        assert type(twin.merge_and_unload()) is Net


def test_coverage_while_training():
    model = get_slice_model(Net(), CONFIG)
    assert set(model.coverage().values()) == {0.0}
    train(model, 5)  # positions 0, 1 and 2: 9 of 12 and 6 of 6 features
    assert model.coverage() == {"body.0": 1.0, "body.2": 0.75, "twin": 0.75}
    assert (
        model.planned_coverage(5)
        == "5 steps, interval 2, r 3: 2 positions, 100 % of each 6-wide weight (1 layer)\n5 steps,"
        " interval 2, r 3: 3 positions, 75 % of each 12-wide weight (2 layers)"
    )


def test_tied_weights_are_skipped_with_a_warning():
    advice = "untie them, or tied_weights='share' where all of them are linear layers"
    with pytest.warns(UserWarning, match="its weight is tied to") as warned:
        model = get_slice_model(Net(tied=True), CONFIG)
    # one warning, however many layers
    (message,) = [str(w.message) for w in warned]
    assert message.splitlines() == [
        "body.2 stays as it is: its weight is tied to twin; " + advice,
        "twin stays as it is: its weight is tied to body.2; " + advice,
    ]
    assert (
        type(model.twin) is nn.Linear
        and type(model.body[2]) is nn.Linear
        and isinstance(model.body[0], SliceLinear)
    )


def test_tied_weights_can_share_one_slice():
    config = slices_alone(
        r=3, switch_interval=2, modules_to_save=["classifier"], tied_weights="share"
    )
    model = get_slice_model(Net(tied=True), config)
    assert (
        model.twin.slice_weight is model.body[2].slice_weight
        and model.twin.weight is model.body[2].weight
    )
    for make in (lambda m: m, copy.deepcopy):
        twin = make(model)
        train(twin)
        assert twin.twin.weight is twin.body[2].weight
        assert (
            torch.equal(twin.twin.slice_cols, twin.body[2].slice_cols)
            and twin.twin.schedule is twin.body[2].schedule
        )
        assert torch.equal(
            twin.twin.slice_weight, twin.twin.weight[:, twin.twin.slice_cols]
        )


def test_a_failing_config_changes_nothing():
    model = Net()
    with pytest.raises(
        ValueError, match=r"width 7 does not fit a weight of shape \(12, 6\)"
    ):
        get_slice_model(model, slices_alone(r=7, target_modules=["0", "2", "twin"]))
    assert (
        type(model) is Net
        and all(type(m) is not SliceLinear for m in model.modules())
        and all(p.requires_grad for p in model.parameters())
    )


def test_mistakes_are_named():
    model = get_slice_model(Net(), CONFIG)
    with pytest.raises(ValueError, match="has slices already; call model.merge_and_unload"):
        get_slice_model(model, CONFIG)
    with pytest.raises(
        ValueError,
        match=(
            "modules_to_save names 'head', which the model does not have; its children are: body,"
            " alias"
        ),
    ):
        get_slice_model(Net(), slices_alone(r=3, modules_to_save=["head"]))
    with pytest.warns(UserWarning, match="fan_in_fan_out is True, but no target"):
        get_slice_model(
            Net(), slices_alone(r=3, fan_in_fan_out=True, modules_to_save=["classifier"])
        )


@pytest.mark.parametrize("bias", ["none", "slice_only", "all"])
def test_biases(bias):
    model = get_slice_model(Net(), slices_alone(r=3, bias=bias, target_modules=["0"]))
    free = {
        n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")
    }
    assert len(free) == {"none": 0, "slice_only": 1, "all": 4}[bias]


def test_a_hugging_face_model_saves_and_loads_as_usual(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    get_slice_model(model, slices_alone(r=4, modules_to_save=["classifier"]))
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.slice_weight.add_(1.0)
    ids = torch.arange(8).view(2, 4)
    model.save_pretrained(tmp_path, whole_model=True)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.architectures == ["BertForSequenceClassification"]


def test_a_new_head_trains_whole_by_default_and_that_is_said():
    said = (
        r"^classifier is fully trained, as a new output head needs; modules_to_save="
        r"\['classifier'\] says so without this warning, modules_to_save=\[\] keeps it frozen$"
    )
    with pytest.warns(UserWarning, match=said) as warned:
        model = get_slice_model(Net(), slices_alone(r=3))
    assert len(warned) == 1
    explicit = get_slice_model(Net(), slices_alone(r=3, modules_to_save=["classifier"]))
    trainable = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}
    assert (
        trainable(model) == trainable(explicit) >= {"classifier.weight", "classifier.bias"}
    )
    assert model.delta().whole.keys() == explicit.delta().whole.keys()


def test_a_head_that_is_to_stay_frozen_is_no_slice():
    model = get_slice_model(Net(), slices_alone(r=3, modules_to_save=[]))
    assert type(model.classifier) is nn.Linear
    assert not model.classifier.weight.requires_grad
    with pytest.warns(
        UserWarning,
        match=(
            r"classifier stays as it is: 'all-linear' leaves out the head;"
            r" modules_to_save=\['classifier'\]"
        ),
    ):
        get_slice_model(Net(), slices_alone(r=3, modules_to_save=["twin"]))


def test_a_narrow_layer_takes_all_of_itself_by_default():
    net = lambda: nn.Sequential(
        nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 5)
    )
    for slice_type, widths in (("column", [4, 16, 16]), ("row", [16, 16, 5])):
        model = net()
        config = slices_alone(r=16, slice_type=slice_type)
        assert [match.r for match in list_targets(model, config)] == widths
        get_slice_model(model, config)
        assert [layer.spec.r for layer in slice_layers(model)] == widths
        plain, x = copy.deepcopy(model), torch.randn(3, 4)
        (model(x).square().sum()).backward()
        assert all(layer.slice_weight.grad is not None for layer in slice_layers(model))
        assert torch.equal(plain.merge_and_unload()(x), model(x))
    block = slices_alone(slice_type="block", r=16, r_out=8)
    get_slice_model(model := net(), block)
    shapes = [layer.spec.shape("block") for layer in slice_layers(model)]
    assert shapes == [(8, 4), (8, 16), (5, 16)]
    assert [
        match.r
        for match in list_targets(net(), slices_alone(r=16, slice_type="row_column"))
    ] == [
        4,
        16,
        5,
    ]
    # a width that was asked for is not changed
    with pytest.raises(ValueError, match="0: a column slice of width 16 does not fit"):
        get_slice_model(net(), slices_alone(rank_pattern={"0": 16}))


def test_every_layer_that_does_not_fit_is_named():
    with pytest.raises(ValueError) as error:
        get_slice_model(Net(), slices_alone(r=13, target_modules=["0", "2", "twin"]))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "body.0",
        "body.2",
        "twin",
    ]
    with pytest.raises(TypeError, match="config is a dict; expected a SliceConfig"):
        get_slice_model(Net(), {"r": 3})  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match="the model is a single Linear; use SliceLinear.from_linear"
    ):
        get_slice_model(nn.Linear(8, 8), slices_alone(r=2))


def test_the_class_of_a_sliced_model_makes_ordinary_models():
    fresh = type(get_slice_model(Net(), CONFIG))()
    assert type(fresh) is Net and not hasattr(fresh, "active_adapters")
    get_slice_model(fresh, CONFIG)
    train(fresh)
    fresh.merge_and_unload()
    assert type(fresh) is Net


def test_ddp_is_told_to_leave_positions_alone():
    """It reads this list from the module it wraps; what somebody else has put there stays."""
    model = Net()
    model._ddp_params_and_buffers_to_ignore = ["other"]
    get_slice_model(model, CONFIG)
    positions = [
        n
        for n, _ in model.named_buffers()
        if n.rsplit(".", 1)[-1] in ("slice_rows", "slice_cols")
    ]
    assert positions and model._ddp_params_and_buffers_to_ignore == ["other", *positions]
    model.merge_and_unload()
    assert model._ddp_params_and_buffers_to_ignore == ["other"]
    plain = get_slice_model(Net(), CONFIG)
    plain.merge_and_unload()
    assert not hasattr(plain, "_ddp_params_and_buffers_to_ignore")


def test_one_warning_for_many_layers():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(24)), nn.Linear(8, 8))
    for i in range(0, 24, 2):
        model[i].weight = model[i + 1].weight
    with pytest.warns(UserWarning, match="stays as it is") as warned:
        get_slice_model(model, slices_alone(r=2))
    (message,) = [str(w.message) for w in warned]
    assert message.splitlines()[-1].startswith("and 16 more (list_targets(model, config)")


def test_slices_of_next_to_nothing_are_pointed_out():
    model = nn.ModuleDict({"body": nn.Conv1d(200, 200, 3), "out": nn.Linear(20, 20)})
    with pytest.warns(
        UserWarning, match=r"the 1 sliced weights are 0\.33 % of this ModuleDict"
    ):
        get_slice_model(model, slices_alone())


def test_layers_in_a_plain_list_train_and_come_back():
    """As in Mask2Former, whose forward walks a list that it filled beside the children."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = []
            for i in range(2):
                self.layers.append(layer := nn.Linear(8, 8))
                self.add_module(str(i), layer)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = get_slice_model(Listed(), slices_alone(r=2))
    model(torch.randn(3, 8)).sum().backward()
    layers = list(slice_layers(model))
    assert len(layers) == 2 and all(layer.slice_weight.grad is not None for layer in layers)
    model.merge_and_unload()
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.Linear]
    assert model.layers[0] is model._modules["0"]


def test_merging_takes_the_arguments_of_peft():
    model = get_slice_model(Net(), CONFIG)
    train(model)
    x = torch.randn(4, 6)
    trained = model(x)
    merged = model.merge_and_unload(
        progressbar=True, safe_merge=True, adapter_names=["default"]
    )
    assert type(merged) is Net and torch.equal(merged(x), trained)
    broken = get_slice_model(Net(), CONFIG)
    with torch.no_grad():
        broken.twin.slice_weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="safe_merge: the weights of twin hold values"):
        broken.merge_and_unload(safe_merge=True)
    assert isinstance(broken.twin, SliceLinear)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("give_tuple", [False, True])
def test_reentrant_checkpoints_behind_frozen_embeddings(inplace, give_tuple):
    from torch.utils.checkpoint import checkpoint

    class Embed(nn.Embedding):
        def forward(self, ids):
            x = super().forward(ids)
            return (x, ids.shape) if give_tuple else x

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = Embed(9, 8), nn.Linear(8, 8)
            self.gradient_checkpointing = False

        def get_input_embeddings(self):
            return self.embed

        def gradient_checkpointing_enable(self, use_reentrant):
            self.gradient_checkpointing = True
            partial = functools.partial(checkpoint, use_reentrant=use_reentrant)
            self._gradient_checkpointing_func = partial

        def forward(self, ids):
            x = self.embed(ids)
            x = x[0] if give_tuple else x
            if inplace:
                x += 1
            return self._gradient_checkpointing_func(self.body, x)

    for use_reentrant in (True, False):
        for enable_first in (False, True):
            model: Any = Body()
            if enable_first:
                model.gradient_checkpointing_enable(use_reentrant)
            model = get_slice_model(model, slices_alone(r=2))
            if not enable_first:
                model.gradient_checkpointing_enable(use_reentrant)
            model(torch.arange(4)).sum().backward()
            assert model.body.slice_weight.grad is not None
            assert bool(model.embed._forward_hooks) is use_reentrant


def test_weights_that_can_never_train_are_named():
    with pytest.raises(
        ValueError, match="0 is a LazyLinear, whose weight gets its shape from the"
    ):
        get_slice_model(nn.Sequential(nn.LazyLinear(8)), slices_alone(r=2))
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0 was made under torch\.inference_mode\(\)"):
        get_slice_model(model, slices_alone(r=2))


def test_a_delta_that_is_only_used_freezes_its_base_until_it_is_taken_off(tmp_path):
    model = get_slice_model(Net(), CONFIG)
    train(model)
    model.save_pretrained(tmp_path)
    used = SliceModel.from_pretrained(
        Net(), tmp_path, torch_device="cpu", low_cpu_mem_usage=True
    )
    assert not any(p.requires_grad for p in used.parameters())
    with used.disable_adapter():
        base = Net().state_dict()
        assert all(
            torch.equal(value, base[key]) for key, value in used.state_dict().items()
        )
    assert all(p.requires_grad for p in used.merge_and_unload().parameters())
    # slices on top of it, and off again
    used = SliceModel.from_pretrained(Net(), tmp_path)
    get_slice_model(used, CONFIG, "second")
    assert any(p.requires_grad for p in used.parameters())
    assert all(p.requires_grad for p in used.merge_and_unload().parameters())


def test_training_goes_on_with_the_heads_that_trained_before(tmp_path):
    with pytest.warns(UserWarning, match="classifier is fully trained"):
        model = get_slice_model(Net(), slices_alone(r=3))
    train(model)
    model.save_pretrained(tmp_path / "new")
    frozen = get_slice_model(Net(), slices_alone(r=3, modules_to_save=[]))
    train(frozen)
    frozen.slice_config.modules_to_save = (
        None  # as a delta of a version that trained no head
    )
    frozen.save_pretrained(tmp_path / "old")
    for folder, trains in (("new", True), ("old", False)):
        resumed = SliceModel.from_pretrained(Net(), tmp_path / folder, is_trainable=True)
        assert resumed.classifier.weight.requires_grad is trains
        assert not isinstance(resumed.classifier, SliceLinear)


def test_an_r_that_is_wider_than_every_layer_is_said_to_be_full_fine_tuning():
    def net():
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    with pytest.warns(
        UserWarning, match="r=5000 is wider than every layer: all of each"
    ) as w:
        model = get_slice_model(net(), slices_alone(r=5000))
    assert len(w) == 1 and [layer.spec.r for layer in (model[0], model[2])] == [16, 8]
    # one layer has room for more than its slice
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_slice_model(net(), slices_alone(r=12))
