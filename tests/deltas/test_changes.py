"""What `changed_since` gives, held to a comparison of whole models, bit for bit."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import transformers
from torch import nn

from slicefine import DeltaError, SliceAdamW, get_slice_model
from slicefine.deltas.changes import apply_changes, pack_changes, unpack_changes
from tests.configs import slices_alone


def train(model, optimizer, steps, seed=0):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).to(dtype)


def assert_same(model, other):
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("slice_type", ["column", "row", "block", "row_column"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_model_follows_bit_for_bit(slice_type, contiguous, dtype):
    model = net(dtype)
    follower, reads = copy.deepcopy(model), random.Random(1)
    config = slices_alone(
        r=5, slice_type=slice_type, contiguous=contiguous, switch_interval=3, bias="all"
    )
    get_slice_model(model, config)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    done = 0
    while done < 200:
        count = reads.choice([1, 2, 7, 20])
        train(model, optimizer, count, seed=done)
        changes = unpack_changes(pack_changes(model.changed_since(done)))
        apply_changes(follower, changes)
        done += count
        assert_same(model, follower)
    assert model.changed_since(done) == []


def test_the_five_fields_address_the_flat_tensor():
    model = net()
    before = copy.deepcopy(model).state_dict()
    get_slice_model(model, slices_alone(r=3, switch_interval=4, contiguous=False))
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 6)
    for name, shape, dtype, values, indices in model.changed_since(0):
        flat = before[name].view(-1)
        assert (tuple(shape), dtype) == (tuple(before[name].shape), before[name].dtype)
        assert indices.dtype == torch.int64 and len(indices.unique()) == len(values)
        assert 0 < len(values) < flat.numel()
        flat[indices] = values
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_only_what_was_active_is_sent():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False))
    get_slice_model(model, slices_alone(r=4, switch_interval=10))
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    x = torch.randn(4, 64)
    for _ in range(15):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    # two positions of 4 columns after 15 steps; the second alone since step 10
    values = [
        sum(c.part.numel() for c in model.changed_since(step)) for step in (0, 10, 15)
    ]
    assert values == [2 * 4 * (32 + 64), 4 * (32 + 64), 0]
    sent = model.changed_since(10)
    assert len(pack_changes(sent)) < 1024 + sum(change.nbytes for change in sent)


def test_weights_that_were_written_are_sent_whole():
    model = net()
    get_slice_model(model, slices_alone(r=3, switch_interval=4))
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 6)
    follower = net()
    apply_changes(follower, model.changed_since(0))
    with torch.no_grad():
        model[0].weight.mul_(2)
    train(model, optimizer, 1)
    changes = model.changed_since(6)
    assert {c.name: c.whole for c in changes if c.name.endswith("weight")} == {
        "0.weight": True,
        "2.weight": False,
    }
    apply_changes(follower, changes)
    assert_same(model, follower)
    model.revert()
    apply_changes(follower, model.changed_since(7))
    assert_same(model, follower)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="disabled"):
        model.changed_since(7)
    # switching off and on again, and moving to where it is, change nothing
    train(model, optimizer, 2)
    with model.disable_adapter():
        pass
    model.to("cpu")
    assert not any(change.whole for change in model.changed_since(8))


def test_a_resumed_model_knows_where_it_has_been(tmp_path):
    from slicefine import load_slice_state_dict, slice_state_dict

    def start():
        model = net()
        get_slice_model(model, slices_alone(r=3, switch_interval=4))
        return model, SliceAdamW(model.parameters(), lr=1e-2)

    model, optimizer = start()
    train(model, optimizer, 10)
    torch.save((model.state_dict(), slice_state_dict(model)), tmp_path / "state.pt")
    resumed, _ = start()
    weights, slices = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    load_slice_state_dict(resumed, slices)
    for step in (0, 5, 9, 10):
        mine, theirs = model.changed_since(step), resumed.changed_since(step)
        assert [c.name for c in mine] == [c.name for c in theirs]
        assert all(
            torch.equal(a.values, b.values) for a, b in zip(mine, theirs, strict=True)
        )


def test_names_are_those_of_the_checkpoint(tmp_path):
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 64,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 14,
            "patch_size": 7,
        },
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    follower = copy.deepcopy(model)
    get_slice_model(
        model, slices_alone(r=4, target_modules=r"model\.language_model\..*_proj")
    )
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(
        input_ids=torch.randint(0, 64, (2, 8)), labels=torch.randint(0, 64, (2, 8))
    ).loss.backward()
    optimizer.step()
    changes = model.changed_since(0)
    model.save_pretrained(tmp_path, state_dict=follower.state_dict())
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert {change.name for change in changes} <= saved.keys()
    assert not {change.name for change in changes} & model.state_dict().keys()
    apply_changes(follower, changes)
    assert_same(model, follower)


def test_experts_that_a_checkpoint_holds_one_by_one_are_refused():
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=32,
    )
    model = transformers.MixtralForCausalLM(config)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    get_slice_model(model, slices_alone(r=4, target_parameters=experts))
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 32, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(DeltaError, match="experts.*another form in a checkpoint"):
        model.changed_since(0)


def test_bad_input_is_refused_and_nothing_is_written():
    model = net()
    get_slice_model(model, slices_alone(r=3))
    with pytest.raises(ValueError, match="step is 3; the slices have taken 0 steps"):
        model.changed_since(3)
    with pytest.raises(ValueError, match="step is -1; expected a number"):
        model.changed_since(-1)
    train(model, SliceAdamW(model.parameters(), lr=1e-2), 2)
    changes = model.changed_since(0)
    wrong = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(DeltaError, match=r"2.weight is \(7, 20\)"):
        apply_changes(wrong, changes)
    assert all(torch.equal(before[key], value) for key, value in wrong.state_dict().items())
    data = pack_changes(changes)
    for broken in (data[:50], b"", b"x" * 100, data[:-1]):
        with pytest.raises(DeltaError, match="no changes of pack_changes"):
            unpack_changes(broken)


def test_running_statistics_of_batch_norms_are_sent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 6))
    follower = copy.deepcopy(model)
    get_slice_model(model, slices_alone(r=3, switch_interval=2, norms="all"))
    train(model, SliceAdamW(model.parameters(), lr=1e-2), 5)
    assert not torch.equal(model[1].running_mean, follower[1].running_mean)
    apply_changes(follower, unpack_changes(pack_changes(model.changed_since(0))))
    assert_same(model, follower)
