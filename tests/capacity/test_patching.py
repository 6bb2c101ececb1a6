"""AdditiveSide on models, patches of every kind, capacity curves and rho, on a perceptron trained
on real digits.
"""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import slicefine
from slicefine import SliceConfig

pytest.importorskip("sklearn")

from slicefine.capacity.curves import ftc_curve, relabeled, smallest
from slicefine.capacity.linearized import predict_sizes, verdict
from slicefine.capacity.patching import edit_report, load_patch, patch, perturbed
from slicefine.capacity.samples import Samples, predict, take
from slicefine.capacity.side import AdditiveSide, default_feature
from slicefine.capacity.side_file import base_sha256
from slicefine.continual import digits
from slicefine.deltas.delta import FILE, Delta, DeltaError

HIDDEN = SliceConfig(target_modules=["2"])


@pytest.fixture(scope="module")
def trained():
    """(model, 400 training samples with the labels that it gives, test samples)."""
    model = digits.pretrained(64, 64, epochs=12)
    train, test = digits.load()
    inputs = train.inputs[:400]
    return model, Samples(inputs, predict(model, inputs).argmax(1)), test


def edits_of(samples, N, seed=0):
    """(edits, inputs of the others)."""
    changed = relabeled(samples, N, 10, seed)
    mask = changed.labels != samples.labels
    assert int(mask.sum()) == N
    return changed[mask], samples.inputs[~mask]


def logits_bits(model, inputs):
    return predict(model, inputs).view(torch.int32)


# The side


def test_a_new_side_changes_no_bit_and_leaves_no_trace(trained):
    model, samples, _ = trained
    keys, before, state = (
        list(model.state_dict()),
        base_sha256(model),
        logits_bits(model, samples.inputs),
    )
    side = AdditiveSide(64, 10, layers=3, width=12, feature="4").attach(model)
    assert torch.equal(logits_bits(model, samples.inputs), state)  # f + 0 == f
    for parameter in side.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(logits_bits(model, samples.inputs), state)
    with side.disabled():
        assert torch.equal(logits_bits(model, samples.inputs), state)
    side.detach()
    assert torch.equal(logits_bits(model, samples.inputs), state)
    assert base_sha256(model) == before and list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_f_plus_g_is_that_sum_also_for_a_callable_and_with_a_negative_zero(trained):
    model, samples, _ = trained
    x = samples.inputs[:50]
    f = predict(model, x)
    for feature, inner in (
        ("4", lambda v: model[:4](v)),
        (lambda v: v[:, :64] * 2, lambda v: v * 2),
    ):
        side = AdditiveSide(64, 10, feature=feature)
        for parameter in side.parameters():
            nn.init.normal_(parameter)
        side.attach(model)
        torch.testing.assert_close(
            predict(model, x), f + side(inner(x)).detach(), rtol=0, atol=1e-5
        )
        side.detach()

    class Zero(nn.Module):
        def forward(self, v):
            return -0.0 * v.abs()

    model0 = nn.Sequential(Zero())
    side = AdditiveSide(3, 3, feature="0").attach(model0)
    with torch.no_grad():
        assert bool(model0(torch.ones(2, 3)).signbit().all())
    side.detach()


def test_a_side_trains_and_the_model_does_not(trained):
    model, samples, _ = trained
    before = base_sha256(model)
    side = AdditiveSide(64, 10, width=8, feature="4").attach(model)
    nn.functional.cross_entropy(
        model(samples.inputs[:8]), torch.zeros(8, dtype=torch.int64)
    ).backward()
    assert (
        side.network[2].weight.grad is not None
        and side.network[2].weight.grad.abs().sum() > 0
    )
    twin = copy.deepcopy(model)  # has a side of its own
    side.detach()
    model.zero_grad()
    assert (
        base_sha256(model) == before
        and twin[4]._forward_hooks
        and not model[4]._forward_hooks
    )


