"""nn.MultiheadAttention with sliced projections, against PyTorch's own module."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from slicefine import (
    SliceAdamW,
    SliceLayer,
    SliceLinear,
    SliceModel,
    get_slice_model,
    list_targets,
    track_memory,
)
from tests.configs import slices_alone

E, HEADS, L, S, N = 12, 3, 5, 7, 2


class Net(nn.Module):
    """Attention over what a test hands it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, HEADS, dtype=torch.float64, **options)
        with torch.no_grad():
            for parameter in self.parameters():  # biases too
                parameter.normal_(std=0.3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)


def inputs(
    kind: str, batch_first: bool = False, kdim: int = E, vdim: int = E
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    make = lambda length, width: torch.randn(
        *((N, length) if batch_first else (length, N)), width, dtype=torch.float64
    )
    if kind == "self":
        x = make(L, E)
        return x, x, x
    if kind == "cross":
        q, m = make(L, E), make(S, E)
        return q, m, m
    if kind == "three":
        return make(L, E), make(S, kdim), make(S, vdim)
    q = torch.randn(L, E, dtype=torch.float64)
    return q, q, q  # unbatched


def masks(kind: str, length: int) -> dict[str, Any]:
    torch.manual_seed(2)
    padding = torch.zeros(N, length, dtype=torch.bool)
    padding[1, -2:] = True
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "boolean": {"attn_mask": torch.rand(L, length) > 0.8},
        "float, per head, with padding": {
            "attn_mask": torch.randn(N * HEADS, L, length, dtype=torch.float64),
            "key_padding_mask": padding.double() * -3,
        },
        "causal hint": {
            "attn_mask": torch.full((L, length), float("-inf"), dtype=torch.float64).triu(
                1
            ),
            "is_causal": True,
        },
    }[kind]


def same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "mask", ["none", "padding", "boolean", "float, per head, with padding", "causal hint"]
)
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_the_outputs_are_those_of_pytorch(kind, mask, options):
    for batch_first in (False, True):
        plain = Net(batch_first=batch_first, **options)
        model = get_slice_model(copy.deepcopy(plain), slices_alone(r=4))
        q, k, v = inputs(kind, batch_first)
        arguments = masks(mask, L if kind == "self" else S)
        for weights in (
            {"need_weights": False},
            {"need_weights": True},
            {"average_attn_weights": False},
        ):
            for module in (plain, model):
                module.train()
            same(
                model(q, k, v, **arguments, **weights),
                plain(q, k, v, **arguments, **weights),
            )
            with torch.no_grad():
                same(
                    model.eval()(q, k, v, **arguments, **weights),
                    plain.eval()(q, k, v, **arguments, **weights),
                )


def test_unbatched_input_and_separate_widths():
    plain = Net()
    model = get_slice_model(copy.deepcopy(plain), slices_alone(r=4))
    same(model(*inputs("unbatched")), plain(*inputs("unbatched")))
    plain = Net(kdim=8, vdim=10)
    model = get_slice_model(copy.deepcopy(plain), slices_alone(r=4))
    names = {n for n, m in model.named_modules() if isinstance(m, SliceLayer)}
    assert names == {
        f"attention.{n}"
        for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")
    }
    same(model(*inputs("three", kdim=8, vdim=10)), plain(*inputs("three", kdim=8, vdim=10)))


def test_dropout_draws_as_pytorch_does():
    plain = Net(dropout=0.5)
    model = get_slice_model(copy.deepcopy(plain), slices_alone(r=4))
    for need_weights in (False, True):
        results = []
        for module in (model, plain):
            torch.manual_seed(3)
            results.append(module.train()(*inputs("self"), need_weights=need_weights))
        same(*results)


