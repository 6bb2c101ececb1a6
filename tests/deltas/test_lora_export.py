"""A delta as a LoRA adapter: the same model in peft, exact ranks, truncation with its error, and
what LoRA cannot hold.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from slicefine import DeltaError, SliceAdamW, get_slice_model
from slicefine.deltas.delta import Delta, FullDelta, SliceValues, WeightDelta
from slicefine.deltas.lora import VLLM_RANKS, to_lora
from tests.configs import slices_alone
from tests.models.test_real_model import minilm

peft = pytest.importorskip("peft")


class Small(nn.Module):
    """Two layers whose names end alike, so a suffix match would hit both."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(24, 40)
        self.inner = nn.Module()
        self.inner.proj = nn.Linear(40, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.inner.proj(torch.relu(self.proj(x))))


def trained(model, steps=7, seed=0, **config):
    """(base, merged, delta) of a run with moving slices."""
    base = copy.deepcopy(model)
    get_slice_model(model, slices_alone(**{"r": 3, "switch_interval": 2, **config}))
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    width = next(p.shape[1] for p in model.parameters() if p.dim() == 2)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(5, width, generator=generator).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = model.delta()
    return base, model.merge_and_unload(), delta


def product(adapter, name):
    A, B = (
        adapter.tensors[f"base_model.model.{name}.lora_{side}.weight"].double()
        for side in "AB"
    )
    return B @ A


SLICES = [
    {"slice_type": "column"},
    {"slice_type": "column", "contiguous": False},
    {"slice_type": "row"},
    {"slice_type": "block", "r_out": 5},
    {"slice_type": "row_column"},
    {"slice_type": "row_column", "contiguous": False},
    {"slice_type": "block", "r": 7, "r_out": 9},
]


@pytest.mark.parametrize("options", SLICES)
@pytest.mark.parametrize("steps", [7, 60])  # 60: every position was visited, some twice
def test_the_product_is_the_change_and_the_rank_is_what_changed(options, steps):
    base, merged, delta = trained(Small(), steps, exclude_modules=["head"], **options)
    adapter = to_lora(delta, dtype=torch.float64)
    assert {m.name for m in adapter.modules} == {
        "proj",
        "inner.proj",
    } and adapter.error == 0
    for module in adapter.modules:
        change = (
            merged.get_submodule(module.name).weight.double()
            - base.get_submodule(module.name).weight.double()
        )
        assert torch.equal(product(adapter, module.name), change)
        columns, rows = int((change != 0).any(0).sum()), int((change != 0).any(1).sum())
        if options["slice_type"] in ("column", "row"):
            assert module.rank == min(
                columns if options["slice_type"] == "column" else rows, *change.shape
            )
        assert int(torch.linalg.matrix_rank(change)) <= module.rank <= min(change.shape)


@pytest.mark.parametrize("options", SLICES[:5])
def test_peft_computes_what_the_merged_model_computes(options, tmp_path):
    base, merged, delta = trained(
        Small(), 9, exclude_modules=["head"], rank_pattern={"inner.proj": 5}, **options
    )
    x = torch.randn(11, 24)
    to_lora(delta).save(tmp_path / "single")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "single")
    assert (loaded(x) - base(x)).abs().max() > 1e-3  # it does something
    torch.testing.assert_close(loaded(x), merged(x), rtol=0, atol=2e-6)
    # in float64 nothing but the rounding of new - old to the factors' dtype is left, and with
    # float64 factors nothing
    expected = copy.deepcopy(merged).double()(x.double())
    for dtype, bound in ((torch.float32, 1e-7), (torch.float64, 1e-14)):
        to_lora(delta, dtype=dtype).save(tmp_path / str(dtype))
        exact = peft.PeftModel.from_pretrained(
            copy.deepcopy(base).double(), tmp_path / str(dtype)
        )(x.double())
        assert (exact - expected).abs().max() < bound
    unloaded = loaded.merge_and_unload()
    torch.testing.assert_close(
        unloaded.proj.weight, merged.proj.weight, rtol=2e-7, atol=1e-9
    )


