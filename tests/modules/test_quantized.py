"""Slices beside packed weights: the base stays bit for bit, and what trains is what is added."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slicefine import (
    DeltaError,
    SliceAdamW,
    SliceConfig,
    get_slice_model,
    list_targets,
)
from slicefine.deltas.lora import to_lora
from slicefine.layer import SliceLayer
from slicefine.model import SliceModel
from slicefine.modules.quantized import PoolSlice, QuantizedLinear, packing_of
from tests.configs import slices_alone
from tests.modules.packed import KINDS, Body, available, pack, pack_linear, train

CONFIG = {"r": 4, "pool": 16, "switch_interval": 3, "exclude_modules": ["head"]}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    if reason := available(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def nf4() -> str:
    if reason := available("nf4"):
        pytest.skip(reason)
    return "nf4"


def config(**changes: Any) -> SliceConfig:
    return slices_alone(**{**CONFIG, **changes})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {k: _plain(v).clone() for k, v in state.items() if isinstance(v, Tensor)}


def _plain(value: Tensor) -> Tensor:
    return value.dequantize() if hasattr(value, "qdata") else value


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The base


@pytest.mark.parametrize("contiguous", [True, False])
def test_faq_20_slices_train_beside_a_quantized_base(kind, contiguous):
    model = pack(Body(), kind)
    x = torch.randn(5, 64).bfloat16()
    before, output, classes = state_of(model), model(x), [type(m) for m in model.modules()]
    get_slice_model(model, config(contiguous=contiguous))
    # D starts at zero
    assert torch.equal(model(x), output)
    train(model)
    trained = model(x)
    assert not torch.equal(trained, output)
    assert same({k: state_of(model)[k] for k in before}, before)
    with model.disable_adapter():
        assert torch.equal(model(x), output)
    assert torch.equal(model(x), trained)
    model.unload()
    assert torch.equal(model(x), output) and same(state_of(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert not any(k in vars(m) for m in model.modules() for k in ("_packing", "_repacks"))


def test_gradients_are_those_of_the_unpacked_weight(kind):
    torch.manual_seed(1)
    packed: Any = pack_linear(nn.Linear(64, 48, dtype=torch.bfloat16), kind)
    packing = packing_of(packed)
    assert packing is not None and packing.dequantize is not None
    weight = packing.dequantize(packed, torch.float64)
    model = nn.Sequential(packed, nn.Linear(48, 4, dtype=torch.bfloat16))
    get_slice_model(
        model, config(bias="slice_only", contiguous=False, exclude_modules=["1"])
    )
    packed = model[0]
    overlay = packed.overlay
    with torch.no_grad():
        # D away from zero, its master with it
        overlay.weight.normal_()
        overlay.sync()
    x = torch.randn(2, 7, 64).bfloat16().requires_grad_()
    grad = torch.randn(2, 7, 48).bfloat16()
    output = packed(x)
    output.backward(grad)
    exact = x.detach().double().requires_grad_()
    D = torch.zeros_like(weight)
    D[:, overlay.slice_pool] = overlay.weight.detach().double()
    D.requires_grad_()
    wanted = exact @ (weight + D).t() + packed.bias.detach().double()
    wanted.backward(grad.double())
    columns = overlay.slice_pool[overlay.slice_cols]
    for found, truth in (
        (output, wanted),
        (x.grad, exact.grad),
        (overlay.slice_weight.grad, D.grad[:, columns]),
        (packed.bias.grad, grad.double().sum((0, 1))),
    ):
        error = (found.double() - truth).abs().max() / truth.abs().max()
        assert error < 0.02, error


def test_backward_keeps_the_columns_of_the_slice_and_nothing_else(kind):
    packed: Any = pack_linear(nn.Linear(64, 96, dtype=torch.bfloat16), kind)
    model = nn.Sequential(packed, nn.Linear(96, 4, dtype=torch.bfloat16))
    get_slice_model(model, config(exclude_modules=["1"]))
    x = torch.randn(50, 64).bfloat16().requires_grad_()
    held = {id(t) for t in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in held and tensor.untyped_storage().nbytes() > 8 * 16:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model[0](x)
    weight = model[0].overlay.weight.data_ptr()
    own = [tuple(t.shape) for t in kept if t.data_ptr() != weight]
    # 50 tokens by r = 4: neither the input, nor the pool's columns, nor an unpacked weight
    assert own == [(50, 4)]


# The pool


def test_the_slice_moves_inside_the_pool_and_coverage_is_of_the_pool(kind):
    model = pack(Body(), kind)
    get_slice_model(model, config(contiguous=False))
    layer = model.first.overlay
    pool = layer.slice_pool
    assert (
        len(pool) == 16
        and len(pool.unique()) == 16
        and not torch.equal(pool, torch.arange(16))
    )
    seen = set()
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(12):
        seen |= set(pool[layer.slice_cols].tolist())
        assert model.coverage()["first"] == pytest.approx((step + 2) // 3 * 0.25)
        model(torch.randn(6, 64).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == set(pool.tolist())
    assert model.coverage() == {"first": 1.0, "second": 1.0}
    assert "50 % of each 16-wide pool beside 64-wide packed weights" in (
        model.planned_coverage(6)
    )


def test_a_pool_that_is_not_sized_is_128_columns_or_r_or_the_layer(nf4):
    model = pack(nn.Sequential(nn.Linear(256, 32), nn.Linear(32, 256)), nf4)
    matches = list_targets(model, slices_alone(r=8))
    assert [(m.quantized, m.pool) for m in matches] == [("nf4", 128), ("nf4", 32)]
    assert [m.pool for m in list_targets(model, slices_alone(r=160))] == [160, 32]
    plain = list_targets(Body(), config(r=8))
    assert {(m.quantized, m.pool) for m in plain} == {(None, None)}


@pytest.mark.parametrize("policy", ["reset", "keep", "remember"])
def test_moments_at_a_move_are_handled_as_in_any_slice(nf4, policy):
    def run(model: Any) -> Any:
        get_slice_model(model, config(state_on_switch=policy, switch_interval=2))
        train(model, 9)
        return model

    packed = run(pack(Body(bias=False, dtype=torch.float32), nf4))
    # the same slices of a plain layer whose weight is zero but for them, beside a frozen base
    base = pack(Body(bias=False, dtype=torch.float32), nf4)
    twin = _Beside(base, packed)
    optimizer = SliceAdamW([m.slice_weight for m in twin.layers], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        x = torch.randn(16, 64, generator=generator)
        (twin(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip((packed.first, packed.second), twin.layers, strict=True):
        assert torch.allclose(mine.overlay.weight, theirs.weight, atol=1e-5)
        assert mine.overlay.weight.any()


class _Beside(nn.Module):
    """The same model written out: base and SliceLinear of the pool's columns, side by side."""

    def __init__(self, base: Any, packed: Any) -> None:
        from slicefine.linear import SliceLinear

        super().__init__()
        self.base, self.pools, layers = base.requires_grad_(False), [], []
        for name in ("first", "second"):
            overlay = getattr(packed, name).overlay
            self.pools.append(overlay.slice_pool)
            linear = nn.Linear(overlay.in_features, overlay.out_features, bias=False)
            nn.init.zeros_(linear.weight)
            layers.append(SliceLinear.from_linear(linear, packed.slice_config, name))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate((self.base.first, self.base.second)):
            weight = packing_of(layer).dequantize(layer, x.dtype)  # type: ignore
            x = x @ weight.t() + self.layers[i](x[..., self.pools[i]])
            x = torch.relu(x) if i == 0 else x
        return self.base.head(x)