@pytest.mark.parametrize("mode", ["ascending", "gradient"])
@pytest.mark.parametrize("slice_type", ["column", "row", "block", "row_column"])
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_it_trains_as_the_masked_gradient_does(kind, slice_type, mode):
    plain = Net()
    model = get_slice_model(
        copy.deepcopy(plain),
        slices_alone(r=4, slice_type=slice_type, switch_interval=2, switch_mode=mode),
    )
    layers = {
        "in_proj_weight": model.attention.slice_of("in_proj_weight"),
        "out_proj.weight": model.attention.out_proj,
    }
    before = copy.deepcopy(plain.state_dict())
    weights = {name: plain.attention.get_parameter(name) for name in layers}
    dense = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    q, k, v = inputs(kind)
    visited = {name: torch.zeros(w.shape, dtype=torch.bool) for name, w in weights.items()}
    where = lambda: {n: (a.axis, str(a.rows), str(a.cols)) for n, a in layers.items()}
    for _ in range(7):
        place = where()
        masks_here = {}
        for name, layer in layers.items():
            mask = torch.zeros(weights[name].shape, dtype=torch.bool)
            rows = slice(None) if layer.rows is None else layer.rows
            cols = slice(None) if layer.cols is None else layer.cols
            grid = mask[rows]
            grid[:, cols] = True
            mask[rows] = grid
            masks_here[name] = mask
            visited[name] |= mask
        losses = []
        for module, update in ((plain, dense), (model, optimizer)):
            update.zero_grad()
            output, attention = module(q, k, v)
            loss = (output - 1).square().mean() + attention[..., 0].sum()
            loss.backward()
            losses.append(loss.item())
            if module is plain:
                for name, weight in weights.items():
                    weight.grad.mul_(masks_here[name])
            update.step()
        assert abs(losses[0] - losses[1]) < 1e-11
        for name in layers:
            if where()[name] != place[name]:
                dense.state.pop(weights[name], None)
    after = model.state_dict()
    for name, weight in weights.items():
        key = f"attention.{name}"
        torch.testing.assert_close(after[key], weight.detach(), rtol=0, atol=1e-11)
        assert torch.equal(after[key][~visited[name]], before[key][~visited[name]])
        assert not torch.equal(after[key], before[key])


@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_update_in_backward(kind):
    """The same weights as by the default path, whichever of query, key and value are one tensor."""
    states = []
    for in_bwd in (False, True):
        model = get_slice_model(Net(), slices_alone(r=4, switch_interval=2))
        optimizer = SliceAdamW(model.parameters(), lr=1e-2, optimizer_in_bwd=in_bwd)
        for _ in range(5):
            optimizer.zero_grad()
            model(*inputs(kind))[0].square().sum().backward()
            optimizer.step()
        states.append(model.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-11)