def test_only_what_trained_is_hit_however_names_end(tmp_path):
    """``proj`` alone trained; a list of targets would hit ``inner.proj`` too."""
    base, merged, delta = trained(Small(), target_modules=r"proj")
    assert delta.weights.keys() == {"proj.weight"}
    to_lora(delta).save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert type(loaded.base_model.model.inner.proj) is nn.Linear
    assert {name for name, _ in loaded.named_parameters() if "lora_A" in name} == {
        "base_model.model.proj.lora_A.default.weight"
    }
    x = torch.randn(4, 24)
    torch.testing.assert_close(loaded(x), merged(x), rtol=0, atol=2e-6)


def test_a_head_goes_to_modules_to_save(tmp_path):
    base, merged, delta = trained(
        Small(), exclude_modules=["head"], modules_to_save=["head"]
    )
    adapter = to_lora(delta)
    assert adapter.config["modules_to_save"] == ["head"]
    adapter.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded.base_model.model.head.weight, merged.head.weight)
    x = torch.randn(4, 24)
    torch.testing.assert_close(loaded(x), merged(x), rtol=0, atol=2e-6)


@pytest.mark.real
def test_faq_27_a_moving_slice_run_of_a_real_model_serves_as_lora(tmp_path):
    """Row 27: peft's logits on the base are the merged model's within rounding; for vLLM a legal
    rank and no modules_to_save.
    """
    pytest.importorskip("transformers")
    from transformers import BertForSequenceClassification

    encoder = minilm(2)
    encoder.config.num_hidden_layers, encoder.config.num_labels = 2, 3
    model = BertForSequenceClassification(encoder.config)
    missing = model.bert.load_state_dict(encoder.state_dict(), strict=False).missing_keys
    assert all(name.startswith("pooler") for name in missing)
    base = copy.deepcopy(model).eval()
    whole = ["classifier", "pooler"]
    get_slice_model(
        model,
        slices_alone(r=16, switch_interval=2, exclude_modules=whole, modules_to_save=whole),
    )
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(1000, 20_000, (4, 9), generator=torch.Generator().manual_seed(1))
    for step in range(6):
        model(input_ids=ids, labels=(ids[:, 0] + step) % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "delta")
    merged = model.merge_and_unload().eval()
    delta = Delta.load(tmp_path / "delta")

    adapter = to_lora(delta)
    assert (
        len(adapter.modules) == 12 and max(m.rank for m in adapter.modules) == 48
    )  # three positions of 16 columns
    for module in adapter.modules:
        old, new = (m.get_submodule(module.name).weight for m in (base, merged))
        assert module.rank == int((old != new).any(0).sum())
    adapter.save(tmp_path / "lora")
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    with torch.no_grad():
        before, after = base(input_ids=ids).logits, merged(input_ids=ids).logits
        logits = served(input_ids=ids).logits
        in_double = (
            peft.PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path / "lora")
            .eval()(input_ids=ids)
            .logits
        )
        oracle = copy.deepcopy(merged).double()(input_ids=ids).logits
    assert (after - before).abs().max() > 0.05
    assert (in_double - oracle).abs().max() < 1e-7
    rounding = (after.double() - oracle).abs().max()  # of the merged model itself
    assert (logits.double() - oracle).abs().max() < 8 * rounding < 1e-4

    with pytest.raises(
        DeltaError,
        match=r"the head was fully trained \(bert.pooler.dense.bias.*vLLM takes no modules_to_save",
    ):
        to_lora(delta, server="vllm")
    legal = to_lora(delta, server="vllm", leave_out=True)
    assert legal.config["modules_to_save"] is None and legal.config["rank_pattern"] == {}
    assert legal.config["r"] == legal.config["lora_alpha"] == 64 and 64 in VLLM_RANKS
    assert set(legal.left_out) == {k for k in delta.whole}
    assert {t.shape[0] for n, t in legal.tensors.items() if "lora_A" in n} == {64}
    for module in legal.modules:  # zeros only: the product is the same
        assert torch.equal(product(legal, module.name), product(adapter, module.name))
    legal.save(tmp_path / "vllm")
    with torch.no_grad():
        body = copy.deepcopy(base)
        body.load_state_dict(
            {k: w.new for k, w in delta.whole.items()}, strict=False
        )  # the head in the base
        padded = (
            peft.PeftModel.from_pretrained(body, tmp_path / "vllm")
            .eval()(input_ids=ids)
            .logits
        )
    assert (padded.double() - oracle).abs().max() < 8 * rounding


