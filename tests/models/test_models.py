"""Every family of models of tests/families.py, trained beside a dense masked run of the same model;
what is refused, and how.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from slicefine import (
    SliceAdamW,
    SliceLayer,
    SliceLinear,
    SliceModel,
    get_slice_model,
)
from tests.configs import slices_alone
from tests.families import FAMILIES, SUPPORT, Family, committed_table, table

STEPS, INTERVAL, LR = 5, 2, 1e-2


def build(family: Family) -> nn.Module:
    """The model in float64 with random weights, dropout off."""
    torch.manual_seed(0)
    library: Any = pytest.importorskip(family.library)
    if family.library == "timm":
        return library.create_model(family.model, **family.sizes).double().eval()
    config = getattr(library, family.config)(**family.sizes)
    model = getattr(library, family.model)(config).double().eval()
    if family.parameters:
        model.set_experts_implementation("eager")  # the one that takes float64
    return model


def loss_of(model: Any, family: Family, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 39, (3, 6), generator=generator)
    size = 32 if "convnext" in family.model else 16
    image = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    if family.inputs == "image_text":
        return model(input_ids=tokens, pixel_values=image, return_loss=True).loss
    if family.inputs == "seq2seq":
        return model(input_ids=tokens, labels=tokens.flip(1)).loss
    if family.inputs == "tokens":
        causal = family.model.endswith(("CausalLM", "LMHeadModel"))
        return model(input_ids=tokens, labels=tokens if causal else tokens[:, 0] % 2).loss
    out = model(image)
    logits = getattr(out, "logits", out)
    return nn.functional.cross_entropy(logits, tokens[:, 0] % logits.shape[-1])


class DenseMasked:
    """torch's dense AdamW on whole weights whose gradients are masked; its state starts anew
    wherever the slice has moved.

    The slices are written from the definition: r neighboring features, one position further every
        INTERVAL steps.
    """

    def __init__(
        self, weights: dict[str, Tensor], transposed: set[str], r: int, slice_type: str
    ) -> None:
        self.weights, self.transposed, self.r, self.slice_type = (
            weights,
            transposed,
            r,
            slice_type,
        )
        for weight in weights.values():
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(weights.values(), lr=LR, weight_decay=0.0)
        self.visited = {
            name: torch.zeros(w.shape, dtype=torch.bool) for name, w in weights.items()
        }

    def mask(self, name: str, step: int) -> Tensor:
        move = step // INTERVAL
        column = self.slice_type == "column" or move % 2 == 0
        turn = move if self.slice_type == "column" else move // 2
        mask = torch.zeros(self.weights[name].shape, dtype=torch.bool)
        view = mask.t() if name in self.transposed else mask  # (..., out, in)
        features = view.shape[-1] if column else view.shape[0]
        start = min(turn % -(-features // self.r) * self.r, features - self.r)
        if column:
            view[..., start : start + self.r] = True
        else:
            view[start : start + self.r] = True
        return mask

    def step(self, step: int) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None, f"{name} has no gradient"
            mask = self.mask(name, step)
            weight.grad.mul_(mask)
            self.visited[name] |= mask
        self.optimizer.step()
        for name, weight in self.weights.items():
            if not torch.equal(self.mask(name, step), self.mask(name, step + 1)):
                self.optimizer.state.pop(weight, None)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return sorted(a) == sorted(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("slice_type", ["column", "row_column"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.filterwarnings("ignore:.*stays as it is")
def test_family(family: Family, slice_type: str, tmp_path):
    if family.parameters and slice_type != "column":
        pytest.skip("experts take column slices")
    plain = build(family).requires_grad_(False)
    keys = list(plain.state_dict())
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = get_slice_model(
        copy.deepcopy(plain),
        slices_alone(
            r=family.r,
            slice_type=slice_type,
            switch_interval=INTERVAL,
            target_parameters=family.parameters or None,
            # here the reference trains what is sliced and nothing else
            modules_to_save=[],
        ),
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SliceLayer)}
    key_of = {
        n: n if n not in {k.rpartition(".")[0] for k in keys} else f"{n}.weight"
        for n in layers
    }
    assert len(layers) == family.layers
    assert sorted(model.state_dict()) == sorted(keys)
    parameters = dict(plain.named_parameters())
    transposed = {n for n, layer in layers.items() if layer.fan_in_fan_out}
    oracle = DenseMasked(
        {n: parameters[key_of[n]] for n in layers}, transposed, family.r, slice_type
    )
    optimizer = SliceAdamW(model.parameters(), lr=LR)
    for step in range(STEPS):
        expected, loss = loss_of(plain, family, step), loss_of(model, family, step)
        assert abs(loss.item() - expected.item()) < 1e-9
        oracle.optimizer.zero_grad()
        optimizer.zero_grad()
        expected.backward()
        loss.backward()
        oracle.step(step)
        optimizer.step()
    after = {key: value.clone() for key, value in model.state_dict().items()}
    for name in layers:
        key, visited = key_of[name], oracle.visited[name]
        torch.testing.assert_close(
            after[key], oracle.weights[name].detach(), rtol=0, atol=1e-9
        )
        assert torch.equal(after[key][~visited], before[key][~visited])
        assert bool((after[key] != before[key])[visited].any())
    sliced = set(key_of.values())
    assert all(torch.equal(after[key], before[key]) for key in keys if key not in sliced)
    trained = loss_of(model, family, 0)
    model.save_pretrained(tmp_path)
    loaded: Any = SliceModel.from_pretrained(build(family), tmp_path)
    assert (
        same(loaded.state_dict(), after)
        and abs(loss_of(loaded, family, 0).item() - trained.item()) < 1e-12
    )
    assert same(loaded.unload().state_dict(), before)
    with model.disable_adapter():
        assert same(model.state_dict(), before)
    assert same(model.state_dict(), after)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, SliceLayer) for m in merged.modules())
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert list(merged.state_dict()) == keys
    assert all(torch.equal(value, after[key]) for key, value in merged.state_dict().items())
    if family.parameters:  # merged experts go through the implementation that is set; the default one's bits: test_experts.py
        assert abs(loss_of(merged, family, 0).item() - trained.item()) < 1e-12
    else:
        assert torch.equal(loss_of(merged, family, 0), trained)


class TwoUses(nn.Module):
    """One weight in two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def test_faq_18_tied_weights_share_one_slice_and_survive_merging():
    plain = TwoUses().requires_grad_(False)
    model = get_slice_model(
        copy.deepcopy(plain),
        slices_alone(r=3, switch_interval=INTERVAL, tied_weights="share"),
    )
    assert model.first.slice_weight is model.second.slice_weight
    oracle = DenseMasked(
        {"first": plain.first.weight, "head": plain.head.weight}, set(), 3, "column"
    )
    optimizer = SliceAdamW(model.parameters(), lr=LR)
    x = torch.randn(5, 8, dtype=torch.float64)
    for step in range(STEPS):
        losses = [module(x).square().mean() for module in (plain, model)]
        assert abs(losses[0].item() - losses[1].item()) < 1e-12
        oracle.optimizer.zero_grad()
        optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        oracle.step(step)
        optimizer.step()
    torch.testing.assert_close(
        model.first.weight, plain.first.weight.detach(), rtol=0, atol=1e-12
    )
    trained = model(x)
    merged = model.merge_and_unload()
    assert merged.first.weight is merged.second.weight and torch.equal(merged(x), trained)
    fresh = TwoUses()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(x), trained)


