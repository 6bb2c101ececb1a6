"""SliceAdamW as a torch optimizer: groups, schedulers, clipping, accumulation, scaling, resume, and
optimizer_in_bwd's refusals.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from slicefine import (
    SliceAdamW,
    SliceLinear,
    get_slice_model,
    load_slice_state_dict,
    slice_state_dict,
)
from tests.configs import slices_alone

TYPES = ["column", "row", "block", "row_column"]


def make(slice_type="column", dtype=torch.float32, interval=3, **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    ).to(dtype)
    return get_slice_model(
        net, slices_alone(r=3, slice_type=slice_type, switch_interval=interval, **kwargs)
    )


def batch(n=64, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 10, generator=generator).to(dtype), torch.randn(
        n, 4, generator=generator
    ).to(dtype)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    error = model(x) - y
    loss = (error if error.dtype == torch.float64 else error.float()).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("slice_type", TYPES)
def test_four_micro_batches_of_16_equal_one_batch_of_64(slice_type):
    one, four = make(slice_type, torch.float64), make(slice_type, torch.float64)
    x, y = batch(dtype=torch.float64)
    optimizers = [SliceAdamW(m.parameters(), lr=1e-2) for m in (one, four)]
    for _ in range(10):
        optimizers[1].zero_grad()
        for xs, ys in zip(x.split(16), y.split(16), strict=True):
            ((four(xs) - ys).square().mean() / 4).backward()
        step(one, optimizers[0], x, y)
        optimizers[1].step()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(four.state_dict()[name], value, rtol=0, atol=1e-10)


def test_clipping_sees_the_slices_and_only_them():
    model, (x, y) = make(), batch()
    (100 * (model(x) - y)).square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    expected = torch.stack([g.norm() for g in grads]).norm()
    assert len(grads) == 3 and norm > 0.5
    torch.testing.assert_close(norm, expected)
    clipped = torch.stack(
        [p.grad.norm() for p in model.parameters() if p.grad is not None]
    ).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_a_scheduler_is_obeyed_at_every_step():
    model, (x, y) = make(), batch()
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.0 if s % 2 else 1.0
    )
    for i in range(6):
        before = weights(model)
        step(model, optimizer, x, y)
        scheduler.step()
        assert (i % 2 == 1) == all(
            torch.equal(before[n], w) for n, w in weights(model).items()
        )


def test_groups_have_their_own_hyperparameters():
    model, (x, y) = make(), batch()
    first, *rest = [p for p in model.parameters() if p.requires_grad]
    optimizer = SliceAdamW([{"params": [first], "lr": 0.0}, {"params": rest, "lr": 1e-2}])
    before = weights(model)
    step(model, optimizer, x, y)
    after = weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"]) and not torch.equal(
        before["2.weight"], after["2.weight"]
    )


def test_heads_and_biases_train_as_torch_adamw_trains_them():
    model, (x, y) = make(modules_to_save=["4"], bias="slice_only"), batch()
    twin = copy.deepcopy(model)
    ours = SliceAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    assert type(model[4]) is nn.Linear and isinstance(model[0], SliceLinear)
    for _ in range(10):
        step(model, ours, x, y)
        step(twin, theirs, x, y)
    for name, value in weights(twin).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model[0].bias, make()[0].bias)


def test_fp16_grad_scaler():
    model, (x, y) = make(dtype=torch.float16), batch(dtype=torch.float16)
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    twin = copy.deepcopy(model)
    plain = SliceAdamW(twin.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale((model(x) - y).float().square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        step(twin, plain, x, y)
    for name, value in weights(twin).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    # an overflow skips the step, moves nothing and counts nothing
    before, count = weights(model), model[0].schedule.steps
    optimizer.zero_grad()
    scaler.scale((model(x) * float("inf")).float().mean()).backward()
    scaler.step(optimizer)
    assert_equal_states(before, weights(model))
    assert model[0].schedule.steps == count


def test_bfloat16_weights_move_at_a_small_learning_rate():
    """An update of 1e-5 is far below bfloat16's resolution of a weight of 0.3; the float32 master
    adds them up.
    """
    model, (x, y) = make(dtype=torch.bfloat16, interval=None), batch(dtype=torch.bfloat16)
    before, optimizer = weights(model), SliceAdamW(model.parameters(), lr=1e-5)
    for _ in range(100):
        step(model, optimizer, x, y)
    moved = (model[2].weight != before["2.weight"])[:, :3].float().mean().item()
    naive = copy.deepcopy(before["2.weight"])[:, :3]
    for _ in range(100):
        naive = naive + torch.tensor(1e-5, dtype=torch.bfloat16) * naive.sign()
    lost = (naive == before["2.weight"][:, :3]).float().mean().item()
    assert moved > 0.5 and lost > 0.5


def test_stochastic_rounding_is_reproducible_and_differs_from_nearest():
    def run(stochastic, seed):
        model, (x, y) = make(dtype=torch.bfloat16), batch(dtype=torch.bfloat16)
        optimizer = SliceAdamW(
            model.parameters(), lr=1e-3, bf16_stochastic_round=stochastic, seed=seed
        )
        for _ in range(7):
            step(model, optimizer, x, y)
        return weights(model)

    nearest, one, again, other = run(False, 0), run(True, 0), run(True, 0), run(True, 1)
    assert_equal_states(one, again)
    assert any(not torch.equal(one[n], nearest[n]) for n in one) and any(
        not torch.equal(one[n], other[n]) for n in one
    )


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("policy", ["reset", "keep", "remember"])
@pytest.mark.parametrize(
    "slice_type,mode",
    [
        ("column", "ascending"),
        ("row", "random"),
        ("block", "gradient"),
        ("row_column", "magnitude"),
        ("column", "random"),
    ],
)
def test_interrupted_equals_uninterrupted_bit_for_bit(slice_type, mode, policy, order):
    def fresh():
        model = make(
            slice_type,
            torch.bfloat16,
            interval=2,
            switch_mode=mode,
            state_on_switch=policy,
            modules_to_save=["4"],
        )
        optimizer = SliceAdamW(model.parameters(), lr=1e-2, bf16_stochastic_round=True)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    def go(model, optimizer, scheduler, first, last):
        for i in range(first, last):
            step(model, optimizer, *batch(dtype=torch.bfloat16, seed=i))
            scheduler.step()

    straight = fresh()
    go(*straight, 0, 25)
    first = fresh()
    go(*first, 0, 13)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # tensors and numbers only
    resumed = fresh()
    parts = [0, 1, 2] if order == "model first" else [1, 0, 2]
    for i in parts:
        resumed[i].load_state_dict(saved[i])
    go(*resumed, 13, 25)
    assert_equal_states(weights(straight[0]), weights(resumed[0]))


def test_another_optimizer_resumes_with_the_slices_state():
    def fresh():
        model = make(interval=2, dtype=torch.bfloat16)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    straight, first, resumed = fresh(), fresh(), fresh()
    for i in range(11):
        step(*straight, *batch(dtype=torch.bfloat16, seed=i))
    for i in range(6):
        step(*first, *batch(dtype=torch.bfloat16, seed=i))
    load_slice_state_dict(resumed[0], slice_state_dict(first[0]))
    resumed[0].load_state_dict(first[0].state_dict())
    resumed[1].load_state_dict(first[1].state_dict())
    for i in range(6, 11):
        step(*resumed, *batch(dtype=torch.bfloat16, seed=i))
    assert_equal_states(weights(straight[0]), weights(resumed[0]))


def test_an_optimizer_state_without_its_weights_is_refused():
    model, (x, y) = make(), batch()
    optimizer = SliceAdamW(model.parameters(), lr=1e-1)
    for _ in range(2):
        step(model, optimizer, x, y)
    other = make()
    SliceAdamW(other.parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(
        RuntimeError, match="Load the model's state dict of the same checkpoint"
    ):
        other(x)


def test_a_state_of_other_slices_is_refused():
    model, other = make(), make("row")
    with pytest.raises(ValueError, match="(?i)build the model with the saved SliceConfig"):
        SliceAdamW(other.parameters()).load_state_dict(
            SliceAdamW(model.parameters()).state_dict()
        )
    trained = torch.optim.AdamW(model.parameters())
    step(model, trained, *batch())
    with pytest.raises(ValueError, match="no slice for parameter"):
        SliceAdamW(model.parameters()).load_state_dict(trained.state_dict())


def test_remembered_moments_come_back():
    layer = SliceLinear(
        6, 4, config=slices_alone(r=3, switch_interval=2, state_on_switch="remember")
    )
    optimizer = SliceAdamW(layer.parameters(), lr=1e-2)
    seen = []
    for i in range(8):
        layer(
            torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state.get(layer.slice_weight, {})
        seen.append(float(state["step"]) if state else 0.0)
    # two positions in turns: 2 steps each, and the count goes on where it was
    assert seen == [1, 0, 1, 2, 3, 2, 3, 4]


# Optimizer_in_bwd


@pytest.mark.parametrize("slice_type", TYPES)
def test_in_bwd_equals_the_default_path(slice_type, backend):
    default, fused = make(slice_type), make(slice_type)
    optimizers = [
        SliceAdamW(default.parameters(), lr=1e-2, weight_decay=0.1),
        SliceAdamW(fused.parameters(), lr=1e-2, weight_decay=0.1, optimizer_in_bwd=True),
    ]
    for i in range(8):
        losses = [
            step(m, o, *batch(16, seed=i))
            for m, o in zip((default, fused), optimizers, strict=True)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


class Twice(nn.Module):
    """One layer used twice, and a tied pair: the weight may change only after the last use."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.other = (
            nn.Linear(10, 10, dtype=dtype),
            nn.Linear(10, 10, dtype=dtype),
        )
        self.other.weight = self.inner.weight
        self.out = nn.Linear(10, 4, dtype=dtype)

    def forward(self, x):
        return self.out(
            torch.tanh(self.other(torch.tanh(self.inner(torch.tanh(self.inner(x))))))
        )


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_in_bwd_with_a_weight_used_several_times(checkpointing):
    from torch.utils.checkpoint import checkpoint

    models = [
        get_slice_model(Twice(), slices_alone(r=3, switch_interval=2, tied_weights="share"))
        for _ in range(2)
    ]
    optimizers = [
        SliceAdamW(models[0].parameters(), lr=1e-2),
        SliceAdamW(models[1].parameters(), lr=1e-2, optimizer_in_bwd=True),
    ]
    for i in range(6):
        x, y = batch(16, torch.float64, i)
        x.requires_grad_(True)
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            output = (
                model(x)
                if checkpointing is None
                else checkpoint(model, x, use_reentrant=checkpointing)
            )
            loss = (output - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_in_bwd_is_not_disturbed_by_an_evaluation_in_between():
    models = [make(), make()]
    optimizers = [
        SliceAdamW(models[0].parameters(), lr=1e-2),
        SliceAdamW(models[1].parameters(), lr=1e-2, optimizer_in_bwd=True),
    ]
    for i in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            with torch.no_grad():
                model(batch(5)[0])
            step(model, optimizer, *batch(16, seed=i))
    for name, value in weights(models[0]).items():
        torch.testing.assert_close(
            models[1].state_dict()[name], value, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "attempt", ["accumulate", "clip", "norm", "scale", "backward twice"]
)
def test_in_bwd_refuses_what_it_cannot_do(attempt):
    model, (x, y) = make(), batch()
    optimizer = SliceAdamW(model.parameters(), lr=1e-2, optimizer_in_bwd=True)
    loss = (model(x) - y).square().mean()
    loss.backward(retain_graph=attempt == "backward twice")
    with pytest.raises(RuntimeError, match="optimizer_in_bwd=False"):
        if attempt == "accumulate":
            (model(x) - y).square().mean().backward()
        elif attempt == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        elif attempt == "norm":
            model[0].slice_weight.grad.norm().item()
        elif attempt == "scale":
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(loss)
            scaler.unscale_(optimizer)
        else:
            loss.backward()


def test_in_bwd_zero_grad_both_ways():
    model, (x, y) = make(), batch()
    optimizer = SliceAdamW(model.parameters(), lr=1e-2, optimizer_in_bwd=True)
    for to_none in (True, False, True):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)