def test_conv1d_is_transposed_for_peft(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        resid_pdrop=0,
        attn_pdrop=0,
        embd_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    base = copy.deepcopy(model).eval()
    get_slice_model(model, slices_alone(r=4, switch_interval=1, slice_type="row_column"))
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 50, (2, 8))
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = model.delta()
    merged = model.merge_and_unload().eval()
    adapter = to_lora(delta)
    assert adapter.config["fan_in_fan_out"] is True
    adapter.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=5e-6
        )


@pytest.mark.parametrize("server", ["peft", "vllm"])
def test_a_larger_rank_is_truncated_and_the_error_is_said(server):
    base, merged, delta = trained(Small(), 60, exclude_modules=["head"])
    adapter = to_lora(delta, server=server, max_rank=8, dtype=torch.float64)
    assert adapter.config["r"] == 8
    for module in adapter.modules:
        change = (
            merged.get_submodule(module.name).weight.double()
            - base.get_submodule(module.name).weight.double()
        )
        change = change.detach()
        left = change - product(adapter, module.name)
        S = torch.linalg.svdvals(change)
        assert module.rank == 8 < module.exact_rank
        assert module.error == pytest.approx(float(left.norm() / change.norm()), rel=1e-9)
        assert (
            module.error == pytest.approx(float(S[8:].norm() / S.norm()), rel=1e-9)
            and module.error > 1e-3
        )
    assert adapter.error == max(m.error for m in adapter.modules)