def test_faq_18_a_head_tied_to_the_embedding_is_skipped_or_refused_by_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    family = next(f for f in FAMILIES if f.name == "GPT-2")
    model: Any = build(family)
    embedding = model.transformer.wte.weight.detach().clone()
    with pytest.raises(
        ValueError,
        match=(
            r"the weight of lm_head is tied to transformer.wte \(Embedding\), which does not become"
            r" a slice, so the gradient of that use "
            "would be lost. Use tied_weights='skip', or untie them"
        ),
    ):
        get_slice_model(
            model,
            slices_alone(r=3, target_modules=["c_attn", "lm_head"], tied_weights="share"),
        )
    with pytest.warns(
        UserWarning,
        match="lm_head stays as it is: its weight is tied to transformer.wte; untie them",
    ):
        get_slice_model(model, slices_alone(r=3, target_modules=["c_attn", "lm_head"]))
    optimizer = SliceAdamW(model.parameters(), lr=LR)
    loss_of(model, family, 0).backward()
    optimizer.step()
    trained = loss_of(model, family, 0)
    model.merge_and_unload()
    assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(
        model.lm_head.weight, embedding
    )
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, dtype=torch.float64
    ).eval()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight and torch.equal(
        loss_of(loaded, family, 0), trained
    )