# Mistakes


def test_an_optimizer_without_slices_is_refused():
    with pytest.raises(
        ValueError, match="none of the 2 parameters given is a slice: make slices first"
    ):
        SliceAdamW(nn.Linear(3, 3).parameters())


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (-0.1, 0.9)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
    ],
)
def test_bad_hyperparameters(bad):
    with pytest.raises(ValueError, match="expected"):
        SliceAdamW(make().parameters(), **bad)


# What a review found


@pytest.mark.parametrize("in_bwd", [False, True])
@pytest.mark.parametrize(
    "casts", [("float", "double"), ("double", "float"), ("float", "bfloat16")]
)
def test_the_state_follows_a_model_that_is_cast(casts, in_bwd):
    model = getattr(make(), casts[0])()
    optimizer = SliceAdamW(model.parameters(), lr=1e-2, optimizer_in_bwd=in_bwd)
    for cast in casts:
        getattr(model, cast)()
        dtype = model[0].weight.dtype
        for i in range(2):
            assert step(model, optimizer, *batch(dtype=dtype, seed=i)) < 10
    assert all(bool(w.isfinite().all()) for w in weights(model).values())


def test_bfloat16_heads_move_at_a_small_learning_rate_and_resume():
    def fresh():
        model = make(dtype=torch.bfloat16, modules_to_save=["4"])
        return model, SliceAdamW(model.parameters(), lr=1e-5)

    model, optimizer = fresh()
    before = weights(model)
    for i in range(100):
        step(model, optimizer, *batch(dtype=torch.bfloat16, seed=i))
    assert (model[4].weight != before["4.weight"]).float().mean() > 0.4
    other, resumed = fresh()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[other[4].weight]["exp_avg"].dtype == torch.float32
    for m, o in ((model, optimizer), (other, resumed)):
        for i in range(30):
            step(m, o, *batch(dtype=torch.bfloat16, seed=i))
    assert_equal_states(weights(model), weights(other))