def test_beyond_vllms_largest_rank():
    """600 changed columns of rank 520: no loss that is not said."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(530, 600, generator=generator)
    new = (
        old
        + torch.randn(530, 520, generator=generator)
        @ torch.randn(520, 600, generator=generator)
        * 1e-2
    )
    weight = WeightDelta(
        (530, 640), False, "", [SliceValues(None, torch.arange(600), old, new)]
    )
    adapter = to_lora(Delta({"lin.weight": weight}), server="vllm")
    assert adapter.config["r"] == 512 and adapter.modules[0].exact_rank == 530
    change = torch.zeros(530, 640, dtype=torch.float64)
    change[:, :600] = new.double() - old.double()
    error = (change - product(adapter, "lin")).norm() / change.norm()
    assert (
        adapter.error == pytest.approx(float(error), rel=1e-3) and 0 < adapter.error < 0.1
    )
    exact = to_lora(Delta({"lin.weight": weight}))
    assert exact.modules[0].rank == 530 and exact.error == 0


@pytest.mark.parametrize("changed", [1, 2, 8, 9, 200, 300, 400])
def test_vllm_ranks_are_the_next_legal_ones(changed):
    old = torch.zeros(450, changed)
    weight = WeightDelta(
        (450, 450), False, "", [SliceValues(None, torch.arange(changed), old, old + 1)]
    )
    r = to_lora(Delta({"lin.weight": weight}), server="vllm").config["r"]
    assert (
        r in VLLM_RANKS
        and r >= changed
        and not any(changed <= legal < r for legal in VLLM_RANKS)
    )


def test_bfloat16_differences_are_exact_in_float32():
    base, merged, delta = trained(Small().bfloat16(), 20, exclude_modules=["head"])
    adapter = to_lora(delta)
    for module in adapter.modules:
        old, new = (
            base.get_submodule(module.name).weight,
            merged.get_submodule(module.name).weight,
        )
        assert not torch.equal(old, new)
        assert torch.equal(
            (old.double() + product(adapter, module.name)).to(torch.bfloat16), new
        )


class WithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)
        self.out = nn.Linear(24, 6)

    def forward(self, x):
        return self.out(self.norm(torch.relu(self.proj(x))))


def test_biases_and_norms_travel_with_the_adapter_or_are_left_out(tmp_path):
    torch.manual_seed(0)
    base, merged, delta = trained(WithNorm(), **{"bias": "slice_only", "norms": "torch"})
    changed = {"proj.bias", "out.bias", "norm.weight", "norm.bias"}
    assert delta.whole.keys() == changed
    x = torch.randn(4, 24)
    adapter = to_lora(delta)
    assert not adapter.left_out and adapter.config["bias"] == "all"
    adapter.save(tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert (loaded(x) - merged(x)).abs().max() < 1e-6
    for key, value in loaded.merge_and_unload().state_dict().items():
        exact = key in changed
        assert torch.allclose(
            value, merged.state_dict()[key], rtol=0, atol=0 if exact else 1e-6
        )
    with pytest.raises(
        DeltaError, match='4 biases, norms or buffers .*bias="none", norms="none"'
    ):
        to_lora(delta, server="vllm")
    adapter = to_lora(delta, server="vllm", leave_out=True)
    assert set(adapter.left_out) == changed
    adapter.save(tmp_path / "vllm")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "vllm")
    # what left_out warns of
    assert (loaded(x) - merged(x)).abs().max() > 1e-4


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.layer(x))


def test_attention_that_uses_its_weights_itself_is_refused(tmp_path):
    """peft wraps what nn.MultiheadAttention and the encoder's fast path never call, and computes as
    if nothing had trained.
    """
    model = Encoder()
    base = copy.deepcopy(model).eval()
    get_slice_model(model, slices_alone(r=4, switch_interval=1))
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(2, 5, 16)).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = model.delta()
    refused = [
        f"layer.{name}"
        for name in (
            "linear1.weight",
            "linear2.weight",
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
        )
    ]
    assert delta.weights.keys() == {*refused, "out.weight"}
    with pytest.raises(
        DeltaError,
        match="4 weights, such as layer.*nn.MultiheadAttention.*export the merged model",
    ):
        to_lora(delta)
    adapter = to_lora(delta, leave_out=True)
    assert sorted(adapter.left_out) == refused and [m.name for m in adapter.modules] == [
        "out"
    ]
    adapter.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    partly = copy.deepcopy(base)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        partly.out.weight.copy_(model.out.weight)
        torch.testing.assert_close(loaded(x), partly(x), rtol=0, atol=2e-6)

        # the reason: the same adapter with linear1 in it is what peft ignores
        config = peft.LoraConfig(
            r=2, target_modules=["linear1", "out_proj"], init_lora_weights=False
        )
        assert torch.equal(
            peft.get_peft_model(copy.deepcopy(base), config).eval()(x), base(x)
        )


def test_experts_are_refused():
    patch = SliceValues(None, torch.arange(2), torch.zeros(12, 2), torch.ones(12, 2))
    delta = Delta({"mlp.experts.down_proj": WeightDelta((12, 4), False, "", [patch])})
    with pytest.raises(DeltaError, match="such as mlp.experts.down_proj"):
        to_lora(delta)


def test_a_head_whose_name_ends_anothers_is_refused():
    """peft's modules_to_save matches ends of names without a dot: ``classifier`` is in
    ``pre_classifier`` (DistilBERT).
    """
    head = FullDelta(torch.zeros(2, 4), torch.ones(2, 4), False)
    weight = WeightDelta(
        (4, 4),
        False,
        "",
        [SliceValues(None, torch.arange(1), torch.zeros(4, 1), torch.ones(4, 1))],
    )
    delta = Delta({"pre_classifier.weight": weight}, {"classifier.weight": head})
    with pytest.raises(DeltaError, match="classifier would replace pre_classifier too"):
        to_lora(delta)


def test_an_export_never_replaces_a_delta_and_an_empty_one_is_refused(tmp_path):
    _, _, delta = trained(Small(), exclude_modules=["head"])
    delta.save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(delta.config_json())
    with pytest.raises(DeltaError, match="holds a slicefine delta"):
        to_lora(delta).save(tmp_path)
    Delta.load(tmp_path)  # still whole
    same = {
        k: WeightDelta(
            w.shape,
            w.transposed,
            "",
            [SliceValues(p.rows, p.cols, p.old, p.old) for p in w.patches],
        )
        for k, w in delta.weights.items()
    }
    with pytest.raises(DeltaError, match="changes no entry"):
        to_lora(Delta(same))
    with pytest.raises(ValueError, match="server is 'tgi'; expected 'peft' or 'vllm'"):
        to_lora(delta, server="tgi")
    with pytest.raises(ValueError, match="max_rank is 0"):
        to_lora(delta, max_rank=0)


def test_the_configuration_is_one_that_peft_knows(tmp_path):
    """No key that peft would warn of, and alpha equals the rank of every weight, so the scale is 1."""
    _, _, delta = trained(Small(), exclude_modules=["head"], rank_pattern={"inner.proj": 5})
    adapter = to_lora(delta)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() <= peft.LoraConfig.__dataclass_fields__.keys()
    loaded = peft.PeftModel.from_pretrained(Small(), tmp_path).base_model.model
    ranks = {m.name: m.rank for m in adapter.modules}
    assert len(set(ranks.values())) == 2
    for name, rank in ranks.items():
        layer = loaded.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.0)