def test_the_head_of_a_model_is_found():
    model = nn.Module()
    model.body, model.classifier = nn.Linear(4, 4), nn.Linear(4, 2)
    assert default_feature(model) == "classifier"
    assert (
        default_feature(
            nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(1))
        )
        == "2"
    )
    with pytest.raises(ValueError, match="no linear layer"):
        default_feature(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: AdditiveSide(4, 2, layers=4, feature="0"),
            "layers is 4; expected 2 or 3",
        ),
        (
            lambda m: AdditiveSide(4, 2, layers=3, width=1, feature="0"),
            "width is 1; expected at least 2",
        ),
        (lambda m: AdditiveSide(4, 2, feature="nowhere").attach(m), "no module 'nowhere'"),
        (
            lambda m: patch(m, Samples(torch.ones(1, 64), torch.tensor([11]))),
            "ask for class 11; the model has classes 0 to 9",
        ),
        (
            lambda m: patch(
                m,
                Samples(torch.ones(1, 64), torch.tensor([1])),
                mode="exact",
                method="slice",
            ),
            "only a side network can be constructed",
        ),
        (
            lambda m: patch(m, Samples(torch.ones(1, 64), torch.tensor([1])), mode="magic"),
            "mode is 'magic'",
        ),
        (
            lambda m: Samples(torch.ones(2, 3), torch.tensor([1])),
            "2 rows and there are 1 labels",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:no keep set")
def test_bad_input_is_named(trained, make, message):
    with pytest.raises(ValueError, match=message):
        make(trained[0])


# Patches


@pytest.mark.parametrize("layers", [2, 3])
def test_an_exact_patch_keeps_every_bit_and_goes_away(trained, layers, tmp_path):
    model, samples, test = trained
    edits, keep = edits_of(samples, 16)
    before, bits, kept = (
        base_sha256(model),
        logits_bits(model, test.inputs),
        logits_bits(model, keep),
    )
    made = patch(model, edits, keep, held_out=test.inputs, layers=layers)
    assert (
        made.report.efficacy == made.report.locality == made.report.kept_bit_equal == 1.0
        and made.solved
    )
    assert torch.equal(predict(model, edits.inputs).argmax(1), edits.labels)
    assert torch.equal(logits_bits(model, keep), kept)
    # held-out flips were 0.4 to 1.4 % where this was tried first; a trained patch's are 6 to 17 %
    assert made.report.held_out_flips < 0.03
    assert made.report.generality < 0.9  # it knows the samples and nothing around them
    assert any("does not generalize" in line for line in made.warnings)
    made.save(tmp_path)
    patched = logits_bits(model, test.inputs)
    made.remove()
    assert (
        torch.equal(logits_bits(model, test.inputs), bits) and base_sha256(model) == before
    )
    again = load_patch(model, tmp_path)
    assert (
        torch.equal(logits_bits(model, test.inputs), patched)
        and again.report == made.report
    )
    again.remove()
    assert base_sha256(model) == before
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADDITIVE_SIDE" and config["base_model_sha256"] == before


TRAINED = {
    "side": {"method": "side", "size": 32, "steps": 1500},
    "slice": {"method": "slice", "size": 48, "config": HIDDEN, "steps": 800, "lr": 1e-2},
    "lora": {"method": "lora", "size": 8, "config": HIDDEN, "steps": 800, "lr": 1e-2},
}


@pytest.mark.parametrize("method", TRAINED)
def test_a_trained_patch_is_removed_stored_and_put_back(trained, method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    model, samples, test = trained
    edits, keep = edits_of(samples, 3)
    before, bits = base_sha256(model), logits_bits(model, test.inputs)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    made = patch(model, edits, keep, held_out=test.inputs, mode="train", **TRAINED[method])
    assert made.solved and made.report.efficacy == 1.0 and made.report.locality == 1.0
    assert made.report.generality > 0.9  # what the exact one lacks
    assert made.report.kept_bit_equal < 0.1 and any(
        "is not exact" in line for line in made.warnings
    )
    made.save(tmp_path)
    patched = predict(made.model, test.inputs)
    base = made.remove()
    assert (
        base is model
        and base_sha256(model) == before
        and torch.equal(logits_bits(model, test.inputs), bits)
    )
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    again = load_patch(model, tmp_path)
    assert torch.equal(predict(again.model, test.inputs), patched)
    again.remove()
    assert base_sha256(model) == before
    if method == "slice":
        assert Delta.load(tmp_path).info["efficacy"] == 1.0


def test_edits_alone_destroy_other_answers(trained):
    """The reason why a keep set is asked for: 45 to 69 % of kept answers were lost where it was
    measured first.
    """
    model, samples, test = trained
    edits, keep = edits_of(samples, 8)
    with pytest.warns(UserWarning, match="no keep set: nothing holds the other answers"):
        alone = patch(
            model, edits, mode="train", method="side", size=32, held_out=keep, steps=1500
        )
    assert alone.report.efficacy == 1.0 and alone.report.locality is None
    alone.remove()
    held = patch(
        model,
        edits,
        keep,
        mode="train",
        method="side",
        size=32,
        held_out=test.inputs,
        steps=3000,
    )
    held.remove()
    assert alone.report.held_out_flips > 0.25 > 0.1 > 1 - held.report.locality


def test_what_was_not_reached_is_said(trained):
    model, samples, _ = trained
    edits, keep = edits_of(samples, 40)
    with pytest.warns(
        UserWarning,
        match="not everything asked for was reached|inputs to keep for 40 edits",
    ):
        made = patch(model, edits, keep, mode="train", method="side", size=2, steps=5)
    assert not made.solved and made.report.efficacy < 1
    made.remove()


def test_a_patch_of_another_base_or_a_damaged_one_is_refused(trained, tmp_path):
    model, samples, _ = trained
    edits, keep = edits_of(samples, 4)
    made = patch(model, edits, keep)
    made.save(tmp_path)
    made.remove()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    with pytest.raises(DeltaError, match="made for another base model"):
        load_patch(other, tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(
        DeltaError,
        match="is damaged: the values of (at|direction|knots|slopes) are not those that were saved",
    ):
        load_patch(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="no patch in"):
        load_patch(model, tmp_path / "nothing")


@pytest.mark.parametrize("method", ["side", "slice"])
def test_a_patch_is_signed_like_a_delta(trained, method, tmp_path):
    pytest.importorskip("cryptography")
    from slicefine.deltas import signing

    model, samples, _ = trained
    edits, keep = edits_of(samples, 2)
    options = (
        {"mode": "exact"} if method == "side" else {"mode": "train", **TRAINED["slice"]}
    )
    made = patch(model, edits, keep, **options)
    made.save(tmp_path / "patch")
    made.remove()
    ours, theirs = (signing.new_key(tmp_path / name) for name in ("ours", "theirs"))
    with pytest.raises(signing.SignatureError, match="is not signed"):
        load_patch(model, tmp_path / "patch", ours)
    signing.sign(tmp_path / "patch", tmp_path / "ours")
    load_patch(model, tmp_path / "patch", ours).remove()
    with pytest.raises(signing.SignatureError):
        load_patch(model, tmp_path / "patch", theirs)
    side = patch(
        model, *edits_of(samples, 3, seed=5)
    )  # another patch under the same signature
    side.save(tmp_path / "patch")
    side.remove()
    with pytest.raises(signing.SignatureError):
        load_patch(model, tmp_path / "patch", ours)


def test_the_three_numbers_are_counts(trained):
    """`edit_report` against counts by hand, with a model whose answers are a table."""
    x = torch.arange(10.0)[:, None]
    before = lambda v: nn.functional.one_hot((v[:, 0].round().long() % 3), 3).float()
    after = lambda v: nn.functional.one_hot(
        torch.where(v[:, 0].round() < 4, 0, v[:, 0].round().long() % 3), 3
    ).float()
    edits = Samples(x[:2], torch.tensor([0, 1]))  # answered 0 and 0 afterwards
    report = edit_report(
        before,
        after,
        edits,
        keep=x[2:6],
        held_out=x[6:],
        perturb=lambda v, g: v + 4.0,
        draws=3,
    )
    assert report.efficacy == 0.5
    assert report.locality == 0.75  # 2 -> 0 flips; 3, 4, 5 stay
    assert report.held_out_flips == 0.0 and report.kept_bit_equal == 0.75
    assert (
        report.generality == report.generality_before == 0.0
    )  # 4 and 5 are answered 1 and 2 where 0 and 1 are asked
    shifted = edit_report(before, after, edits, perturb=lambda v, g: v + 0.2, draws=1)
    assert (shifted.generality, shifted.generality_before) == (
        0.5,
        1.0,
    )  # 0 and 1 before, 0 and 0 after
    assert (report.edits, report.kept, report.held_out, report.perturbed) == (2, 4, 4, 6)


def test_perturbed_encodings_lose_one_inner_token():
    ids = torch.tensor([[101, 7, 8, 9, 102, 0], [101, 5, 102, 0, 0, 0]])
    mask = (ids > 0).long()
    result = perturbed(
        {"input_ids": ids, "attention_mask": mask}, torch.Generator().manual_seed(0)
    )
    first = result["input_ids"][0][result["attention_mask"][0].bool()].tolist()
    assert first in ([101, 8, 9, 102], [101, 7, 9, 102], [101, 7, 8, 102])
    assert torch.equal(result["input_ids"][1], ids[1])  # one word: nothing to drop
    assert take({"input_ids": ids, "attention_mask": mask}, torch.tensor([1]))[
        "input_ids"
    ].shape == (1, 3)


# Curves and rho


def test_one_protocol_measures_slices_lora_and_sides(trained):
    pytest.importorskip("peft")
    model, samples, _ = trained
    sizes = {"slice": [32, 64], "lora": [2, 8], "side": [4, 16]}
    points = ftc_curve(
        lambda: copy.deepcopy(model), samples, [4], sizes, config=HIDDEN, steps=600
    )
    table = smallest(points)
    assert all(row["size"] is not None for row in table.values()), table
    # a slice of one layer is the least efficient memorizer by the number; sides and LoRA need a
    # fraction
    assert table["slice", 4]["parameters"] > table["lora", 4]["parameters"]
    for point in points:
        expected = {
            "slice": 64 * point.size,
            "lora": 128 * point.size,
            "side": 75 * point.size + 10,
        }[point.method]
        assert point.parameters == expected and point.solved == (point.wrong == 0)
    with pytest.raises(ValueError, match="labels wrong before any edit"):
        ftc_curve(
            lambda: copy.deepcopy(model), relabeled(samples, 2, 10, 0), [1], {"side": [4]}
        )


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_rho_is_the_least_norm_change_of_the_linearized_slice(trained, kind, contiguous):
    """Against torch.func: the Jacobian of the contrasts in the slice that SliceLinear really takes,
    the least-norm solution.
    """
    model, samples, _ = trained
    edits, _ = edits_of(samples, 5)
    config = SliceConfig(target_modules=["2"], slice_type=kind, contiguous=contiguous, r=16)
    [prediction] = predict_sizes(model, edits, [16], config)
    reference = copy.deepcopy(model).double().requires_grad_(False)
    layer = slicefine.SliceLinear.from_linear(copy.deepcopy(model[2]), config, "2")
    rows, cols = (None if i is None else i.clone() for i in (layer.rows, layer.cols))
    weight, x, wanted = (
        model[2].weight.detach().double(),
        edits.inputs.double(),
        edits.labels,
    )

    def contrast(block):
        index = (
            slice(None) if rows is None else rows,
            slice(None) if cols is None else cols,
        )
        full = (
            torch.index_put(weight, (rows,), block)
            if cols is None
            else weight.t().index_put((cols,), block.t()).t()
        )
        assert full[index].shape == block.shape
        logits = torch.func.functional_call(reference, {"2.weight": full}, (x,))
        own = logits.gather(1, wanted[:, None]).squeeze(1)
        return own - logits.scatter(1, wanted[:, None], float("-inf")).max(1).values

    block = weight[rows] if cols is None else weight[:, cols]
    jacobian = torch.func.jacrev(contrast)(block).flatten(1)
    need = (1 - contrast(block)).clamp(min=0)
    change = torch.linalg.lstsq(jacobian, need[:, None], driver="gelsd").solution
    assert abs(prediction.rho - float(change.norm() / block.norm())) < 1e-4 * prediction.rho
    assert prediction.rank == 5 and prediction.parameters == 16 * 64


def test_rho_counts_layers_by_name_and_refuses_one_called_twice():
    """Layers defined in another order than they are called in."""

    class Backwards(nn.Module):
        def __init__(self, twice=False):
            super().__init__()
            self.second, self.first, self.twice = nn.Linear(12, 3), nn.Linear(5, 12), twice

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.second(h) + (self.second(h) if self.twice else 0)

    edits = Samples(torch.randn(2, 5), torch.tensor([0, 2]))
    config = SliceConfig(target_modules=["first", "second"], slice_type="column")
    [both] = predict_sizes(Backwards(), edits, [4], config)
    assert both.parameters == 4 * (12 + 3) and 0 < both.rho < 100
    with pytest.raises(ValueError, match="3 calls of 2 layers"):
        predict_sizes(Backwards(twice=True), edits, [4], config)


def test_rho_falls_with_the_slice_and_rises_with_the_edits(trained):
    model, samples, _ = trained
    for kind in ("column", "row"):
        config = SliceConfig(target_modules=["2"], slice_type=kind)
        rows = [
            [
                p.rho
                for p in predict_sizes(
                    model, edits_of(samples, N)[0], [4, 8, 16, 32, 64], config
                )
            ]
            for N in (2, 8)
        ]
        for row in rows:
            assert all(a > b for a, b in pairwise(row)), row
        assert all(few < many for few, many in zip(*rows, strict=True))
    assert [verdict(r) for r in (0.5, 1.0, 1.7, 2.6, float("inf"))] == [
        "comfortable",
        "comfortable",
        "borderline",
        "too small",
        "too small",
    ]
    with pytest.raises(ValueError, match="slice_type is 'block'"):
        predict_sizes(model, samples, [4], SliceConfig(slice_type="block"))


def test_slicefine_capacity_is_there():
    from slicefine import capacity

    assert capacity.ftc_bounds(4, 100).neurons == (12, 13)
    assert all(hasattr(capacity, name) for name in capacity.__all__)