@pytest.mark.parametrize(
    "config", [{"switch_mode": "fixed"}, {"r": 10, "target_modules": ["0"]}]
)
def test_a_move_to_the_same_place_changes_nothing(config):
    """A slice that stays keeps its moments and the bits of its master."""

    def run(interval):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
        model = get_slice_model(
            net, slices_alone(**{"r": 3, **config, "switch_interval": interval})
        )
        optimizer = SliceAdamW(model.parameters(), lr=1e-4)
        for i in range(20):
            step(model, optimizer, *batch(dtype=torch.bfloat16, seed=i))
        return weights(model)

    assert_equal_states(run(3), run(None))


def test_in_bwd_updates_only_when_the_slices_gradient_is_asked_for():
    model, (x, _) = make(), batch()
    optimizer = SliceAdamW(model.parameters(), lr=1e-1, optimizer_in_bwd=True)
    before = weights(model)
    x.requires_grad_(True)
    (saliency,) = torch.autograd.grad(model(x).sum(), x)
    assert saliency.abs().sum() > 0
    optimizer.zero_grad()
    assert_equal_states(before, weights(model))
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_in_bwd_zero_grad_drops_what_waits():
    models = [
        get_slice_model(
            Twice(),
            slices_alone(r=3, tied_weights="share", target_modules=["inner", "other"]),
        )
        for _ in range(2)
    ]
    optimizers = [
        SliceAdamW(m.parameters(), lr=1e-2, optimizer_in_bwd=True) for m in models
    ]
    x, y = batch(16, torch.float64)
    (100 * models[0](x)).sum().backward()  # a batch that is thrown away
    optimizers[0].zero_grad()
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, x, y)
    assert_equal_states(weights(models[0]), weights(models[1]))


