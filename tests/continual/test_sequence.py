"""Learning task after task: measures on matrices made by hand, the paper's trend on real digits,
and deltas that cannot forget.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

pytest.importorskip("sklearn")

from slicefine.capacity.samples import Samples, accuracy, joined, predict
from slicefine.capacity.side_file import base_sha256
from slicefine.continual import digits
from slicefine.continual.metrics import (
    average_accuracy,
    average_forgetting,
    backward_transfer,
    is_learned,
    knee,
    learning_accuracy,
    majority_share,
    marginal_gains,
    power_law,
)
from slicefine.continual.sequence import TaskSamples, TrainingOptions, run
from slicefine.continual.sweep import sweep
from slicefine.continual.task_deltas import TaskDeltas
from slicefine.deltas.delta import Delta, DeltaError
from tests.configs import slices_alone

ROWS = slices_alone(slice_type="row", target_modules=["0", "2"], switch_interval=None)
SGD = TrainingOptions(epochs=20, lr=0.05, optimizer="sgd")
SLICES = TrainingOptions(epochs=8, lr=3e-3)


@pytest.fixture(scope="module")
def base():
    return digits.pretrained(256, 256)


@pytest.fixture(scope="module")
def rotated():
    return [TaskSamples(*t) for t in digits.rotated((22.5, 45, 67.5, 90))]


# Measures


def test_the_measures_of_a_matrix_by_hand():
    a = [[0.9, 0.2, 0.1], [0.95, 0.8, 0.2], [0.5, 0.6, 0.7]]
    assert average_accuracy(a) == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert average_forgetting(a) == pytest.approx(
        ((0.95 - 0.5) + (0.8 - 0.6)) / 2
    )  # the best ever, not the first
    assert learning_accuracy(a) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert backward_transfer(a) == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert average_forgetting([[0.5]]) == backward_transfer([[0.5]]) == 0.0
    with pytest.raises(ValueError, match="expected T rows of T"):
        average_accuracy([[0.1, 0.2]])
    with pytest.raises(ValueError, match="NaN"):
        average_forgetting([[math.nan, 0.1], [0.2, 0.3]])


def test_a_task_is_learned_when_it_beats_the_most_common_label_by_more_than_chance():
    labels = [0] * 60 + [1] * 40
    assert majority_share(labels) == 0.6
    # two standard errors of 100 answers at 0.6 are 0.098
    assert not is_learned(0.6, labels) and not is_learned(0.69, labels)
    assert is_learned(0.70, labels)
    # the same accuracy says more of more answers
    assert is_learned(0.69, labels * 10)
    assert not is_learned(1.0, [1, 1, 1])


def test_a_power_law_is_found_again():
    x = [16, 64, 256, 1024]
    law = power_law(x, [2.5 * v**-0.12 for v in x])
    assert law is not None and law.points == 4
    assert (law.gamma, law.beta, law.r2) == pytest.approx((2.5, 0.12, 1.0))
    bent = power_law(x, [1.0, 0.9, 0.5, 0.7])
    assert bent is not None and 0 < bent.r2 < 1
    assert power_law([4, 16], [0.0, 0.0]) is None


def test_gains_and_a_knee_by_hand():
    gains = marginal_gains([16, 64], [100, 400], [0.5, 0.6])
    assert gains[0]["per_doubling"] == pytest.approx(0.05)
    assert gains[0]["per_unit"] == pytest.approx(0.1 / 48) and gains[0][
        "per_parameter"
    ] == pytest.approx(0.1 / 300)
    assert knee([16, 32, 64, 128], [0.5, 0.7, 0.705, 0.9], 0.01) == 32
    assert knee([16, 32], [0.5, 0.7], 0.01) == 32


# The paper's trend


def test_permuted_digits_wider_models_forget_less_and_less_per_neuron():
    """Guha & Lakshman's trend: AF falls with the width of the model, by less and less for a neuron;
    their beta was 0.12.
    """
    tasks = lambda seed: [TaskSamples(*t) for t in digits.permuted(5, seed)]
    found = sweep(
        digits.perceptron,
        tasks,
        (16, 128, 1024),
        over="width",
        recipe=SGD,
        seeds=(10, 11),
        joint=False,
    )
    forgetting = [found.mean("full", w)["AF"] for w in (16, 128, 1024)]
    assert forgetting[0] > forgetting[1] > forgetting[2]
    assert 0.06 < forgetting[0] - forgetting[2] < 0.2
    trends = found.trends("full")
    per_neuron = [step["per_unit"] for step in trends["gains_less_forgetting"]]
    assert per_neuron[0] > 5 * per_neuron[1] > 0
    assert (
        0.05 < trends["weight_drift"]["beta"] < 0.4 and trends["weight_drift"]["r2"] > 0.8
    )
    assert all(found.mean("full", w)["LA"] > 0.9 for w in (16, 128, 1024))


def test_wider_slices_forget_more_and_attached_deltas_nothing(base, rotated):
    """What a slice can move it can spoil: the opposite of the model's width. A delta per task is
    another matter.
    """
    before = base_sha256(base)
    runs = {
        (mode, r): run(
            lambda: copy.deepcopy(base),
            rotated,
            mode,
            r,
            recipe=SLICES,
            config=ROWS,
            base_test=digits.load()[1],
        )
        for mode in ("same", "attach")
        for r in (4, 51)
    }
    AF = {key: value.measures["AF"] for key, value in runs.items()}
    assert AF["same", 51] > AF["same", 4] + 0.2
    assert AF["attach", 4] == AF["attach", 51] == 0.0
    for r in (4, 51):
        attached = runs["attach", r]
        assert attached.proof is not None and all(
            attached.proof["bit_equal_logits"].values()
        )
        assert (
            attached.proof["base_sha256_at_first"]
            == attached.proof["base_sha256_at_last"]
            == before
        )
        assert attached.base_drop == 0.0 and attached.output_drift == {
            "mean": 0.0,
            "max": 0.0,
        }
        # a row of the matrix changes only where the task itself is learned
        for i, row in enumerate(attached.matrix):
            assert row[: i + 1] == attached.matrix[-1][: i + 1]
    assert runs["same", 51].base_drop > 0.4 and runs["same", 51].output_drift["mean"] > 1
    assert runs["attach", 51].measures["LA"] > 0.85


def test_replay_and_the_functional_penalty_hold_what_was_learned(base, rotated):
    plain, replayed, held = (
        run(
            lambda: copy.deepcopy(base),
            rotated[:3],
            "same",
            51,
            recipe=recipe,
            config=ROWS,
            joint=recipe.replay > 0,
        )
        for recipe in (
            SLICES,
            TrainingOptions(epochs=8, lr=3e-3, replay=100),
            TrainingOptions(epochs=8, lr=3e-3, functional=1.0),
        )
    )
    assert plain.measures["AF"] > replayed.measures["AF"] + 0.1
    assert plain.measures["AF"] > held.measures["AF"] + 0.1
    assert replayed.joint is not None and min(replayed.joint) > 0.85
    assert replayed.row()["JA"] == pytest.approx(sum(replayed.joint) / 3)


def test_disjoint_slices_touch_places_of_their_own(base, rotated):
    short = TrainingOptions(epochs=1, lr=1e-3)
    seen = {}
    for mode in ("same", "disjoint"):
        models = []
        run(
            lambda into=models: into.append(copy.deepcopy(base)) or into[-1],
            rotated[:2],
            mode,
            51,
            recipe=short,
            config=ROWS,
        )
        seen[mode] = set(
            (models[0][0].weight != base[0].weight).any(1).nonzero().flatten().tolist()
        )
    # a row whose ReLU never fires gets no gradient, so not every row of a place moves
    assert seen["same"] <= set(range(51)) and seen["disjoint"] <= set(range(102))
    assert len(seen["same"]) > 40 and len(seen["disjoint"] - set(range(51))) > 40
    with pytest.raises(ValueError, match="needs a place of its own for each of 4 tasks"):
        run(
            lambda: copy.deepcopy(base), rotated, "disjoint", 100, recipe=short, config=ROWS
        )


def test_heads_are_each_tasks_own(rotated):
    """Two tasks with labels that contradict each other: one head cannot serve both, two can, in
    every mode.
    """
    flipped = TaskSamples(
        "flipped",
        Samples(rotated[0].train.inputs, 9 - rotated[0].train.labels),
        Samples(rotated[0].test.inputs, 9 - rotated[0].test.labels),
    )
    make = lambda: digits.perceptron(128, 64, seed=1)
    config = slices_alone(slice_type="row", target_modules=["0", "2"], switch_interval=None)
    for mode in ("same", "attach"):
        found = run(
            make,
            [rotated[0], flipped],
            mode,
            16,
            recipe=TrainingOptions(epochs=6, lr=1e-3, head_lr=3e-3, head="4"),
            config=config,
            joint=mode == "same",
        )
        assert min(found.matrix[-1]) > 0.75, (mode, found.matrix)
        if mode == "attach":
            assert found.measures["AF"] == 0.0 and all(
                found.proof["bit_equal_logits"].values()
            )
        else:
            assert min(found.joint) > 0.75


def test_task_deltas_are_switched_saved_and_refused(base, rotated, tmp_path):
    folder = tmp_path / "deltas"
    model = copy.deepcopy(base)
    found = run(
        lambda: model,
        rotated[:2],
        "attach",
        16,
        recipe=TrainingOptions(epochs=2, lr=3e-3),
        config=ROWS,
        save=folder,
    )
    switch = TaskDeltas(base)
    for task in rotated[:2]:
        switch.add(task.name, Delta.load(folder / task.name.replace(" ", "-")))
    for i, task in enumerate(rotated[:2]):
        switch.attach(task.name)
        assert accuracy(base, task.test) == found.matrix[-1][i]
    switch.check()
    with pytest.raises(ValueError, match="no delta of task 'x'; there are '22.5 degrees'"):
        switch.attach("x")
    switch.attach(rotated[0].name)
    with torch.no_grad():
        base[0].weight[0, 0] += 1
    with pytest.raises(DeltaError, match="does not hold this delta"):
        switch.detach()
    with torch.no_grad():
        base[0].weight[0, 0] -= 1
    base[4].bias.data[0] += 1
    with pytest.raises(DeltaError):
        switch.check()
    base[4].bias.data[0] -= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "mode is 'both'; expected one of same, disjoint, attach, full"),
        ({"tasks": 1}, "there is one task; expected two or more"),
        (
            {"mode": "attach", "recipe": TrainingOptions(replay=5)},
            "cannot forget: replay and functional have nothing to do there",
        ),
        (
            {"recipe": TrainingOptions(optimizer="sgd")},
            "optimizer 'sgd' is for mode 'full'",
        ),
        (
            {"recipe": TrainingOptions(head="nowhere")},
            "head is 'nowhere', which the model does not have",
        ),
    ],
)
def test_bad_input_is_named(base, rotated, arguments, message):
    tasks = rotated[: arguments.pop("tasks", 2)]
    with pytest.raises(ValueError, match=message):
        run(
            lambda: copy.deepcopy(base),
            tasks,
            arguments.pop("mode", "same"),
            8,
            config=ROWS,
            **arguments,
        )
    with pytest.raises(ValueError, match="lr is 0"):
        TrainingOptions(lr=0)


def test_batches_hold_every_row_once_and_like_lengths_together():
    mask = torch.zeros(40, 12, dtype=torch.int64)
    for i in range(40):
        mask[i, : 1 + i % 12] = 1
    samples = Samples({"input_ids": mask * 7, "attention_mask": mask}, torch.arange(40))
    batches = samples.batches(8, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(batches).tolist()) == list(range(40))
    spread = lambda rows: int(mask[rows].sum(1).max() - mask[rows].sum(1).min())
    assert sum(map(spread, batches)) < sum(map(spread, torch.arange(40).split(8)))
    both = joined([samples[batches[0]], samples[batches[1]]])
    assert (
        torch.equal(both.labels, torch.cat(batches[:2]))
        and both.inputs["input_ids"].shape[0] == 16
    )


def test_predict_gives_rows_in_their_order():
    class Length(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.stack([attention_mask.sum(1), input_ids.sum(1)], 1).float()

    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    logits = predict(
        Length(), {"input_ids": mask * 5, "attention_mask": mask}, batch_size=2
    )
    assert logits.tolist() == [[3, 15], [1, 5], [2, 10]]


def test_the_json_of_a_sweep_and_its_page(base, rotated, tmp_path):
    pytest.importorskip("matplotlib")
    from slicefine.continual.report import continual_page

    found = sweep(
        lambda: copy.deepcopy(base),
        rotated[:2],
        (4, 16),
        ("same", "attach"),
        recipe=TrainingOptions(epochs=1),
        config=ROWS,
        alone=True,
    )
    content = json.loads(json.dumps(found.to_json()))
    for mode in ("same", "attach"):
        for size in ("4", "16"):
            entry = content["by_mode"][mode][size]
            assert (
                len(entry["matrix"]) == 2
                and {"AA", "AF", "LA", "BWT", "JA", "alone"} <= entry.keys()
            )
    assert (
        content["formulas"][1]
        == "AF = 1/(T-1) sum_{t<T} ( max_{t<=i<T} a[i][t] - a[T][t] )"
    )
    assert "heuristic" in content["trends"]["same"]["knee_is"]
    page = continual_page(found, "title", "below").html()
    assert "max_{t" in page and "cannot forget" in page and page.count("<figure") == 3