# What it takes and what it refuses


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slice_type": "row"}, "only 'column' slices train"),
        ({"slice_type": "block"}, "only 'column' slices train"),
        ({"slice_type": "row_column"}, "only 'column' slices train"),
        ({"switch_mode": "magnitude"}, "start at zero beside a packed weight"),
        ({"pool": 3}, "pool is 3, and its slice is 4 wide"),
    ],
)
def test_what_cannot_train_beside_a_packed_weight_is_refused_by_name(nf4, changes, words):
    model = pack(Body(), nf4)
    with pytest.raises(ValueError, match=words) as error:
        get_slice_model(model, config(**changes))
    assert "first" in str(error.value)
    assert not any(isinstance(m, (SliceLayer, QuantizedLinear)) for m in model.modules())


def test_a_weight_that_was_repacked_for_evaluation_is_refused(nf4):
    model = pack(Body(), nf4)
    model.first.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked its weight for evaluation"):
        get_slice_model(model, config())


def test_evaluation_between_steps_repacks_nothing(nf4):
    model = pack(Body(), nf4)
    # what bitsandbytes finds on CPUs with AVX512-BF16
    model.first.support_avx512bf16_for_cpu = True
    before = model.first.weight.clone()
    get_slice_model(model, config())
    with torch.no_grad():
        model.eval()(torch.randn(3, 64).bfloat16())
    assert torch.equal(model.first.weight, before)
    train(model.train(), 2)
    assert model.unload().first.support_avx512bf16_for_cpu is True


