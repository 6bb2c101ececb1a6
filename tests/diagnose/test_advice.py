"""Short trainings that leave nothing behind, the range test, allocation and the recommendation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.diagnose.advice import advise, allocate, candidates_of, method_of
from slicefine.diagnose.survey import Options, bound, kind_of, spread_over, survey
from slicefine.diagnose.trials import (
    TrialOptions,
    lr_range_test,
    read_range,
    short_training,
    smoothed,
)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Three residual blocks, a batch norm with buffers and a head called classifier."""

    def __init__(self, d=48, classes=3):
        super().__init__()
        self.layer = nn.ModuleList(Block(d) for _ in range(3))
        self.norm, self.classifier = nn.BatchNorm1d(d), nn.Linear(d, classes)

    def forward(self, x, labels=None):
        for block in self.layer:
            x = block(x)
        return self.classifier(self.norm(x))


def setting():
    torch.manual_seed(0)
    teacher, model = nn.Linear(48, 3), Net()
    make = lambda: (lambda x: {"x": x, "labels": teacher(x.tanh()).argmax(1)})(
        torch.randn(32, 48)
    )
    loss = lambda net, batch: nn.functional.cross_entropy(net(batch["x"]), batch["labels"])
    return model, [make() for _ in range(12)], [make() for _ in range(4)], loss


def test_a_short_training_is_that_of_slice_adamw_and_is_taken_back():
    model, batches, held, loss = setting()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    config = SliceConfig(
        r=4, modules_to_save=["classifier"], contiguous=False, switch_interval=2
    )
    recipe = TrialOptions(head_lr=3e-3, warmup=0.2, clip=0.5)
    run = short_training(model, config, batches, 2e-3, 10, held, recipe, loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert type(model) is Net and all(m.training for m in model.modules())
    # the same by hand
    get_slice_model(
        model,
        SliceConfig(
            r=4, modules_to_save=["classifier"], contiguous=False, switch_interval=None
        ),
    )
    head = list(model.classifier.parameters())
    base = [p for n, p in model.named_parameters() if p.requires_grad and "class" not in n]
    optimizer = SliceAdamW(
        [{"params": base, "lr": 2e-3}, {"params": head, "lr": 3e-3}], lr=1
    )
    losses = []
    for step in range(10):
        factor = (step + 1) / 2 if step < 2 else (10 - step) / 8
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = (
            2e-3 * factor,
            3e-3 * factor,
        )
        value = loss(model, batches[step])
        losses.append(value.item())
        value.backward()
        nn.utils.clip_grad_norm_([*base, *head], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = sum(loss(model, batch).item() for batch in held) / len(held)
    assert run.losses == pytest.approx(losses, rel=1e-6) and run.held_loss == pytest.approx(
        expected, rel=1e-6
    )
    assert run.held_loss < losses[0]


def test_an_error_in_a_short_training_leaves_the_model_as_it_was():
    model, batches, _, loss = setting()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def breaks(net, batch):
        if batch is batches[3]:
            raise RuntimeError("the data")
        return loss(net, batch)

    with pytest.raises(RuntimeError, match="the data"):
        short_training(
            model,
            SliceConfig(r=4, modules_to_save=["classifier"]),
            batches,
            1e-2,
            10,
            loss=breaks,
        )
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and type(model) is Net
    )


def test_smoothing_is_a_weighted_mean():
    losses = [3.0, 1.0, 2.0]
    weights = [0.81, 0.9, 1.0]
    assert smoothed(losses)[-1] == pytest.approx(
        sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights)
    )
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)