def test_gradient_scores_of_a_skipped_step_are_forgotten():
    torch.manual_seed(0)
    layers = [
        SliceLinear(
            12, 5, config=slices_alone(r=3, switch_mode="gradient", switch_interval=1)
        )
        for _ in range(2)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [SliceAdamW(layer.parameters(), lr=1e-2) for layer in layers]
    x = torch.randn(20, 12) * torch.tensor([1.0, 2.0, 8.0, 4.0]).repeat_interleave(3)
    (layers[0](x * float("inf"))).sum().backward()
    optimizers[0].zero_grad()  # as GradScaler's skipped step
    for layer, optimizer in zip(layers, optimizers, strict=True):
        layer(x).square().sum().backward()
        optimizer.step()
    assert layers[0].schedule.position == layers[1].schedule.position != {"column": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"switch_interval": 7},
        {"switch_mode": "random"},
        {"seed": 5},
        {"contiguous": False},
        {"start_position": 1},
    ],
)
def test_a_state_of_another_schedule_is_refused(change):
    model, other = (
        make(),
        make(
            **{"interval": change.get("switch_interval", 3)},
            **{k: v for k, v in change.items() if k != "switch_interval"},
        ),
    )
    saved, optimizer = (
        SliceAdamW(model.parameters()).state_dict(),
        SliceAdamW(other.parameters()),
    )
    with pytest.raises(
        ValueError, match=rf"differ from this layer's in .*{next(iter(change))}"
    ):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("in_bwd", [False, True])