def quantized_by(how: str) -> nn.Module:
    """Two linear layers, the first of them quantized."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(torch.bfloat16)
    if how == "torch, dynamic":
        return torch.ao.quantization.quantize_dynamic(
            model.float(), {"0"}, dtype=torch.qint8
        )
    if how == "int8 parameter":
        model[0].weight = nn.Parameter(
            torch.zeros(64, 64, dtype=torch.int8), requires_grad=False
        )
    elif how == "packed":  # as GPTQ and AWQ: no nn.Linear, no weight
        model[0] = nn.Identity()
        model[0].register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))
    elif how == "torchao":
        quantization = pytest.importorskip(
            "torchao.quantization", reason="pip install torchao"
        )
        # its activations are quantized too
        quantization.quantize_(
            model,
            quantization.Int8DynamicActivationInt8WeightConfig(),
            lambda module, name: name == "0",
        )
    else:  # no weight is packed before the layer goes to its device
        model[0] = pytest.importorskip(
            "bitsandbytes", reason="pip install bitsandbytes"
        ).nn.Linear4bit(64, 64)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "how", ["int8 parameter", "packed", "torch, dynamic", "torchao", "bitsandbytes"]
)
def test_faq_20_other_quantized_layers_are_refused_by_name(how):
    model = quantized_by(how)
    for targets in ("all-linear", ["0"]):
        with pytest.raises(
            ValueError,
            match=(
                r"^0 is a \w+ with a quantized weight \(.+\); slices train floating-point weights,"
                r" and beside those that bitsandbytes \(4 and 8 bits\) and torchao \(weights only\)"
                r" have packed. Load the model in one of these, or leave the layer out"
                r" \(exclude_modules\)"
            ),
        ):
            get_slice_model(model, slices_alone(r=4, target_modules=targets))
    get_slice_model(model, slices_alone(r=4, exclude_modules=["0"]))
    assert isinstance(model[1], SliceLinear)


def test_faq_20_float8_weights_are_refused_by_name():
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight = nn.Parameter(
        model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(
        ValueError,
        match="has a torch.float8_e4m3fn weight; expected one of torch.float32, torch.bfloat16",
    ):
        get_slice_model(model, slices_alone(r=4))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(9, 8), "an embedding looks rows up"),
        (nn.EmbeddingBag(9, 8), "an embedding looks rows up"),
        (nn.Conv2d(3, 8, 2), "convolutions do not become slices"),
        (nn.ConvTranspose1d(3, 8, 2), "convolutions do not become slices"),
        (nn.LSTM(8, 8), "recurrent layers run in one fused kernel"),
        (nn.GRUCell(8, 8), "recurrent layers run in one fused kernel"),
        (
            nn.Bilinear(8, 8, 8),
            "only nn.Linear, nn.MultiheadAttention and Hugging Face's Conv1D become slices",
        ),
        (
            nn.LayerNorm(8),
            "only nn.Linear, nn.MultiheadAttention and Hugging Face's Conv1D become slices",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_linear_layer_is_named_with_what_to_do(module, message):
    model = nn.Sequential(module, nn.Linear(8, 8))
    pattern = (
        rf"^0 is a {type(module).__name__}; {message}.*Leave it frozen, or modules_to_save=\['0'\]"
        r" trains all of it\.$"
    )
    with pytest.raises(ValueError, match=pattern):
        get_slice_model(model, slices_alone(r=4, target_modules=["0", "1"]))
    get_slice_model(model, slices_alone(r=4))  # 'all-linear' passes it by
    assert not any(p.requires_grad for p in module.parameters()) and isinstance(
        model[1], SliceLinear
    )
    model.merge_and_unload()
    get_slice_model(model, slices_alone(r=4, modules_to_save=["0"]))
    assert all(p.requires_grad for p in module.parameters())


def test_a_module_that_holds_linear_layers_is_answered_with_their_names():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    with pytest.raises(
        ValueError, match="0 is a Sequential; .* Linear layers inside: 0, 2"
    ):
        get_slice_model(model, slices_alone(r=4, target_modules=["0"]))


def test_a_subclass_of_linear_comes_back_as_what_it_was():
    class Named(nn.Linear):
        """A subclass with nn.Linear's forward."""

    model = nn.Sequential(Named(8, 8))
    assert type(get_slice_model(model, slices_alone(r=4)).merge_and_unload()[0]) is Named