def test_it_is_nn_multihead_attention_before_while_and_after():
    plain = Net()
    keys = list(plain.state_dict())
    model = get_slice_model(copy.deepcopy(plain), slices_alone(r=4, bias="slice_only"))
    assert isinstance(model.attention, nn.MultiheadAttention) and isinstance(
        model.attention.out_proj, SliceLinear
    )
    assert repr(type(model.attention)) == repr(nn.MultiheadAttention)
    assert {n: v.shape for n, v in model.state_dict().items()} == {
        n: v.shape for n, v in plain.state_dict().items()
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "attention.in_proj_weight.slice_weight",
        "attention.in_proj_bias",
        "attention.out_proj.slice_weight",
        "attention.out_proj.bias",
    }
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    model(*inputs("self"))[0].square().sum().backward()
    optimizer.step()
    trained = model(*inputs("self"))
    for twin in (copy.deepcopy(model), _saved(model)):
        same(twin(*inputs("self")), trained)
        twin.attention.slice_of("in_proj_weight").slice_weight.data.add_(
            1.0
        )  # its own, not the original's
    same(model(*inputs("self")), trained)
    fresh = get_slice_model(Net(), slices_alone(r=4))
    assert (
        str(fresh.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    )
    same(fresh(*inputs("self")), trained)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(
        fresh.attention.slice_of("in_proj_weight").slice_weight,
        plain.attention.in_proj_weight[:, :4],
    )
    incomplete = {k: v for k, v in model.state_dict().items() if "in_proj_weight" not in k}
    with pytest.raises(
        RuntimeError, match='Missing key\\(s\\) in state_dict: "attention.in_proj_weight"'
    ):
        fresh.load_state_dict(incomplete)
    merged = model.merge_and_unload()
    assert type(merged.attention) is nn.MultiheadAttention and repr(merged) == repr(Net())
    assert (
        list(merged.state_dict()) == keys
        and merged.attention.__dict__.keys() == Net().attention.__dict__.keys()
    )
    assert all(
        torch.equal(a, b) for a, b in zip(merged(*inputs("self")), trained, strict=True)
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_bit_equal_to_pytorch_with_frozen_weights(kind, batch_first):
    """With batch_first PyTorch's own last bits differ between a weight that asks for a gradient and
    a frozen one, as slices have.
    """
    plain = Net(batch_first=batch_first).requires_grad_(False)
    model = get_slice_model(copy.deepcopy(plain), slices_alone(r=4))
    for need_weights in (False, True):
        ours, theirs = (
            m(*inputs(kind, batch_first), need_weights=need_weights) for m in (model, plain)
        )
        assert torch.equal(ours[0], theirs[0])


def test_one_compilation_for_all_moves():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.linear = (
                nn.MultiheadAttention(E, HEADS, batch_first=True),
                nn.Linear(E, E),
            )

        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            y, _ = self.attention(x, x, x, need_weights=False)
            y, _ = self.attention(y, m, m)
            return self.linear(y)

    model = get_slice_model(Both(), slices_alone(r=4, switch_interval=1))
    counter = torch._dynamo.testing.CompileCounter()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    optimizer, x, m = (
        SliceAdamW(model.parameters(), lr=1e-2),
        torch.randn(N, L, E),
        torch.randn(N, S, E),
    )
    for _ in range(4):
        torch.testing.assert_close(compiled(x, m), model(x, m))
        compiled(x, m).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "options", [{}, {"optim_bits": 8}, {"optimizer_in_bwd": True}], ids=str
)
def test_interrupted_training_goes_on_bit_for_bit(options):
    make = lambda: get_slice_model(
        Net().float(), slices_alone(r=4, switch_interval=2, state_on_switch="remember")
    )

    def steps(model, optimizer, count):
        for _ in range(count):
            x = torch.ones(L, N, E)
            optimizer.zero_grad()
            model(x, x, x)[0].square().sum().backward()
            optimizer.step()

    whole, part, rest = make(), make(), make()
    steps(whole, SliceAdamW(whole.parameters(), lr=1e-2, **options), 9)
    optimizer = SliceAdamW(part.parameters(), lr=1e-2, **options)
    steps(part, optimizer, 5)
    resumed = SliceAdamW(rest.parameters(), lr=1e-2, **options)
    rest.load_state_dict({k: v.clone() for k, v in part.state_dict().items()}, assign=True)
    resumed.load_state_dict(optimizer.state_dict())
    steps(rest, resumed, 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.state_dict().values(), rest.state_dict().values(), strict=True
        )
    )


@pytest.mark.parametrize("slice_type", ["column", "row", "block", "row_column"])
def test_a_delta_goes_to_a_file_and_back(slice_type, tmp_path):
    model = get_slice_model(
        Net(),
        slices_alone(r=4, slice_type=slice_type, switch_interval=2, bias="slice_only"),
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(*inputs("cross"))[0].square().sum().backward()
        optimizer.step()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = SliceModel.from_pretrained(Net(), tmp_path)
    again = SliceModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    same = lambda a, b: (
        sorted(a) == sorted(b) and all(torch.equal(a[key], b[key]) for key in a)
    )
    for twin in (loaded, again):
        assert same(twin.state_dict(), trained) and same(twin.unload().state_dict(), before)
    model.revert()
    assert same(model.state_dict(), before) and not same(before, trained)


def test_a_single_attention_and_one_that_trains_whole():
    with pytest.raises(
        ValueError,
        match=(
            "the model is a single MultiheadAttention, whose parameters become slices within a"
            " model"
        ),
    ):
        get_slice_model(nn.MultiheadAttention(E, HEADS), slices_alone(r=4))
    model = nn.Sequential(nn.MultiheadAttention(E, HEADS), nn.Linear(E, E))
    get_slice_model(model, slices_alone(r=4, modules_to_save=["0"]))
    x, attention = torch.randn(L, N, E), model[0]
    attention(x, x, x)[0].sum().backward()
    assert isinstance(
        attention.in_proj_weight, nn.Parameter
    ) and attention.in_proj_weight.grad.shape == (3 * E, E)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.in_proj_weight",
        "0.in_proj_bias",
        "0.out_proj.weight",
        "0.out_proj.bias",
        "1.slice_weight",
    }


