"""PEFT's matching rules, against PEFT itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slicefine import SliceConfig, get_slice_model, list_targets
from slicefine.targets import find_targets


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20
        )
    )


CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj"]},
    {"target_modules": r".*\.layers\.[02]\..*proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
    {
        "target_modules": ["q_proj", "o_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3},
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_layers_and_ranks_as_peft(case):
    peft = pytest.importorskip("peft")
    ours = {t.name: t.r for t in find_targets(llama(), SliceConfig(r=4, **case))}
    lora = peft.get_peft_model(llama(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **case))
    theirs = {}
    for name, module in lora.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            theirs[name] = module.r["default"]
    assert ours == theirs


def test_conv1d_is_linear_and_the_head_is_left_out():
    peft = pytest.importorskip("peft")
    model = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    names = {t.name for t in find_targets(model, SliceConfig(r=4))}
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        lora = peft.get_peft_model(
            gpt2(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    assert names == {
        n
        for n, m in lora.base_model.model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("slice_type", ["column", "row", "block", "row_column"])
def test_conv1d_trains_and_comes_back(slice_type):
    from slicefine import SliceAdamW, SliceLinear

    torch.manual_seed(0)
    model = gpt2().eval()
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    keys = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    get_slice_model(model, SliceConfig(r=4, slice_type=slice_type, switch_interval=2))
    attention = model.transformer.h[0].attn.c_attn
    assert (
        isinstance(attention, SliceLinear)
        and attention.fan_in_fan_out
        and (attention.out_features, attention.in_features) == (48, 16)
    )
    assert torch.equal(model(ids).logits, before) or torch.allclose(
        model(ids).logits, before, atol=1e-6
    )
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == keys
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model(ids).logits
    model.merge_and_unload()
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-5, atol=1e-5)


def test_every_unmatched_entry_is_named_with_its_nearest():
    with pytest.raises(ValueError) as error:
        find_targets(llama(), SliceConfig(target_modules=["q_prj", "v_proj", "zzz"]))
    message = str(error.value)
    assert (
        "'q_prj': nothing matches; nearest names: q_proj" in message
        and "'zzz': nothing matches" in message
        and "'v_proj'" not in message
    )


def test_a_pattern_that_leaves_nothing():
    with pytest.raises(
        ValueError,
        match=(
            "leaves no layer of LlamaForCausalLM. Linear layers there:"
            " model.layers.0.self_attn.q_proj"
        ),
    ):
        find_targets(
            llama(), SliceConfig(target_modules=["q_proj"], exclude_modules=["q_proj"])
        )


def test_the_dry_run_lists_shapes_and_changes_nothing():
    model = llama()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    rows = list_targets(model, SliceConfig(r=4, target_modules=["q_proj", "k_proj"]))
    assert [
        (m.name, m.out_features, m.in_features, m.r, m.parameters) for m in rows[:2]
    ] == [
        ("model.layers.0.self_attn.q_proj", 16, 16, 4, 64),
        ("model.layers.0.self_attn.k_proj", 8, 16, 4, 32),
    ]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


class OwnAttention(nn.MultiheadAttention):
    """A subclass, which may compute anything."""


class WithAttention(nn.Module):
    def __init__(self, kind=OwnAttention):
        super().__init__()
        self.attention, self.out = kind(8, 2), nn.Linear(8, 8)


def test_layers_that_would_never_train_are_refused_or_skipped():
    with pytest.raises(
        ValueError,
        match="a subclass of nn.MultiheadAttention, which may read its weight without calling it",
    ):
        find_targets(WithAttention(), SliceConfig(r=2, target_modules=["out_proj"]))
    skipped = {t.name: t.skipped for t in find_targets(WithAttention(), SliceConfig(r=2))}
    assert skipped["out"] is None and "MultiheadAttention" in skipped["attention.out_proj"]
    with pytest.raises(ValueError, match="is a LayerNorm; only nn.Linear"):
        find_targets(nn.Sequential(nn.LayerNorm(4)), SliceConfig(target_modules=["0"]))

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(ValueError, match="with a forward of its own"):
        find_targets(nn.Sequential(Odd(4, 4)), SliceConfig(r=2, target_modules=["0"]))
    patched = nn.Sequential(nn.Linear(4, 4))
    patched[0].forward = lambda x: x
    with pytest.raises(ValueError, match="has been replaced on the instance"):
        find_targets(patched, SliceConfig(r=2))


def test_quantized_and_meta_weights_are_named():
    quantized = nn.Sequential(nn.Linear(4, 4))
    quantized[0].weight = nn.Parameter(
        torch.zeros(4, 4, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="0 is a Linear with a quantized weight"):
        find_targets(quantized, SliceConfig(r=2))
    with pytest.raises(
        ValueError, match="meta device, without values; load the weights first"
    ):
        find_targets(nn.Sequential(nn.Linear(4, 4, device="meta")), SliceConfig(r=2))


class Layered(nn.Module):
    """Three layers in a list below another module, or at the root."""

    def __init__(self, at_root=False):
        super().__init__()
        layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(3))
        self.other = nn.Linear(8, 8)
        if at_root:
            self.layers = layers
        else:
            self.body = nn.Module()
            self.body.layers = layers


@pytest.mark.parametrize(("wanted", "missing"), [([1, 7], "7"), ([1, -1], "-1"), (3, "3")])
def test_a_layer_number_that_does_not_exist_is_refused(wanted, missing):
    config = SliceConfig(r=2, target_modules=["fc"], layers_to_transform=wanted)
    with pytest.raises(ValueError, match=f"names layer {missing}, .*in layers 0, 1, 2;"):
        find_targets(Layered(), config)


def test_layers_of_a_list_at_the_root_are_counted_too():
    config = SliceConfig(r=2, target_modules=["fc"], layers_to_transform=[0, 2])
    names = [target.name for target in find_targets(Layered(at_root=True), config)]
    assert names == ["layers.0.fc", "layers.2.fc"]


def test_a_rank_for_what_is_no_target_warns():
    config = SliceConfig(r=2, target_modules=["fc"], rank_pattern={"other": 4})
    with pytest.warns(
        UserWarning, match="rank_pattern names 'other', and other is no target"
    ):
        find_targets(Layered(), config)


def test_a_module_to_save_is_first_of_all_a_name():
    model = nn.Module()
    model.a = nn.Linear(8, 8)
    for name in ("head(1)", "head1"):
        model.register_module(name, nn.Linear(8, 3))
    config = SliceConfig(r=2, target_modules=["a"], modules_to_save=["head(1)"])
    get_slice_model(model, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head(1).weight", "head(1).bias"} <= trained


def names_of(model=None, **config):
    config = {"r": 2, "target_modules": ["fc"]} | config
    return [match.name for match in list_targets(model or Layered(), SliceConfig(**config))]


@pytest.mark.parametrize("layers", [[0, 1], (0, 1), range(2), {0, 1}])
@pytest.mark.parametrize("pattern", [None, "", "layers", ["layers"]])
def test_layer_numbers_in_every_form_that_peft_takes(layers, pattern):
    expected = ["body.layers.0.fc", "body.layers.1.fc"]
    assert names_of(layers_to_transform=layers, layers_pattern=pattern) == expected


def test_excluding_a_module_around_layers_is_pointed_out():
    with pytest.warns(
        UserWarning, match="exclude_modules names 'body', which is no layer that"
    ):
        names_of(exclude_modules=["body"])


def test_a_pattern_in_modules_to_save_still_matches():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "layer1", "layer2")})
    get_slice_model(
        model, SliceConfig(r=2, target_modules=["a"], modules_to_save=[r"layer\d"])
    )
    assert model.layer1.weight.requires_grad and model.layer2.weight.requires_grad


def test_a_model_with_peft_layers_is_refused_and_its_merged_model_is_not():
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["0"], r=2))
    for make in (list_targets, get_slice_model):
        with pytest.raises(
            ValueError, match=r"carries PEFT's layers .* merge_and_unload\(\)"
        ):
            make(wrapped, SliceConfig(r=2))
    merged = wrapped.merge_and_unload()
    assert [match.name for match in list_targets(merged, SliceConfig(r=2))] == ["0", "1"]
