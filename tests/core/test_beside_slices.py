"""What trains beside slices by default: biases of the sliced layers, and norms."""

import copy

import pytest
import torch
from torch import nn

from slicefine import (
    Delta,
    SliceAdamW,
    SliceConfig,
    SliceModel,
    get_slice_model,
    lean,
    parameter_groups,
)
from slicefine.plan.estimate import Workload, estimate
from slicefine.plan.methods import slices
from tests.configs import slices_alone


class RootMean(nn.Module):
    """A norm written in Python, as LlamaRMSNorm is."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


RootMean.__name__ = "RootMeanNorm"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.norm, self.other = nn.LayerNorm(12), RootMean(12)

    def forward(self, x):
        return self.other(self.norm(x + self.down(torch.relu(self.up(x)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.last, self.classifier = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.last(x))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def sliced(dtype=torch.float32, **config):
    saved = {"modules_to_save": ["classifier"], "switch_interval": 2}
    return get_slice_model(net(dtype), SliceConfig(**{**saved, **config}))


def train(model, optimizer, steps=5):
    dtype = next(model.parameters()).dtype
    losses = []
    for i in range(steps):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(i)).to(dtype)
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def free(model):
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    return {n for n in names if "slice_weight" not in n and "classifier" not in n}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_biases_of_sliced_layers_and_the_norms_of_torch_train():
    inside = {f"layers.{i}.{n}" for i in (0, 1) for n in ("up.bias", "down.bias")}
    norms = {f"layers.{i}.norm.{n}" for i in (0, 1) for n in ("weight", "bias")}
    outside = {f"{name}.{n}" for name in ("first", "last") for n in ("weight", "bias")}
    assert free(sliced()) == inside | norms | outside
    written = {f"layers.{i}.other.weight" for i in (0, 1)}
    assert free(sliced(norms="all")) == inside | norms | outside | written
    assert free(sliced(norms="none")) == inside
    assert free(sliced(bias="none")) == norms | outside
    # GradScaler refuses gradients in float16
    assert free(sliced(torch.float16)) == set()
    # norms of blocks without a slice would only lengthen the backward pass
    upper = sliced(target_modules=["up", "down"], layers_to_transform=[1])
    assert free(upper) == {name for name in inside | norms if ".1." in name}


def test_the_width_follows_narrow_layers_and_positions_differ_between_layers():
    model = nn.Sequential(nn.Linear(512, 40), nn.Linear(40, 3), nn.Linear(3, 300))
    get_slice_model(model, SliceConfig())
    assert [layer.spec.r for layer in model] == [64, 10, 1]
    rows = get_slice_model(nn.Sequential(nn.Linear(512, 40)), SliceConfig(slice_type="row"))
    assert rows[0].spec.r == 10
    twins = get_slice_model(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), SliceConfig()
    )
    assert not torch.equal(twins[0].cols, twins[1].cols)
    assert not torch.equal(twins[0].cols, torch.arange(16))


@pytest.mark.parametrize("in_bwd", [False, True])
def test_training_follows_a_dense_run_with_a_mask(in_bwd):
    """Independent: an ordinary model, torch's AdamW, gradients of weights masked."""
    ours, dense = sliced(torch.float64, switch_interval=None), net(torch.float64)
    masks = {
        f"{name}.weight": module.cols
        for name, module in ours.named_modules()
        if hasattr(module, "slice_weight")
    }
    trained = free(ours) | {"classifier.weight", "classifier.bias"} | masks.keys()
    dense.requires_grad_(False)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in masks:
            outside = torch.ones(parameter.shape[1], dtype=torch.bool)
            outside[masks[name]] = False
            mask = lambda grad, outside=outside: grad.masked_fill(outside, 0)
            parameter.register_hook(mask)
    reference = torch.optim.AdamW(
        [p for p in dense.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    optimizer = SliceAdamW(ours.parameters(), lr=1e-2, optimizer_in_bwd=in_bwd)
    assert train(ours, optimizer) == pytest.approx(train(dense, reference), abs=1e-12)
    ours.merge_and_unload()
    for key, value in dense.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, atol=1e-10)


def test_what_they_learned_is_undone_switched_off_saved_and_merged(tmp_path):
    base, model = net(), sliced()
    train(model, SliceAdamW(model.parameters(), lr=1e-2))
    x = torch.randn(5, 12)
    learned = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), learned)
    assert free(sliced()) < model.delta().whole.keys()
    model.save_pretrained(tmp_path)
    delta = Delta.load(tmp_path)
    fresh = SliceModel.from_pretrained(net(), tmp_path)
    assert torch.equal(fresh(x), learned)
    # the dial: 0 is the base and 1 the fine-tune, bit for bit
    for alpha, wanted in ((0.0, base(x)), (1.0, learned)):
        delta.scaled(alpha).save(tmp_path / str(alpha))
        dialed = SliceModel.from_pretrained(net(), tmp_path / str(alpha))
        assert torch.equal(dialed(x), wanted)
    resumed = SliceModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert free(resumed) == free(model) and torch.equal(resumed(x), learned)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(x), learned)
    before, after = state(base), state(model.unload())
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_optimizer_resumes_bit_for_bit():
    whole = sliced()
    expected = train(whole, SliceAdamW(whole.parameters(), lr=1e-2), 6)
    model = sliced()
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    again = sliced()
    other = SliceAdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    x = lambda i: torch.randn(6, 12, generator=torch.Generator().manual_seed(i))
    for i in (3, 4, 5):
        other.zero_grad()
        loss = (again(x(i)) - 1).square().mean()
        assert loss.item() == expected[i]
        loss.backward()
        other.step()


