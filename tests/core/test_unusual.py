"""What code written for nn.Linear does with a layer, and what a step then finds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from tests.configs import ALONE, slices_alone

TYPES = ["column", "row", "block", "row_column"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def sliced(**options):
    options = {"r": 4, "switch_interval": None, "target_modules": ["0"], **ALONE, **options}
    return get_slice_model(net(), SliceConfig(**options))


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


def optimizers(model):
    return {
        "SliceAdamW": lambda: SliceAdamW(model.parameters(), lr=1e-3),
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0),
        "fused": lambda: torch.optim.AdamW(
            model.parameters(), lr=1e-3, weight_decay=0.0, fused=True
        ),
    }


# Writes through .data, which no version counter sees


@pytest.mark.parametrize("kind", ["SliceAdamW", "AdamW", "fused"])
@pytest.mark.parametrize("when", ["before the forward", "before the step"])
@pytest.mark.parametrize("how", ["copy_", "mul_", "assigned"])
def test_a_write_through_data_is_not_undone_by_a_step(kind, when, how):
    model = sliced()
    optimizer = optimizers(model)[kind]()
    train(model, optimizer, 2)
    layer = model[0]

    def write():
        if how == "copy_":
            layer.weight.data.copy_(torch.ones(16, 16))
        elif how == "mul_":
            layer.weight.data.mul_(2)
        else:
            layer.weight.data = torch.ones(16, 16)
        return layer.weight.detach().clone()

    written = write() if when == "before the forward" else None
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().mean().backward()
    written = write() if written is None else written
    optimizer.step()
    # one step of Adam moves an entry by at most about lr
    assert (layer.weight - written).abs().max() < 5e-3
    assert not torch.equal(layer.weight, written)


def test_reading_a_weight_changes_nothing():
    model = get_slice_model(net().bfloat16(), SliceConfig(r=4, target_modules=["0"]))
    optimizer = SliceAdamW(model.parameters(), lr=1e-5)
    model(torch.randn(8, 16).bfloat16()).square().mean().backward()
    optimizer.step()
    master = model[0].slice_weight.detach().clone()
    assert model[0].weight.dtype == torch.bfloat16
    model(torch.randn(8, 16).bfloat16())
    # the master keeps the bits that bfloat16 has not
    assert torch.equal(model[0].slice_weight, master)
    assert model[0].schedule.rewritten == 0


def test_an_average_put_in_the_place_of_what_trains_is_used():
    model = sliced()
    x = torch.randn(2, 16)
    before = model(x)
    model[0].slice_weight.data = torch.zeros_like(model[0].slice_weight)
    assert not torch.equal(model(x), before)
    assert not model[0].weight[:, :4].any()


@pytest.mark.parametrize("kind", ["AdamW", "fused"])
def test_an_own_hook_of_an_optimizer_sees_the_step(kind):
    model = sliced()
    x = torch.randn(4, 16)
    seen = []
    optimizer = optimizers(model)[kind]()
    for _ in range(2):
        optimizer.register_step_post_hook(lambda *_: seen.append(model(x).detach()))
    train(model, optimizer, 2)
    assert torch.equal(seen[-1], model(x)) and torch.equal(seen[-2], model(x))
    assert model[0].schedule.steps == 2


# States of other models


@pytest.mark.parametrize("keep", [True, False])
def test_a_state_right_after_a_move_belongs_to_its_weights(keep):
    def make():
        model = sliced(switch_interval=2, keep_originals=keep)
        return model, SliceAdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    train(model, optimizer, 4)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    forgotten, optimizer = make()
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="does not belong to the weights"):
        train(forgotten, optimizer)
    for weights_first in (True, False):
        resumed, optimizer = make()
        for load in (weights_first, not weights_first):
            if load:
                resumed.load_state_dict(weights)
            else:
                optimizer.load_state_dict(state)
        train(resumed, optimizer)
        assert resumed[0].schedule.steps == 5


def test_a_state_that_does_not_fit_changes_nothing():
    def make(r):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        config = SliceConfig(r=4, rank_pattern={"1": r}, target_modules=["0", "1"])
        model = get_slice_model(model, config)
        return model, SliceAdamW(model.parameters())

    model, optimizer = make(4)
    train(model, optimizer, 2)
    other, fresh = make(2)
    with pytest.raises(ValueError, match="the saved slice has shape"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state and [layer.schedule.steps for layer in other] == [0, 0]


# Derivatives of another kind


# torch's own, at its first forward-mode derivative
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("slice_type", TYPES)
def test_the_transforms_of_torch_func(slice_type):
    model = sliced(slice_type=slice_type)
    layer, x = model[0], torch.randn(5, 16)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, x).square().mean()

    grads = grad(loss)(parameters, x)
    model(x).square().mean().backward()
    assert layer.slice_weight.grad is not None
    torch.testing.assert_close(grads["0.slice_weight"], layer.slice_weight.grad)
    assert not grads["0.weight"].any()
    plain = net()
    torch.testing.assert_close(vmap(model)(x), plain(x))
    ours, theirs = (jvp(m, (x,), (torch.ones_like(x),))[1] for m in (model, plain))
    torch.testing.assert_close(ours, theirs)
    # the loss as a function of the slice, as MAML's inner steps and Hessians take it
    inner = lambda s: loss({**parameters, "0.slice_weight": s}, x)
    second = hessian(inner)(parameters["0.slice_weight"])
    assert second.shape == layer.slice_weight.shape * 2 and second.any()


def test_a_gradient_of_a_gradient_is_refused_by_name():
    model = sliced()
    x = torch.randn(4, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(net()(x).square().sum(), x)
    torch.testing.assert_close(slope, plain)
    with pytest.raises(RuntimeError, match="a gradient of the gradient of a slice"):
        slope.square().sum().backward()


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("options", [{}, {"optimizer_in_bwd": True}])
def test_a_beta_of_zero(betas, options):
    ours, theirs = sliced(), sliced()
    a = SliceAdamW(ours.parameters(), lr=1e-2, betas=betas, **options)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=betas, weight_decay=0.0)
    for _ in range(3):
        torch.manual_seed(1)
        train(ours, a)
        torch.manual_seed(1)
        train(theirs, b)
    assert (ours[0].weight - theirs[0].weight).abs().max() < 1e-5


def test_amsgrad_is_refused_by_name():
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW\(model.*amsgrad=True\)"):
        SliceAdamW(sliced().parameters(), amsgrad=True)


def test_weights_without_values_may_be_read():
    with FakeTensorMode():
        model = sliced()
        assert model[0].weight.shape == (16, 16)
        train(model, SliceAdamW(model.parameters()), 2)
    model = sliced().to("meta")
    assert model[0].weight.is_meta
    model(torch.empty(2, 16, device="meta"))


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_a_slice_in_deepspeeds_flat_copy_is_refused(mark):
    """DeepSpeed is not installed here; these are the marks that its stages leave on a parameter."""
    model = get_slice_model(nn.Sequential(nn.Linear(8, 8)), slices_alone(r=2))
    setattr(model[0].slice_weight, mark, object())
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO has taken the slice_weight"):
        model(torch.randn(2, 8))
