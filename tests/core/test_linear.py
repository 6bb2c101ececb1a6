"""SliceLinear as an nn.Linear: contract, gradients, copies, casts, checkpoints, odd inputs."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from slicefine import SliceAdamW, SliceLinear, get_slice_model
from slicefine.slices import read_slice
from tests.configs import slices_alone

TYPES = ["column", "row", "block", "row_column"]


def make(
    slice_type="column", dtype=torch.float32, r=3, interval=None, **kwargs
) -> SliceLinear:
    torch.manual_seed(0)
    return SliceLinear(
        11,
        8,
        dtype=dtype,
        config=slices_alone(r=r, slice_type=slice_type, switch_interval=interval, **kwargs),
    )


def dense_grad(layer: SliceLinear, x: torch.Tensor, weigh: torch.Tensor) -> torch.Tensor:
    weight = layer.weight.detach().clone().requires_grad_(True)
    (F.linear(x.detach(), weight, layer.bias) * weigh).sum().backward()
    assert weight.grad is not None
    return read_slice(weight.grad, layer.rows, layer.cols)


def test_it_is_an_nn_linear_with_the_same_state_dict():
    plain = nn.Linear(11, 8)
    layer = SliceLinear.from_linear(plain, slices_alone(r=3))
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    x = torch.randn(4, 11)
    assert torch.equal(layer(x), plain(x))
    other = nn.Linear(11, 8)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(
        layer.active(layer.slice_weight), read_slice(other.weight, layer.rows, layer.cols)
    )
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["slice_weight"]


@pytest.mark.parametrize(
    "shape", [(11,), (4, 11), (2, 3, 11), (2, 1, 3, 11), (0, 11), (2, 0, 11)]
)
@pytest.mark.parametrize("needs_input_grad", [True, False])
@pytest.mark.parametrize("slice_type", TYPES)
def test_gradients_for_any_batch_shape(slice_type, needs_input_grad, shape):
    layer = make(slice_type)
    x = torch.randn(shape, requires_grad=needs_input_grad)
    weigh = torch.randn(*shape[:-1], 8)
    (layer(x) * weigh).sum().backward()
    torch.testing.assert_close(
        layer.active(layer.slice_weight.grad), dense_grad(layer, x, weigh)
    )
    if needs_input_grad:
        torch.testing.assert_close(x.grad, weigh @ layer.weight)
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("slice_type", TYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.expand(5, 6, 11) if x.shape[0] == 1 else x[:1].expand(5, 6, 11),
    ],
)
def test_non_contiguous_inputs_and_gradients(slice_type, view):
    layer = make(slice_type)
    x = view(torch.randn(4, 6, 11))
    layer(x).sum().backward()  # the gradient of a sum is an expanded scalar
    torch.testing.assert_close(
        layer.active(layer.slice_weight.grad),
        dense_grad(layer, x, torch.ones(*x.shape[:-1], 8)),
    )


@pytest.mark.parametrize("slice_type", ["column", "row", "block"])
def test_gradcheck(slice_type):
    layer = make(slice_type, torch.float64)
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    # towards slice_weight itself: a finite difference of the output after write-through
    direction, loss = (
        torch.randn_like(layer.slice_weight),
        lambda: layer(x.detach()).square().sum(),
    )
    loss().backward()
    analytic = (layer.slice_weight.grad * direction).sum().item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.slice_weight.add_(sign * 1e-6 * direction)
        values.append(loss().item())
        with torch.no_grad():
            layer.slice_weight.sub_(sign * 1e-6 * direction)
    assert abs((values[0] - values[1]) / 2e-6 - analytic) < 1e-6 * max(1, abs(analytic))


def test_a_second_derivative_is_refused():
    layer, x = make(), torch.randn(3, 11, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a gradient of the gradient of a slice"):
        grad.sum().backward()


@pytest.mark.parametrize("slice_type", TYPES)
def test_used_twice_in_one_forward(slice_type):
    layer = SliceLinear(
        9, 9, config=slices_alone(r=3, slice_type=slice_type, switch_interval=None)
    )
    x = torch.randn(5, 9)
    layer(layer(x)).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_(True)
    F.linear(F.linear(x, weight, layer.bias), weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(
        layer.active(layer.slice_weight.grad),
        read_slice(weight.grad, layer.rows, layer.cols),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("in_bwd", [True, False])
def test_activation_checkpointing(use_reentrant, in_bwd):
    def run(checkpointed):
        torch.manual_seed(0)
        model = get_slice_model(
            nn.Sequential(
                nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)
            ),
            slices_alone(r=2, switch_interval=2),
        )
        optimizer = SliceAdamW(model.parameters(), lr=1e-2, optimizer_in_bwd=in_bwd)
        x = torch.randn(7, 6, requires_grad=True)
        for _ in range(6):
            optimizer.zero_grad()
            y = x
            for part in (model[:2], model[2:]):
                y = (
                    checkpoint(part, y, use_reentrant=use_reentrant)
                    if checkpointed
                    else part(y)
                )
            y.square().mean().backward()
            optimizer.step()
        return {n: p.clone() for n, p in model.state_dict().items()}

    plain, again = run(False), run(True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_reentrant_checkpointing_of_a_hugging_face_model_with_frozen_embeddings():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    get_slice_model(model, slices_alone(r=4))
    name = (
        "activation_checkpointing_enable"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient_checkpointing_enable"
    )
    getattr(model, name)({"use_reentrant": True})
    model(input_ids=torch.arange(8).view(2, 4)).last_hidden_state.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if "slice_weight" in n
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slice_type", TYPES)
def test_autocast(slice_type, dtype):
    layer = make(slice_type)
    x = torch.randn(40, 11, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.slice_weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    torch.testing.assert_close(
        layer.active(layer.slice_weight.grad),
        dense_grad(layer, x.to(dtype).float(), torch.ones(40, 8)),
        rtol=1e-3,
        atol=1e-3,
    )


def saved_bytes(run) -> int:
    """Bytes that autograd keeps, each storage once, weights aside."""
    seen: dict[int, int] = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and t.dtype.is_floating_point:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def test_what_is_kept_for_backward():
    x = torch.randn(64, 11)
    kept = {t: saved_bytes(lambda t=t: make(t)(x)) for t in ("column", "row", "block")}
    assert kept == {"column": 64 * 3 * 4, "row": 64 * 11 * 4, "block": 64 * 3 * 4}
    frozen = make()
    frozen.slice_weight.requires_grad_(False)
    assert saved_bytes(lambda: frozen(x)) == 0
    layer = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            saved_bytes(lambda: layer(x)) == 64 * 3 * 2
        )  # no cast copy of the weight either


@pytest.mark.parametrize("slice_type", TYPES)
def test_copies_and_pickles_stay_consistent(slice_type):
    layer = make(slice_type, interval=2)
    optimizer = SliceAdamW(layer.parameters(), lr=1e-2)
    x = torch.randn(5, 11)
    for _ in range(3):
        layer(x).sum().backward()
        optimizer.step()
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    for twin in twins:
        assert torch.equal(twin(x), layer(x)) and torch.equal(
            twin.slice_weight, layer.slice_weight
        )
        before = layer.weight.clone()
        own = SliceAdamW(twin.parameters(), lr=1e-2)
        twin(x).sum().backward()
        own.step()
        assert torch.equal(layer.weight, before) and not torch.equal(twin.weight, before)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_keep_a_float32_master(cast):
    layer = make()
    parameter = layer.slice_weight
    getattr(layer, cast)()
    assert layer.slice_weight is parameter
    assert parameter.dtype == (torch.float64 if cast == "double" else torch.float32)
    assert layer.weight.dtype == getattr(
        torch, {"half": "float16"}.get(cast, cast if cast != "double" else "float64")
    )
    x = torch.randn(3, 11).to(layer.weight.dtype)
    layer(x).sum().backward()
    assert torch.equal(
        layer.active(parameter).to(layer.weight.dtype),
        read_slice(layer.weight, layer.rows, layer.cols),
    )


def test_the_master_keeps_bits_that_bfloat16_cannot():
    layer = make(dtype=torch.bfloat16)
    with torch.no_grad():
        layer.slice_weight.add_(1e-5)
    layer(torch.randn(2, 11, dtype=torch.bfloat16))
    precise = layer.slice_weight.clone()
    layer.load_state_dict(layer.state_dict())
    layer.to("cpu")
    copy.deepcopy(layer)
    assert torch.equal(layer.slice_weight, precise)
    layer.float()  # from here on the weight is more precise than what it holds, and it is the truth
    assert torch.equal(
        layer.active(layer.slice_weight), read_slice(layer.weight, layer.rows, layer.cols)
    )


def test_a_write_to_either_side_reaches_the_other():
    layer, x = make(), torch.randn(2, 11)
    with torch.no_grad():
        layer.slice_weight.fill_(0.5)
    layer(x)
    assert bool((layer.weight[:, layer.slice_cols] == 0.5).all())
    with torch.no_grad():
        layer.weight.fill_(0.25)
    layer(x)
    assert bool((layer.slice_weight == 0.25).all())
    with torch.no_grad():
        layer.slice_weight.fill_(0.75)
    assert bool(
        (layer.state_dict()["weight"][:, layer.slice_cols] == 0.75).all()
    )  # also when saved before a forward


def test_hooks_are_kept():
    plain, calls = nn.Linear(11, 8), []
    plain.register_forward_hook(lambda *_: calls.append("forward"))
    plain.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer = SliceLinear.from_linear(plain, slices_alone(r=3))
    layer(torch.randn(2, 11))
    assert calls == ["pre", "forward"]


def test_an_unused_layer_is_left_alone():
    layer, other = make(interval=1), make(interval=1)
    optimizer = SliceAdamW(
        [*layer.parameters(), *other.parameters()], lr=1e-2, weight_decay=0.5
    )
    before = other.weight.clone()
    layer(torch.randn(2, 11)).sum().backward()
    optimizer.step()
    assert (
        torch.equal(other.weight, before)
        and other.schedule.coverage() == 0 < layer.schedule.coverage()
    )


def test_moves_do_not_recompile():
    torch._dynamo.reset()
    model = get_slice_model(
        nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 40)),
        slices_alone(r=2, switch_interval=1),
    )
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    twin = copy.deepcopy(model)
    twin_optimizer = SliceAdamW(twin.parameters(), lr=1e-2)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(6, 40)
    for _ in range(11):  # 10 moves
        losses = []
        for run, o in ((compiled, optimizer), (twin, twin_optimizer)):
            o.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            o.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert counter.frame_count == 1


def test_optimizer_in_bwd_refuses_compilation():
    torch._dynamo.reset()
    layer = make()
    SliceAdamW(layer.parameters(), optimizer_in_bwd=True).zero_grad()
    optimizer = SliceAdamW(layer.parameters(), optimizer_in_bwd=True)
    with pytest.raises(
        Exception, match="optimizer_in_bwd=True does not work under torch.compile"
    ):
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(2, 11))
    assert optimizer is not None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantized_weights_are_refused(dtype):
    plain = nn.Linear(11, 8)
    plain.weight = nn.Parameter(torch.zeros(8, 11, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match="quantized weight"):
        SliceLinear.from_linear(plain, slices_alone(r=3), "layer.0")


def test_meta_weights_are_refused():
    with pytest.raises(ValueError, match="meta device"):
        SliceLinear(11, 8, device="meta", config=slices_alone(r=3))


def test_a_slice_wider_than_the_layer_is_refused():
    with pytest.raises(
        ValueError,
        match=r"width 12 does not fit a weight of shape \(8, 11\): it has 11 input features",
    ):
        SliceLinear(11, 8, config=slices_alone(r=12))
    with pytest.raises(ValueError, match=r"it has 8 output features"):
        SliceLinear(11, 8, config=slices_alone(r=9, slice_type="row"))


def test_a_wrong_input_dtype_fails_as_in_nn_linear():
    with pytest.raises(RuntimeError, match="dtype"):
        make()(torch.randn(2, 11).double())


def test_layers_die_with_their_model():
    from slicefine.registry import layers_of

    layer = make()
    parameter = layer.slice_weight
    assert layers_of(parameter) == [layer]
    del layer
    gc.collect()
    assert layers_of(parameter) == []


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
@pytest.mark.parametrize("side", ["slice_weight", "weight"])
def test_a_copy_of_an_unsynchronized_layer_is_synchronized(side, twin_of):
    layer, x = make(), torch.randn(2, 11)
    with torch.no_grad():
        getattr(layer, side).fill_(0.25)
    twin = twin_of(layer)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(
        twin.active(twin.slice_weight), read_slice(twin.weight, twin.rows, twin.cols)
    )


def test_averaged_parameters_leave_the_weight_in_charge():
    """AveragedModel averages masters of different positions; the averaged weight must not be
    overwritten by them.
    """
    layer = make(interval=1)
    average = torch.optim.swa_utils.AveragedModel(layer)
    optimizer = SliceAdamW(layer.parameters(), lr=1e-1)
    snapshots = []
    for _ in range(3):
        layer(torch.randn(4, 11)).sum().backward()
        optimizer.step()
        average.update_parameters(layer)
        snapshots.append(layer.weight.detach().clone())
    average(torch.randn(2, 11))
    torch.testing.assert_close(average.module.weight, torch.stack(snapshots).mean(0))


def test_a_failed_move_to_a_device_leaves_the_layer_whole(monkeypatch):
    layer = make()

    def fail(t):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(fail)
    layer(torch.randn(2, 11)).sum().backward()
    assert layer.slice_weight.grad is not None


def test_a_replaced_weight_is_noticed():
    """Also when the new parameter has been written to as often as the old one."""
    layer = SliceLinear(8, 6, config=slices_alone(r=2, switch_interval=None))
    layer.weight = nn.Parameter(torch.full((6, 8), 5.0), requires_grad=False)
    assert torch.equal(layer(torch.ones(1, 8)), torch.full((1, 6), 40.0) + layer.bias)
    assert torch.equal(layer.slice_weight, torch.full((6, 2), 5.0))


def test_a_replica_of_data_parallel_runs_and_trains_the_original():
    layer = SliceLinear(8, 6, config=slices_alone(r=2, switch_interval=None))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter.clone())
    for name, buffer in layer._buffers.items():
        setattr(replica, name, buffer.clone())
    replica(torch.randn(3, 8)).sum().backward()
    assert layer.slice_weight.grad is not None and bool(layer.slice_weight.grad.any())


@pytest.mark.parametrize("shape", [(4, 11), (2, 5, 11), (2, 3, 5, 11)])
@pytest.mark.parametrize("slice_type", TYPES)
def test_the_output_may_be_changed_in_place(slice_type, shape):
    layer = make(slice_type)
    x = torch.randn(shape)
    y = layer(x)
    y += 1
    y[..., 0] = 0
    y.view(-1, 8).mul_(2)
    F.relu(y, inplace=True).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_(True)
    mask = torch.ones(8).index_fill(0, torch.tensor([0]), 0.0)
    plain = 2 * mask * (F.linear(x, weight, layer.bias) + 1)
    F.relu(plain).square().sum().backward()
    expected = read_slice(weight.grad, layer.rows, layer.cols)
    torch.testing.assert_close(layer.active(layer.slice_weight.grad), expected)


def test_an_input_of_another_width_fails_as_in_nn_linear():
    make()(torch.randn(2, 11)).sum().backward()
    layer = SliceLinear.from_linear(
        nn.Linear(400_000, 1), slices_alone(r=16, start_position=24_999)
    )
    for x in (torch.zeros(4, 8), torch.zeros(4, 8, requires_grad=True)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(x)


def test_a_forward_without_gradients_copies_no_columns(monkeypatch):
    from slicefine import ops

    calls, real, layer = [], ops.take_columns, make()
    monkeypatch.setattr(ops, "take_columns", lambda *a: calls.append(1) or real(*a))
    with torch.no_grad():
        layer(torch.randn(4, 11))
    with torch.inference_mode():
        layer(torch.randn(4, 11))
    assert not calls
    layer(torch.randn(4, 11))
    assert calls


def test_to_meta_and_back_keeps_the_positions():
    model = get_slice_model(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3)), slices_alone(r=8)
    )
    values = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    assert model[0].slice_cols.tolist() == list(range(8))
    model.load_state_dict(values)
    assert torch.equal(model[0].slice_weight, values["0.weight"][:, :8])
    model.to_empty(device="cpu")
    assert model[0].slice_cols.tolist() == list(range(8))


def test_type_leaves_the_positions_integers():
    layer = make()
    layer.type(torch.float64)
    assert (
        layer.slice_cols.dtype == torch.int64 and layer.slice_weight.dtype == torch.float64
    )
    layer(torch.randn(2, 11, dtype=torch.float64)).sum().backward()


def test_shared_memory_has_the_master_too():
    layer = make()
    layer.share_memory()
    assert layer.weight.is_shared() and layer.slice_weight.is_shared()


def test_an_average_of_alternating_slices():
    from torch.optim.swa_utils import AveragedModel

    model = get_slice_model(
        nn.Sequential(nn.Linear(32, 32)),
        slices_alone(r=4, switch_interval=1, slice_type="row_column"),
    )
    average, optimizer = AveragedModel(model), SliceAdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
        average.update_parameters(model)


def test_weights_of_another_model_loaded_in_training_are_noticed():
    model = get_slice_model(
        nn.Sequential(nn.Linear(32, 32)), slices_alone(r=4, switch_interval=2)
    )
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.bfloat16() for k, v in own.items()}, assign=True)
    with model.disable_adapter():
        pass
    model.load_state_dict(nn.Sequential(nn.Linear(32, 32)).state_dict())
    with pytest.raises(RuntimeError, match="weights of another model were loaded"):
        model.revert()


def test_every_attribute_of_a_slice_is_declared():
    plain = nn.Linear(11, 8)
    layer = SliceLinear.from_linear(plain, slices_alone(r=3, switch_mode="gradient"))
    added = {*layer.__dict__, *layer._parameters, *layer._buffers} - {*plain.__dict__}
    assert added - {"weight", "bias"} <= layer.own_attributes()
    assert set(layer.to_plain().__dict__) == set(plain.__dict__)


def test_weights_made_under_inference_mode_are_refused():
    with torch.inference_mode():
        plain = nn.Linear(11, 8)
    with pytest.raises(
        ValueError, match=r"layer 'name' was made under torch.inference_mode"
    ):
        SliceLinear.from_linear(plain, slices_alone(r=3), "name")