def test_the_support_matrix_is_the_registry():
    assert committed_table() == table(), "run python tests/families.py"
    trained = next(
        mark
        for mark in test_family.pytestmark
        if mark.name == "parametrize" and mark.args[0] == "family"
    )
    assert trained.args[1] is FAMILIES and len({f.name for f in FAMILIES}) == len(FAMILIES)


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def pruned() -> nn.Module:
    layer = nn.Linear(8, 8)
    torch.nn.utils.prune.identity(layer, "weight")
    return layer


def replaced() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


REFUSED = {
    "an embedding": (lambda: nn.Embedding(9, 8), {}),
    "a convolution": (lambda: nn.Conv2d(3, 8, 2), {}),
    "an LSTM": (lambda: nn.LSTM(8, 8), {}),
    "a norm": (lambda: nn.LayerNorm(8), {}),
    "a block of layers": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        {},
    ),
    "a quantized layer of another kind": (lambda: quantized_by("int8 parameter")[0], {}),
    "a weight on the meta device": (lambda: nn.Linear(8, 8, device="meta"), {}),
    "a pruned or parameterized weight": (pruned, {}),
    "a layer whose forward was replaced": (replaced, {}),
    "a linear layer with a forward of its own": (lambda: Odd(8, 8), {}),
    "row slices of experts": (
        lambda: (
            build(next(f for f in FAMILIES if f.parameters)).model.layers[0].mlp.experts
        ),
        {"target_modules": [], "target_parameters": ["gate_up_proj"], "slice_type": "row"},
    ),
    "a name that does not exist": (lambda: nn.Linear(8, 8), {"target_modules": ["00"]}),
}


def test_the_messages_of_the_support_matrix_are_the_ones_given():
    rows = [
        line.strip("|").split("|")
        for line in SUPPORT.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    said = {
        row[0].strip(): row[1].strip().strip("`")
        for row in rows
        if len(row) == 2 and "`" in row[1]
    }
    assert said.keys() == REFUSED.keys()
    for what, (make, options) in REFUSED.items():
        model = nn.Sequential(make(), nn.Linear(8, 8))
        with pytest.raises(ValueError) as error:
            get_slice_model(
                model, slices_alone(r=4, **{"target_modules": ["0"], **options})
            )
        assert said[what] in str(error.value)
        assert not hasattr(model, "slice_config") and not any(
            isinstance(m, SliceLayer) for m in model.modules()
        )