def test_a_range_is_read_from_a_curve():
    lrs = [10 ** (-5 + i / 10) for i in range(50)]
    # flat until 1e-4, falling to its least at 1e-2, then rising
    losses = [
        (
            2.0
            if lr < 1e-4
            else 2 - 0.5 * (math.log10(lr) + 4)
            if lr <= 1e-2
            else 1 + 3 * (math.log10(lr) + 2)
        )
        for lr in lrs
    ]
    found = read_range(lrs, losses, True)
    assert 1e-4 < found.low < 1e-3 and 8e-3 < found.high < 3e-2 and found.usable
    assert found.suggested == pytest.approx(found.high / 10)
    rising = read_range(lrs, [1 + i for i in range(50)], True)
    assert not rising.usable and "never fell" in rising.notes[0]
    assert (
        "the upper end is not known"
        in read_range(lrs, losses[:20] + [1.0] * 30, False).notes[0]
    )


def test_the_range_test_separates_rates_that_train_from_rates_that_do_not():
    model, batches, held, loss = setting()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = SliceConfig(r=4, modules_to_save=["classifier"])
    found = lr_range_test(model, config, batches, 1e-5, 30.0, 60, loss=loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.usable and found.low < found.high and found.lrs[0] == pytest.approx(1e-5)
    after = lambda lr: (
        short_training(model, config, batches, lr, 30, held, loss=loss).held_loss
    )
    assert after(found.suggested) < after(1e-6) and after(found.suggested) < after(30.0)
    with pytest.raises(ValueError, match="at least 10 steps"):
        lr_range_test(model, config, batches, steps=5, loss=loss)


def test_allocation_costs_no_more_than_r_everywhere():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        names = [f"layer.{i}" for i in range(12)]
        weights = {n: float(10 ** (2 * torch.rand((), generator=generator))) for n in names}
        heights = {
            n: (384, 1536)[int(torch.randint(2, (), generator=generator))] for n in names
        }
        widths = {
            n: (384, 1536)[int(torch.randint(2, (), generator=generator))] for n in names
        }
        found = allocate(weights, heights, widths, 16)
        assert sum(found.values()) <= 16 * 12 and sum(
            found[n] * heights[n] for n in names
        ) <= 16 * sum(heights.values())
        assert sum(found.values()) >= 0.7 * 16 * 12 or sum(
            found[n] * heights[n] for n in names
        ) >= 0.7 * 16 * sum(heights.values())
        assert all(4 <= r <= 64 and r % 4 == 0 for r in found.values())
        ordered = sorted(names, key=weights.__getitem__)
        assert found[ordered[0]] <= found[ordered[-1]] and len(set(found.values())) > 2
    assert allocate({"a": 1.0, "b": 1.0}, {"a": 8, "b": 8}, {"a": 6, "b": 6}, 16) == {
        "a": 6,
        "b": 6,
    }


@pytest.fixture(scope="module")
def surveyed():
    model, batches, held, loss = setting()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    labels = torch.cat([batch["labels"] for batch in batches])
    options = Options(r=4, tokens=128, draws=2, tried=3, rank=True)
    found = survey(model, batches, options, labels, loss=loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return model, batches, held, loss, found


def test_a_survey_has_every_quantity(surveyed):
    import json

    found = json.loads(json.dumps(surveyed[4]))
    assert [row["name"] for row in found["layers"]] == [
        f"layer.{i}.{part}" for i in range(3) for part in ("up", "down")
    ]
    for row in found["layers"]:
        assert (
            set(row["balance"]) == {"row", "column"}
            and row["energy"]["k"]["0.9"] >= 1
            and row["energy"]["aligned_k"]
        )
        assert row["random_energy"]["k"]["0.9"] >= 1 and row["gradient_norm"] > 0
    tried = [w for w in found["winning"] if w["trials"]]
    assert len(tried) == 3 and all(len(w["trials"]) == 8 for w in tried)
    assert [row["name"] for row in found["tangent"]][-1] == "all of these together" and len(
        found["tangent"]
    ) == 4
    assert found["tangent"][-1]["invisible_by_examples"].keys() == {
        "2",
        "4",
        "8",
        "16",
        "32",
        "48",
    }
    invisible = list(found["tangent"][-1]["invisible_by_examples"].values())
    assert invisible == sorted(invisible, reverse=True) and invisible[0] > invisible[-1]
    assert (
        found["coverage"]["share"] == sorted(found["coverage"]["share"])
        and found["unused"] == []
    )
    assert found["coverage"]["share"][-1] == pytest.approx(4 / 64, rel=0.5)


class Wide(nn.Module):
    """Ten layers of 192 x 192 in a row."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(192, 192) for _ in range(10))

    def forward(self, x, labels=None):
        for layer in self.layer:
            x = torch.tanh(layer(x))
        return x


def test_a_survey_keeps_to_its_bound_of_memory():
    """Features in several passes, a decomposition at a time: within the stated bound, and less
    where the budget is smaller.
    """
    from slicefine import track_memory
    from slicefine.diagnose.capture import linear_layers, passes

    model, batches = Wide(), [{"x": torch.randn(64, 192)} for _ in range(4)]
    loss = lambda net, batch: net(batch["x"]).square().mean()
    layers, used = linear_layers(model), {}
    a_pass = (
        20 * 4 * 64 * 192
    )  # what a forward and backward pass of one batch holds by itself, and more
    for budget in (2 * 4 * 512 * 192, 1 << 24):
        options = Options(r=4, tokens=256, draws=1, tried=0, budget=budget)
        with track_memory(model=model) as report:
            survey(model, batches, options, loss=loss)
        used[budget] = report.peak_bytes - report.bytes_before
        assert used[budget] < bound(layers, options, model) + a_pass
    small, large = used.values()
    assert len(passes([192] * 10, 256, 256, 2 * 4 * 512 * 192)) == 5
    assert (
        small < 0.5 * large and large > 10 * 4 * 512 * 192
    )  # two layers' features at a time, against all ten layers'


def test_layers_are_chosen_over_depth_and_kinds():
    from slicefine.diagnose.capture import Layer

    assert kind_of("model.layers.12.self_attn.q_proj") == (
        "self_attn.q_proj",
        12,
    ) and kind_of("pooler") == (
        "pooler",
        -1,
    )
    layers = [
        Layer(f"h.{i}.{kind}", None)
        for i in range(6)
        for kind in ("q", "k", "v", "o", "up", "down")
    ]
    chosen = spread_over(layers, 6)
    assert {kind_of(name)[0] for name in chosen} == {"q", "k", "v", "o", "up", "down"}
    assert sorted(kind_of(name)[1] for name in chosen) == [0, 1, 2, 3, 4, 5]
    assert len(spread_over(layers, 99)) == 36


def test_advice_is_ranked_loads_and_costs_no_more(surveyed):
    model, batches, held, loss, found = surveyed
    before = {k: v.clone() for k, v in model.state_dict().items()}
    base = SliceConfig(r=8, modules_to_save=["classifier"])
    cost = lambda config: (
        1000 + (5 if config.rank_pattern else 0)
    )  # pretend that r by layer needs more
    advice = advise(
        model,
        found,
        batches,
        held,
        base,
        steps_in_all=2400,
        trial_steps=12,
        cost=cost,
        loss=loss,
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    config = SliceConfig.from_dict(advice.to_dict()["config"])
    assert (
        config == advice.config
        and config.switch_interval == 200
        and not config.rank_pattern
    )
    left_out = [c["name"] for c in advice.candidates if "left_out" in c]
    assert (
        left_out
        == [n for n in candidates_of(found, base) if n.startswith("scattered, r by")]
        and left_out
    )
    tried = [c["held_loss"] for c in advice.candidates if c["held_loss"] is not None]
    assert tried == sorted(tried) and tried[0] == pytest.approx(min(tried))
    effects = [line.effect for line in advice.lines]
    measured = [e for e in effects if e is not None]
    assert (
        len(measured) == 2
        and measured == sorted(measured, reverse=True)
        and effects[:2] == measured
    )
    assert {line.setting for line in advice.lines} >= {
        "learning rate",
        "slices and r per layer",
        "target modules",
        "slice type",
        "cost",
        "switch interval",
        "examples",
    }
    assert all(line.evidence for line in advice.lines)
    assert advice.lr_trials[advice.lr] == min(advice.lr_trials.values())
    again = short_training(
        model,
        SliceConfig.from_dict(advice.candidates[0]["config"]),
        batches,
        advice.lr,
        12,
        held,
        loss=loss,
    )
    assert again.held_loss == pytest.approx(advice.candidates[0]["held_loss"], rel=1e-6)
    short = advise(
        model, found, batches, held, base, steps_in_all=150, trial_steps=10, loss=loss
    )
    assert short.config.switch_interval is None and "fewer than two intervals" in next(
        line.evidence for line in short.lines if line.setting == "switch interval"
    )


def test_the_planners_method_leaves_heads_out():
    from slicefine.model import slice_layers

    model = Net()
    method_of(SliceConfig(r=4, modules_to_save=["classifier"])).prepare(model)
    assert len(list(slice_layers(model))) == 6 and type(model.classifier) is nn.Linear
    assert not model.classifier.weight.requires_grad


def test_the_benchmarks_judge_as_they_say():
    from benchmarks.quality.advised import summary
    from benchmarks.quality.switch_modes import compare

    rows = [
        ("random", 80.0),
        ("random", 82.0),
        ("ascending", 81.0),
        ("ascending", 83.0),
        ("gradient", 80.0),
        ("gradient", 84.0),
        ("magnitude", 79.0),
        ("magnitude", 81.5),
    ]
    found = compare(
        [
            {"mode": mode, "seed": i % 2, "accuracy": accuracy}
            for i, (mode, accuracy) in enumerate(rows)
        ]
    )
    assert (
        found["ascending"]["against_random"] == 1.0
        and found["ascending"]["standard_error"] == 0.0
        and found["ascending"]["beats_random"]
    )
    assert found["gradient"]["against_random"] == 1.0 and found["gradient"][
        "standard_error"
    ] == pytest.approx(1.0)  # differences 0 and 2
    assert (
        not found["gradient"]["beats_random"]
        and found["magnitude"]["against_random"] == -0.75
    )
    run = lambda arm, accuracy, peak: {
        "arm": arm,
        "accuracy": accuracy,
        "peak_bytes": peak,
        "trainable": 1,
    }
    runs = [
        run("default", 80, 10),
        run("default", 82, 10),
        run("default, advised lr", 81, 10),
        run("advised", 81, 9),
        run("advised", 81, 11),
    ]
    judged = summary({"runs": runs})
    assert (
        judged["advised"]["mean"] == 81
        and judged["as_accurate"]
        and not judged["no_more_memory"]
    )


def test_the_docs_have_the_figures_of_the_committed_runs():
    import json
    from pathlib import Path

    from benchmarks.quality.advised import arms_of
    from benchmarks.quality.switch_modes import compare

    root = Path(__file__).parents[2]
    docs = (root / "docs" / "diagnose.md").read_text(encoding="utf-8")
    modes = json.loads((root / "benchmarks" / "results" / "switch-modes.json").read_text())[
        "tasks"
    ]["movie"]
    assert compare(modes["runs"]) == modes["summary"]
    for mode, row in modes["summary"].items():
        assert (
            f"| `{mode}` | {', '.join(f'{a:.1f}' for a in row['accuracies'])} | {row['mean']:.2f} |"
            in docs
        )
    for task in json.loads((root / "benchmarks" / "results" / "advised.json").read_text())[
        "tasks"
    ].values():
        config, lr = arms_of(task["advice"])["advised"]
        assert config.r == 16 and f"{lr:.1e} (" in docs
        assert (
            task["advice"]["cost"]["default"]
            >= task["advice"]["candidates"][0]["planned_bytes"]
        )