class GPTQLinear(nn.Module):
    """Stands in for a kernel that only multiplies: packed integers under a name of its own."""

    def __init__(self, linear: nn.Linear, trains: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().max() / 7
        self.register_buffer(
            "qweight", (linear.weight.detach() / scale).round().to(torch.int8)
        )
        self.register_buffer("scales", scale)
        self.trains = trains

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.trains else x.detach()
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).t()


def gptq(trains: bool) -> nn.Module:
    model = Body(bias=False, dtype=torch.float32)
    model.first = GPTQLinear(model.first, trains)  # type: ignore[assignment]
    model.second = GPTQLinear(model.second, trains)  # type: ignore[assignment]
    return model


def test_a_kernel_that_only_multiplies_trains_as_far_as_it_gives_gradients():
    model: Any = gptq(trains=True)
    before, x = state_of(model), torch.randn(4, 64)
    output = model(x)
    get_slice_model(model, config())
    assert {m.quantized for m in list_targets(gptq(True), config())} == {"gptq"}
    train(model)
    assert all(layer.overlay.weight.any() for layer in (model.first, model.second))
    with pytest.raises(ValueError, match="library only multiplies"):
        model.merge_and_unload(quantized="dequantize")
    model.unload()
    assert same(state_of(model), before) and torch.equal(model(x), output)


def test_a_kernel_without_a_gradient_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"first: it is quantized \(gptq\), and its kernel"
    ):
        get_slice_model(gptq(trains=False), config())


def test_what_reads_weights_refuses_packed_ones_by_name(nf4):
    from slicefine.targets import find_targets

    with pytest.raises(
        ValueError, match=r"first, second are quantized \(nf4\), and this reads"
    ):
        find_targets(pack(Body(), nf4), config())


def test_a_pool_for_weights_that_are_not_packed_warns():
    with pytest.warns(UserWarning, match="pool is 16, and no target is quantized"):
        get_slice_model(Body(), config())


def test_float_layers_beside_packed_ones_are_slices_of_their_own(nf4):
    model = pack(Body(), nf4, skip=("head", "second"))
    get_slice_model(model, config())
    assert isinstance(model.second, SliceLayer) and model.second.in_features == 96
    train(model)
    assert set(model.coverage()) == {"first", "second"}
    with pytest.raises(ValueError, match="first is quantized"):
        model.merge_and_unload()
    merged = model.merge_and_unload(quantized="dequantize")
    assert [type(m) for m in merged.children()] == [nn.Linear] * 3


# Merging


def test_merging_into_a_packed_weight_asks_where_to(kind):
    model = pack(Body(), kind)
    get_slice_model(model, config())
    train(model)
    x = torch.randn(5, 64).bfloat16()
    output = model(x)
    with pytest.raises(ValueError, match="quantized='dequantize'.*quantized='lora'"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="quantized is 'bf16'; expected None"):
        model.merge_and_unload(quantized="bf16")
    assert torch.equal(model(x), output)
    base = {
        name: packing_of(m).dequantize(m, torch.float32)  # type: ignore
        for name, m in (("first", model.first), ("second", model.second))
    }
    for name, weight in base.items():
        overlay = model.get_submodule(name).overlay
        weight[:, overlay.slice_pool] += overlay.weight.detach().float()
    merged = model.merge_and_unload(quantized="dequantize")
    assert merged is model and not isinstance(model, SliceModel)
    for name, weight in base.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, weight.bfloat16())
    assert torch.allclose(model(x).float(), output.float(), atol=0.05)


