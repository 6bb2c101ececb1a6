"""Step accounting: a step counts once, if it has updated a slice, whoever calls it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from slicefine import SliceAdamW, get_slice_model
from tests.configs import slices_alone


def make(interval=4, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    return get_slice_model(model, slices_alone(r=4, switch_interval=interval, **kwargs))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(8, 32, generator=generator)).square().mean().backward()


class Outer(torch.optim.Optimizer):
    """The shape of SAM, Lookahead and ZeroRedundancyOptimizer."""

    def __init__(self, params, inner=torch.optim.AdamW, **options):
        super().__init__(params, options)
        self.base_optimizer = inner(self.param_groups, **options)

    def step(self, closure=None):
        return self.base_optimizer.step()


@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.SGD, SliceAdamW])
def test_an_optimizer_that_calls_another_takes_one_step(inner):
    model, plain = make(), make()
    optimizer = Outer(trainable(model), inner, lr=1e-2)
    reference = inner(trainable(plain), lr=1e-2)
    for i in range(9):
        for m, o in ((model, optimizer), (plain, reference)):
            o.zero_grad()
            backward(m, i)
            o.step()
    assert model[0].schedule.steps == 9 and model[0].schedule.moves == 2
    assert torch.equal(model[0].weight, plain[0].weight)


def test_the_moments_are_reset_where_they_live():
    model = make()
    optimizer = Outer(trainable(model), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert model[0].schedule.moves == 1
    assert model[0].slice_weight not in optimizer.base_optimizer.state


def test_a_step_without_a_gradient_does_not_count():
    model = make()
    optimizer = torch.optim.AdamW(trainable(model))
    optimizer.step()
    assert model[0].schedule.steps == 0


def test_a_fused_step_that_the_scaler_skips_does_not_count():
    model = make()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
    before = model[0].weight.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 32)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert model[0].schedule.steps == (0 if scale > 1 else 1)
        assert torch.equal(model[0].weight, before) == (scale > 1)


def test_an_exception_in_a_step_leaves_the_count_of_others():
    model = make()

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torch.optim.SGD(trainable(model), lr=1e-2).step(fail)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    backward(model)
    optimizer.step()
    assert model[0].schedule.steps == 1


def test_a_resumed_optimizer_without_the_slices_warns_once_right_after_a_move():
    def fresh(seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        get_slice_model(model, slices_alone(r=4, switch_interval=2))
        return model, torch.optim.SGD(trainable(model), lr=0.1)

    model, optimizer = fresh()
    for _ in range(4):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = fresh()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    backward(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    assert [str(w.message)[:25] for w in caught] == ["SGD resumes at step 4, but"[:25]]
    with pytest.raises(
        RuntimeError, match="SGD was resumed at step 4 without the state of the"
    ):
        model.revert()


def test_a_forward_with_other_weights_writes_nothing():
    def run(with_reference):
        model = make(interval=None)
        reference = {k: v.clone() + 1 for k, v in model.state_dict().items()}
        optimizer = SliceAdamW(model.parameters(), lr=1e-3)
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if with_reference:
                with torch.no_grad():
                    output = functional_call(model, reference, x)
                plain = nn.functional.linear(x, reference["0.weight"], reference["0.bias"])
                assert torch.equal(output, plain)
            loss.backward()
            optimizer.step()
        return model[0].weight

    assert torch.equal(run(False), run(True))


def test_a_closure_sees_what_the_optimizer_wrote_in_a_compiled_model_too():
    def lbfgs(compiled):
        torch.manual_seed(0)
        model = make(interval=None)
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        x, y = torch.randn(64, 32), torch.randn(64, 32)
        optimizer = torch.optim.LBFGS(trainable(model), line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = (run(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        with torch.no_grad():
            return (model(x) - y).square().mean().item()

    assert lbfgs(True) == pytest.approx(lbfgs(False), rel=1e-4)
