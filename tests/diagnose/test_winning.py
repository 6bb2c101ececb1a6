"""Gradient shares and trials of slices: against autograd, with planted dead inputs, and the model
as it was afterwards.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slicefine import SliceConfig
from slicefine.diagnose.capture import linear_layers
from slicefine.diagnose.winning import gradient_shares, shares_of_positions, winning_report
from slicefine.slices import SliceSpec


def setting(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(24, 32),
        nn.ReLU(inplace=True),
        nn.Linear(32, 16),
        nn.Tanh(),
        nn.Linear(16, 3),
    )
    x, y = torch.randn(40, 24), torch.randint(3, (40,))
    x[:, 8:12] = 0.0  # inputs that are dead
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch["x"]), batch["y"])
    return model, [{"x": x[:20], "y": y[:20]}, {"x": x[20:], "y": y[20:]}], loss


def test_shares_equal_autograd():
    model, batches, loss = setting()
    found = gradient_shares(
        model, linear_layers(model, SliceConfig(target_modules=["0", "2"])), batches, loss
    )
    square = {name: 0 for name in found}
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        for name in square:
            square[name] = (
                square[name] + model.get_submodule(name).weight.grad.double().square()
            )
    for name, expected in square.items():
        torch.testing.assert_close(
            found[name].columns, expected.sum(0) / expected.sum(), rtol=1e-5, atol=1e-9
        )
        torch.testing.assert_close(
            found[name].rows, expected.sum(1) / expected.sum(), rtol=1e-5, atol=1e-9
        )
        assert found[name].norm == pytest.approx(
            float((expected.sum() / 2).sqrt()), rel=1e-5
        )
    assert found["0"].dead.nonzero().flatten().tolist() == [8, 9, 10, 11]
    assert not any(m._forward_hooks for m in model.modules())
    spec = SliceSpec(32, 24, "row", 8)
    shares = shares_of_positions(found["0"], spec)
    assert len(shares) == 4 and float(shares.sum()) == pytest.approx(1.0)


def test_trials_train_the_slice_alone_and_put_everything_back():
    model, batches, loss = setting()
    layers = linear_layers(model)
    modules, before = (
        list(model.modules()),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    flags = [p.requires_grad for p in model.parameters()]
    report = winning_report(
        model, layers, batches, r=2, tried=["2"], steps=4, lr=1e-2, loss=loss
    )
    assert (
        list(model.modules()) == modules
        and [p.requires_grad for p in model.parameters()] == flags
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and type(model) is nn.Sequential
    found = {row.name: row for row in report}
    trials = found["2"].trials
    assert (
        len(trials) == 8
        and len({t.position for t in trials}) == 8
        and not found["0"].trials
    )
    # one of them again, by torch's own Adam on the whole weight with the gradient masked
    trial = trials[3]
    weight = model[2].weight
    mask = torch.zeros_like(weight)
    mask[:, 2 * trial.position : 2 * trial.position + 2] = 1
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    losses = []
    for _ in range(4):
        value = loss(model, batches[0])
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        weight.grad.mul_(mask)
        optimizer.step()
    losses.append(loss(model, batches[0]).item())
    assert trial.before == pytest.approx(losses[0]) and trial.one_step == pytest.approx(
        losses[1]
    )
    assert trial.after == pytest.approx(losses[4]) and trial.drop > 0
    assert found["2"].winners == 1.0 and found["2"].drop_cv > 0


def test_exceptions_are_named():
    model, batches, loss = setting()
    layers = linear_layers(model)
    report = winning_report(
        model,
        layers,
        batches,
        r=4,
        tried=["0"],
        loss=loss,
        outliers={"2": [(4, 8, "energy 16 times the median group's")]},
    )
    found = {row.name: row for row in report}
    assert len(found["0"].trials) == 6  # all there are
    said = " | ".join(found["0"].exceptions)
    assert (
        "4 of 24 input features are zero on this data; slices at positions 2 hold nothing else"
        in said
    )
    assert "position 2 has less than 0.1 times the share r/d" in said
    assert "the loss did not fall at positions 2" in said
    assert found["0"].winners == pytest.approx(5 / 6)
    assert "features 4 to 7: energy 16 times the median group's" in found["2"].exceptions
    assert found["4"].exceptions == []


def test_a_layer_that_no_gradient_reaches():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.c(self.a(x).detach() + x) + 0 * self.b(x).sum()

    model = Cut()
    loss = lambda net, batch: net(batch["x"]).square().mean()
    report = winning_report(
        model, linear_layers(model), [{"x": torch.randn(5, 4)}], r=2, loss=loss
    )
    assert {r.name: r.exceptions for r in report} == {
        "b": ["no gradient reaches this layer"],
        "c": [],
    }


def test_errors():
    model, batches, loss = setting()
    layers = linear_layers(model)
    with pytest.raises(ValueError, match="positions is 7; a spread over fewer than 8"):
        winning_report(model, layers, batches, positions=7, loss=loss)
    with pytest.raises(ValueError, match="axis is 'block'"):
        winning_report(model, layers, batches, axis="block", loss=loss)
    with pytest.raises(ValueError, match="tried names 9"):
        winning_report(model, layers, batches, tried=["9"], loss=loss)