def test_merging_says_when_nothing_is_packed():
    model = Body()
    get_slice_model(model, config(pool=None))
    with pytest.raises(ValueError, match="no layer of the model is quantized"):
        model.merge_and_unload(quantized="dequantize")  # type: ignore[attr-defined]


def test_merging_slices_that_have_not_trained_gives_the_base(kind):
    model = pack(Body(), kind)
    before = state_of(model)
    get_slice_model(model, config())
    assert same(state_of(model.merge_and_unload()), before)


# Deltas


def test_a_delta_goes_onto_the_same_packed_base_and_no_other(kind, tmp_path):
    model = pack(Body(), kind)
    get_slice_model(model, config(contiguous=False))
    train(model)
    x = torch.randn(5, 64).bfloat16()
    output = model(x)
    model.save_pretrained(tmp_path)
    other = pack(Body(), kind)
    base = other(x)
    SliceModel.from_pretrained(other, tmp_path)
    assert torch.equal(other(x), output)
    with other.disable_adapter():
        assert torch.equal(other(x), base)
    other.unload()
    assert torch.equal(other(x), base)
    assert not any(isinstance(m, QuantizedLinear) for m in other.modules())
    with pytest.raises(DeltaError, match=r"first.weight is not quantized in the model"):
        SliceModel.from_pretrained(Body(), tmp_path)
    for verify in (True, False):
        changed = Body()
        with torch.no_grad():
            changed.first.weight.mul_(1.5)
        with pytest.raises(DeltaError, match="made for another base"):
            SliceModel.from_pretrained(pack(changed, kind), tmp_path, verify=verify)


def test_a_delta_of_float_weights_does_not_go_onto_packed_ones(nf4, tmp_path):
    model: Any = Body()
    get_slice_model(model, config(pool=None))
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        DeltaError, match=r"quantized \(nf4\) in the model; the delta was made"
    ):
        SliceModel.from_pretrained(pack(Body(), nf4), tmp_path)


def test_training_goes_on_from_a_delta(kind, tmp_path):
    model = pack(Body(), kind)
    get_slice_model(model, config())
    train(model)
    x = torch.randn(5, 64).bfloat16()
    output = model(x)
    model.save_pretrained(tmp_path)
    again = pack(Body(), kind)
    base = again(x)
    SliceModel.from_pretrained(again, tmp_path, is_trainable=True)
    assert torch.equal(again(x), output)
    train(again, 3)
    assert not torch.equal(again(x), output)
    assert torch.equal(again.unload()(x), base)