def test_casting_and_names():
    model = get_slice_model(Net(), slices_alone(r=4)).to(torch.bfloat16)
    child = model.attention.slice_of("in_proj_weight")
    assert (
        child.weight.dtype == torch.bfloat16 and child.slice_weight.dtype == torch.float32
    )
    x = torch.randn(L, N, E, dtype=torch.bfloat16)
    model(x, x, x)[0].float().sum().backward()
    assert child.slice_weight.grad.shape == (3 * E, 4)
    rows = {
        m.name: (m.out_features, m.in_features, m.r)
        for m in list_targets(Net(), slices_alone(r=4, rank_pattern={"out_proj": 2}))
    }
    assert rows == {
        "attention.in_proj_weight": (3 * E, E, 4),
        "attention.out_proj": (E, E, 2),
    }
    sliced = lambda **names: {
        m.name for m in list_targets(Net(), slices_alone(r=4, **names)) if m.skipped is None
    }
    assert sliced(target_modules=["attention"]) == {
        "attention.in_proj_weight",
        "attention.out_proj",
    }
    assert sliced(target_modules=["out_proj"]) == {"attention.out_proj"}
    assert sliced(target_modules=[], target_parameters=["in_proj_weight"]) == {
        "attention.in_proj_weight"
    }


def test_no_gradient_of_the_whole_projection_exists():
    """Peak memory of a step: the masked run holds a gradient of (3E, E), slices never do, whichever
    of q, k, v are one tensor.
    """
    width = 256

    def peak(make, module, cross):
        torch.manual_seed(0)
        x = torch.randn(4, 1, width)
        m = torch.randn(4, 1, width) if cross else x
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = make(parameters)
        with track_memory(module.parameters()) as report:
            module(x, m, m)[0].square().sum().backward()
        optimizer.zero_grad()
        return report.peak_bytes - report.bytes_before

    whole = 3 * width * width * 4
    for cross in (False, True):
        for slice_type in ("column", "row"):
            module = nn.Sequential()
            module.attention = nn.MultiheadAttention(width, 4)
            module.forward = lambda *args, m=module: m.attention(*args)
            dense = peak(torch.optim.AdamW, copy.deepcopy(module.attention), cross)
            sliced = get_slice_model(module, slices_alone(r=4, slice_type=slice_type))
            assert dense > whole and peak(SliceAdamW, sliced.attention, cross) < whole / 4


def encoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        E, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **options
    )
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("excluded", [None, ["self_attn"], ["layers.0"]])
def test_the_fast_paths_of_the_encoder_do_not_bypass_slices(excluded):
    """In eval mode PyTorch fuses a whole layer if no weight asks for a gradient, and no weight of a
    slice does.
    """
    plain = encoder().eval()
    x, padding = (
        torch.randn(N, L, E, dtype=torch.float64),
        torch.zeros(N, L, dtype=torch.bool),
    )
    padding[1, 3:] = True
    exclude = {
        None: None,
        "self_attn": r".*self_attn.*",
        "layers.0": r".*layers\.0\..*|layers\.0\..*",
    }[excluded[0] if excluded else None]
    model = get_slice_model(
        copy.deepcopy(plain), slices_alone(r=4, exclude_modules=exclude)
    )
    layers = [m for m in model.modules() if isinstance(m, SliceLayer)]
    assert (
        len(layers)
        == {None: 8, "self_attn": 4, "layers.0": 4}[excluded[0] if excluded else None]
    )
    for arguments in ({}, {"src_key_padding_mask": padding}):
        model.zero_grad()
        model(x, **arguments).square().sum().backward()
        assert all(
            layer.slice_weight.grad is not None and layer.slice_weight.grad.any()
            for layer in layers
        )
        with torch.no_grad():
            ours, theirs = model(x, **arguments), plain(x, **arguments)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-14)
        assert torch.equal(model.merge_and_unload()(x), plain(x))


@pytest.mark.parametrize("kdim", [None, 12])
def test_the_state_dict_keeps_its_order(kdim):
    net = lambda: nn.Sequential(
        nn.MultiheadAttention(16, 2, kdim=kdim, add_bias_kv=True), nn.Linear(16, 16)
    )
    plain = net()
    model = get_slice_model(net(), slices_alone(r=4))
    assert list(model.state_dict()) == list(plain.state_dict())
    # inside of a model, as checkpoints of optimizers count parameters
    assert list(nn.ModuleList([model]).state_dict()) == list(
        nn.ModuleList([plain]).state_dict()
    )
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
