"""The guard names slices that do not train, and is silent where all do."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from slicefine import SliceAdamW, get_slice_model
from tests.configs import slices_alone


class Net(nn.Module):
    """mode: how ``head`` is used."""

    def __init__(self, mode="call"):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.mode = mode

    def forward(self, x):
        x = self.b(self.a(x))
        if self.mode == "read":
            return F.linear(x, self.head.weight)
        if self.mode == "output unused":
            self.head(x)
            return x
        return self.head(x) if self.mode == "call" else x


def train(model, steps=4, optimizer=None):
    optimizer = optimizer or SliceAdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()


def sliced(mode="call", **kwargs):
    with warnings.catch_warnings():
        # that the weight is read is found in the code of Net too, before training
        warnings.filterwarnings("ignore", "head may train only at times")
        config = slices_alone(r=4, target_modules=["a", "b", "head"], **kwargs)
        return get_slice_model(Net(mode), config)


@pytest.mark.parametrize("kind", [SliceAdamW, torch.optim.SGD])
def test_a_weight_read_without_calling_the_layer_is_an_error(kind):
    model = sliced("read")
    with pytest.raises(
        RuntimeError, match="head: its weight is read without calling the layer"
    ):
        train(model, optimizer=kind(model.parameters(), lr=1e-3))


def test_a_slice_frozen_by_hand_is_an_error():
    model = sliced()
    model.head.slice_weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"head: its slice_weight was frozen by hand"):
        train(model)


def test_a_layer_thrown_away_is_an_error():
    model = sliced()
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)
    model.head = nn.Linear(16, 4)
    with pytest.raises(RuntimeError, match="head: its layer is no longer there"):
        train(model, optimizer=optimizer)


def test_a_weight_computed_by_something_else_is_an_error():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = sliced()
    parametrize.register_parametrization(model.head, "weight", Double())
    with pytest.raises(RuntimeError, match="head: its weight does not follow"):
        train(model)


def test_most_slices_untrained_is_an_error():
    model = get_slice_model(
        nn.ModuleDict({name: nn.Linear(16, 16) for name in "abc"}), slices_alone(r=4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="its output does not reach the loss"):
        for _ in range(4):
            model["b"](torch.randn(2, 16)), model["c"](torch.randn(2, 16))
            model["a"](torch.randn(2, 16)).sum().backward()
            optimizer.step()


def test_an_output_that_does_not_reach_the_loss_warns_once():
    model = sliced("output unused")
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, 150, optimizer)
    assert len(caught) == 1 and "head: its output does not reach the loss" in str(
        caught[0].message
    )


def test_a_layer_that_is_not_called_may_be_idle_for_a_hundred_steps():
    model = sliced("idle")
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)
    train(model, 99, optimizer)
    with pytest.warns(
        UserWarning, match="after 100 steps .*\n.*head: it has not been called"
    ):
        train(model, 1, optimizer)
    # an expert that has its turn in time
    model = sliced("idle")
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)
    train(model, 50, optimizer)
    model.mode = "call"
    train(model, 60, optimizer)
    assert model.head.watch is None


@pytest.mark.parametrize(("mode", "warned"), [("warn", 1), ("ignore", 0)])
def test_the_setting(mode, warned):
    model = sliced("read", unused_slices=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, 120)
    assert len(caught) == warned
    with pytest.raises(ValueError, match="unused_slices is 'no'"):
        slices_alone(unused_slices="no")