def test_groups_give_new_heads_their_rate_and_vectors_no_decay():
    model = sliced()
    groups = parameter_groups(nn.Sequential(model), 1e-3, 5e-3, weight_decay=0.1)
    names = {p: n for n, p in model.named_parameters()}
    found = {
        (group["lr"], group["weight_decay"]): {names[p] for p in group["params"]}
        for group in groups
    }
    assert found[1e-3, 0.0] == free(model)
    assert found[5e-3, 0.1] == {"classifier.weight"}
    assert found[5e-3, 0.0] == {"classifier.bias"}
    assert len(found[1e-3, 0.1]) == 4 and len(found) == 4
    # the parameter of a slice that serves two axes is flat, and decays all the same
    flat = sliced(slice_type="row_column")
    decayed = parameter_groups(flat, weight_decay=0.1)
    assert sum(len(g["params"]) for g in decayed if g["weight_decay"]) == 5


def test_configs_of_older_versions_leave_norms_frozen():
    old = {**slices_alone(r=4).to_dict()}
    del old["norms"]
    assert SliceConfig.from_dict(old) == slices_alone(r=4)
    assert SliceConfig.from_dict({"r": 4, "bias": "all"}).norms == "torch"
    assert SliceConfig.from_dict(SliceConfig().to_dict()) == SliceConfig()
    with pytest.raises(
        ValueError, match="norms is 'some'; expected one of none, torch, all"
    ):
        SliceConfig(norms="some")  # pyright: ignore[reportArgumentType]


def test_a_norm_that_trains_keeps_its_gradient_in_a_lean_model():
    plain, model = sliced(norms="all"), sliced(norms="all")
    lean(model, loss=False, mlp=False, verbose=False)
    x = torch.randn(5, 12)
    for one in (plain, model):
        one(x).square().mean().backward()
    found = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(found[name].grad, parameter.grad), name
    assert found["layers.1.other.weight"].grad is not None


def test_a_plan_counts_them():
    def inputs(batch, length):
        return {"x": torch.empty(batch, length, 12)}

    def built():
        with torch.device("meta"):
            return Net()

    work = Workload("net", built, inputs, lambda out, given: out.mean(), lambda m: m.first)
    row = estimate(work, slices(4), 2, 6)
    assert row.trainable == sum(
        p.numel() for p in sliced(r=4, modules_to_save=[]).parameters() if p.requires_grad
    )