def test_two_deltas_of_one_packed_base(nf4, tmp_path):
    x = torch.randn(5, 64).bfloat16()
    outputs = {}
    for name, seed in (("a", 1), ("b", 2)):
        model = pack(Body(), nf4)
        get_slice_model(model, config(contiguous=False, seed=seed))
        train(model, seed=seed)
        outputs[name] = model(x)
        model.save_pretrained(tmp_path / name)
    model = pack(Body(), nf4)
    base = model(x)
    SliceModel.from_pretrained(model, tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    for name in ("b", "a", "b"):
        model.set_adapter(name)
        assert torch.equal(model(x), outputs[name])
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both")
    model.set_adapter("both")
    assert not torch.equal(model(x), outputs["b"])
    model.set_adapter([])
    assert torch.equal(model(x), base)
    # slices that train have a pool of their own, which cannot take other columns in
    training = pack(Body(), nf4)
    get_slice_model(training, config(contiguous=False, seed=1))
    with pytest.raises(
        DeltaError, match="columns of first.weight that this model's slices"
    ):
        training.load_adapter(tmp_path / "b", "b")


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_lora_on_the_same_packed_base_is_exact(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = pack(Body(dtype=torch.float32), kind)
    get_slice_model(model, config(contiguous=False))
    train(model)
    x = torch.randn(5, 64)
    output = model(x)
    adapter = to_lora(model.delta())
    for name in ("first", "second"):
        A, B = (
            adapter.tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB"
        )
        overlay = model.get_submodule(name).overlay
        wanted = torch.zeros(overlay.out_features, overlay.full_features)
        wanted[:, overlay.slice_pool] = overlay.weight.detach()
        assert torch.equal(B @ A, wanted)
    adapter.save(tmp_path)
    lora = peft.PeftModel.from_pretrained(pack(Body(dtype=torch.float32), kind), tmp_path)
    # PEFT gives it in eval mode, where bitsandbytes multiplies otherwise
    assert torch.allclose(lora.train()(x), output, rtol=1e-4, atol=1e-5)
    # and in one call, on the base that was trained on
    merged: Any = model.merge_and_unload(quantized="lora")
    assert isinstance(merged, peft.PeftModel)
    assert torch.equal(merged(x), lora(x))


def test_an_engine_is_not_sent_what_no_tensor_of_its_checkpoint_holds(nf4):
    model = pack(Body(), nf4)
    get_slice_model(model, config())
    train(model, 2)
    with pytest.raises(DeltaError, match="first.weight is quantized, and what has trained"):
        model.changed_since(0)


# Habits


def test_state_dict_holds_what_was_trained_and_resumes(kind):
    model = pack(Body(), kind)
    get_slice_model(model, config())
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step(model: Any, optimizer: Any, seed: int) -> None:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for i in range(5):
        step(model, optimizer, i)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert "first.overlay.weight" in saved[0]
    assert not any("slice_" in key for key in saved[0])
    again = pack(Body(), kind)
    get_slice_model(again, config())
    second = SliceAdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    again.load_state_dict(saved[0], strict=False)
    second.load_state_dict(saved[1])
    for i in range(5, 9):
        step(model, optimizer, i)
        step(again, second, i)
    for name in ("first", "second"):
        ours, theirs = (m.get_submodule(name).overlay.weight for m in (model, again))
        assert torch.equal(ours, theirs)


def test_copies_are_models_of_their_own(kind):
    model = pack(Body(), kind)
    get_slice_model(model, config())
    train(model, 4)
    x = torch.randn(5, 64).bfloat16()
    output = model(x)
    twin = copy.deepcopy(model)
    train(twin, 4)
    assert torch.equal(model(x), output) and not torch.equal(twin(x), output)
    if not kind.startswith("torchao"):
        buffer = io.BytesIO(pickle.dumps(model))
        assert torch.equal(pickle.load(buffer)(x), output)


def test_the_optimizer_may_work_during_backward(kind):
    results = []
    for in_backward in (False, True):
        model = pack(Body(), kind)
        get_slice_model(model, config())
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = SliceAdamW(parameters, lr=1e-2, optimizer_in_bwd=in_backward)
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            x = torch.randn(8, 64, generator=generator).bfloat16()
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.first.overlay.weight.detach().clone())
    assert torch.equal(*results) and results[0].any()


def test_scores_by_gradient_choose_inside_the_pool(nf4):
    model = pack(Body(), nf4)
    get_slice_model(model, config(switch_mode="gradient", switch_interval=2))
    train(model, 9)
    assert model.coverage() == {"first": 1.0, "second": 1.0}


def test_autocast_trains(kind):
    model = pack(Body(), kind)
    get_slice_model(model, config())
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 64).bfloat16()).float().square().mean().backward()
    optimizer.step()
    assert model.first.overlay.weight.any()


def test_parameters_are_counted_as_they_unpack(nf4):
    plain, model = Body(), pack(Body(), nf4)
    everything = sum(p.numel() for p in plain.parameters())
    get_slice_model(model, config())
    overlays = sum(m.weight.numel() for m in model.modules() if isinstance(m, PoolSlice))
    assert model.get_nb_trainable_parameters() == (
        4 * (96 + 64),
        everything + overlays,
    )