def test_a_copied_optimizer_goes_on(in_bwd):
    model = make()
    optimizer = SliceAdamW(model.parameters(), lr=1e-2, optimizer_in_bwd=in_bwd)
    step(model, optimizer, *batch())
    optimizer.zero_grad()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for i in range(4):
        assert step(model, optimizer, *batch(seed=i)) == step(
            twin, twin_optimizer, *batch(seed=i)
        )
    assert_equal_states(weights(model), weights(twin))


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_shared_slice_trains_as_one_dense_weight(contiguous):
    model = get_slice_model(
        Twice(),
        slices_alone(r=3, tied_weights="share", contiguous=contiguous, switch_interval=2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    for i in range(5):
        x, y = batch(16, torch.float64, i)
        dense = Twice()
        dense.load_state_dict(model.state_dict())
        (dense(x) - y).square().mean().backward()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        cols = model.inner.slice_cols
        assert torch.equal(cols, model.other.slice_cols)
        torch.testing.assert_close(
            model.inner.slice_weight.grad, dense.inner.weight.grad[:, cols]
        )
        optimizer.step()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.inner.weight is model.other.weight
    model.to(torch.float32)
    step(model, optimizer, *batch(16))
    assert torch.equal(
        model.inner.slice_weight, model.inner.weight[:, model.inner.slice_cols]
    )


def test_a_shared_slice_needs_one_r():
    with pytest.raises(ValueError, match="give them the same r in rank_pattern"):
        get_slice_model(
            Twice(), slices_alone(r=3, tied_weights="share", rank_pattern={"other": 2})
        )


def test_another_optimizer_that_resumes_without_the_slices_state_warns():
    model, other = make(), make()
    trained = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        step(model, trained, *batch())
    resumed = torch.optim.AdamW(other.parameters())
    resumed.load_state_dict(trained.state_dict())
    with pytest.warns(
        UserWarning,
        match="AdamW resumes at step 2, but the slices start at their first position",
    ):
        step(other, resumed, *batch())


def test_in_bwd_an_evaluation_between_two_steps_is_no_use():
    model = make()
    optimizer = SliceAdamW(model.parameters(), optimizer_in_bwd=True)
    x, _ = batch()
    with torch.no_grad():
        model(x)
    model(x).sum().backward()
    assert not optimizer._deferred
