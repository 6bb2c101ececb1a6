"""Moments in 8 bits: the codebook, every backend against the reference, and training with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slicefine import SliceAdamW, get_slice_model, ops
from slicefine.backends import reference
from slicefine.backends.operands import AdamWOptions, AdamWSlice8bit
from slicefine.slices import read_slice, write_slice
from tests.configs import slices_alone
from tests.ops.test_ops import (
    DTYPES,
    FEATURES,
    HYPERPARAMETERS,
    make_slices,
    relaxed,
    some_slices,
    together,
)


def test_the_codebook_is_dynamic():
    signed, unsigned = reference.dynamic_codebook()
    for book in (signed, unsigned):
        assert (
            len(book) == 256
            and bool((book.diff() > 0).all())
            and 0.0 in book
            and book[-1] == 1.0
        )
    assert torch.equal(
        signed[:127], -signed[128:255].flip(0)
    )  # the one value without a twin is 1
    # within a decade the spacing is constant and finer decades have fewer values
    count = lambda low, high: int(((unsigned > low) & (unsigned < high)).sum())
    assert [count(10.0**-e, 10.0 ** (1 - e)) for e in range(1, 5)] == [128, 64, 32, 16]
    assert unsigned[1] < 1e-6 < unsigned[4]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_rounding_is_to_the_nearest_value(count):
    for book, values in zip(
        reference.dynamic_codebook(), (torch.randn(count), torch.rand(count)), strict=True
    ):
        codes, scales = reference.quantize_blockwise(values, book)
        assert codes.dtype == torch.uint8 and scales.shape == (-(-count // 256),)
        spread = scales.repeat_interleave(256)[:count]
        every = (values[:, None] - book[None, :] * spread[:, None]).abs().amin(1)
        found = (values - reference.dequantize_blockwise(codes, scales, book)).abs()
        torch.testing.assert_close(found, every, rtol=0, atol=1e-6)
    zeros = reference.quantize_blockwise(torch.zeros(300), reference.dynamic_codebook()[0])
    assert not reference.dequantize_blockwise(*zeros, reference.dynamic_codebook()[0]).any()


def check_8bit(name, dtype, features, seed, maximize=False, shape=(21, 61)):
    """Masters as the float32 op from the same decoded moments; codes nearest to its moments, or
    beside a tie.
    """
    rows, cols = [r for r, _ in features], [c for _, c in features]
    masters, grads, moments, squares, weights = make_slices(dtype, features, shape)
    book = reference.dynamic_codebook()
    m, ms = map(
        list, zip(*(reference.quantize_blockwise(t, book[0]) for t in moments), strict=True)
    )
    v, vs = map(
        list, zip(*(reference.quantize_blockwise(t, book[1]) for t in squares), strict=True)
    )
    steps = [torch.tensor(float(1 + 7 * i)) for i in range(len(features))]
    before = [w.clone() for w in weights]
    expected = [
        [t.double() for t in masters],
        [g.double() for g in grads],
        [
            reference.dequantize_blockwise(a, b, book[0]).double()
            for a, b in zip(m, ms, strict=True)
        ],
        [
            reference.dequantize_blockwise(a, b, book[1]).double()
            for a, b in zip(v, vs, strict=True)
        ],
    ]
    nearest = AdamWOptions(**HYPERPARAMETERS, maximize=maximize)
    exact_weights = [w.double() for w in weights]
    reference.slice_adamw(together(*expected, exact_weights, rows, cols, steps), nearest)
    columns = (masters, grads, m, v, ms, vs, weights, rows, cols, steps)
    slices = [AdamWSlice8bit(*tensors) for tensors in zip(*columns, strict=True)]
    with ops.use_backend(name):
        ops.slice_adamw_8bit(slices, book, dataclasses.replace(nearest, seed=seed))
    for i, weight in enumerate(weights):
        torch.testing.assert_close(
            masters[i].double(), expected[0][i], rtol=3e-6, atol=3e-7
        )
        for codes, scales, values, values_book in (
            (m[i], ms[i], expected[2][i], book[0]),
            (v[i], vs[i], expected[3][i], book[1]),
        ):
            nearest, exact_scales = reference.quantize_blockwise(values, values_book)
            torch.testing.assert_close(scales, exact_scales, rtol=1e-5, atol=0)
            apart = (codes.int() - nearest.int()).abs()
            assert apart.max() <= 1 and int((apart > 0).sum()) <= max(
                1, apart.numel() // 100
            )
        written = read_slice(weight, rows[i], cols[i])
        stochastic = seed if dtype == torch.bfloat16 else None
        assert torch.equal(written, reference.round_to(masters[i], dtype, stochastic, i))
        outside = torch.ones(weight.shape, dtype=torch.bool)
        write_slice(
            outside, rows[i], cols[i], torch.zeros(masters[i].shape, dtype=torch.bool)
        )
        assert torch.equal(weight[outside], before[i][outside])
        base = weight._base  # NaN around the weight
        assert base is not None and int(base.isnan().sum()) == base.numel() - weight.numel()
    return masters, m, v, ms, vs, weights


@pytest.mark.parametrize("seed", [None, 2**40 + 12345])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_slice_adamw_8bit(name, dtype, seed):
    for maximize in (False, True):
        check_8bit(name, dtype, FEATURES, seed, maximize)


@relaxed
@given(some_slices(), st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_slice_adamw_8bit_anywhere(name, slices, dtype):
    shape, features = slices
    check_8bit(name, dtype, features, None, shape=shape)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_codes_are_the_nearest_over_the_whole_range(name):
    """Ratios of both signs over nine decades, dense near 1: the codes are the reference's."""
    n = 8 if name == "triton" else 200
    signs = torch.where(torch.rand(n, 256) < 0.5, -1.0, 1.0)
    grad = signs * torch.where(
        torch.rand(n, 256) < 0.5, torch.rand(n, 256), 10 ** (-9 * torch.rand(n, 256))
    )
    grad[:, 0], book = 1.0, reference.dynamic_codebook()
    codes = {}
    for backend in ("reference", name):
        m, v = (torch.zeros(n, 256, dtype=torch.uint8) for _ in range(2))
        with ops.use_backend(backend):
            moments = (m, v, torch.zeros(n), torch.zeros(n))
            place = (torch.zeros(n, 256), None, None, torch.tensor(1.0))
            active = AdamWSlice8bit(torch.zeros(n, 256), grad, *moments, *place)
            ops.slice_adamw_8bit([active], book, AdamWOptions(**HYPERPARAMETERS))
        codes[backend] = torch.stack([m, v]).int()
    apart = (
        codes[name] - codes["reference"]
    ).abs()  # a rounding of the last bit may fall on either side of a midpoint
    assert (
        apart.max() <= 1
        and apart[0].float().mean() < 1e-4
        and apart[1].float().mean() < 1e-3
    )


def train(
    optim_bits: int,
    steps: int = 60,
    slice_type: str = "column",
    policy: str = "reset",
    dtype=torch.float32,
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(dtype)
    config = slices_alone(
        r=16,
        slice_type=slice_type,
        switch_interval=15,
        state_on_switch=policy,
        target_modules=["0", "2"],
    )
    model = get_slice_model(net, config)
    optimizer = SliceAdamW(model.parameters(), lr=3e-3, optim_bits=optim_bits)
    x, y = torch.randn(256, 64).to(dtype), torch.randn(256, 32).to(dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model, optimizer


@pytest.mark.parametrize("policy", ["reset", "keep", "remember"])
@pytest.mark.parametrize("slice_type", ["column", "row", "block", "row_column"])
def test_training_with_8_bits_follows_32(slice_type, policy):
    full, _, _ = train(32, slice_type=slice_type, policy=policy)
    eight, _, optimizer = train(8, slice_type=slice_type, policy=policy)
    assert full[-1] < 0.97 * full[0]
    drop = lambda losses: losses[0] - losses[-1]
    assert abs(drop(eight) - drop(full)) < 0.05 * drop(full)
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
        assert state["exp_avg_scale"].shape == (-(-state["exp_avg"].numel() // 256),)


def test_8_bits_take_a_quarter_of_the_memory():
    sizes = {}
    for bits in (8, 32):
        _, _, optimizer = train(bits, steps=1)
        sizes[bits] = sum(
            t.nbytes for s in optimizer.state.values() for k, t in s.items() if k != "step"
        )
    assert sizes[8] < 0.27 * sizes[32]


def test_8_bits_resume_bit_for_bit(tmp_path):
    losses, _, _ = train(8, steps=40)
    _, model, optimizer = train(8, steps=20)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(0)
    _, model, optimizer = train(8, steps=0)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    x, y = torch.randn(256, 64), torch.randn(256, 32)
    for expected in losses[20:]:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        assert loss.item() == expected
    _, _, other = train(32, steps=0)
    other.load_state_dict(state)
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(
        ValueError, match=r"moments are torch\.uint8 and this optimizer has optim_bits=32"
    ):
        other.step()


def test_what_8_bits_cannot_do_is_said():
    net = lambda dtype: get_slice_model(
        nn.Sequential(nn.Linear(8, 8)).to(dtype), slices_alone(r=2, target_modules=["0"])
    )
    with pytest.raises(ValueError, match="optim_bits is 4; expected 32"):
        SliceAdamW(net(torch.float32).parameters(), optim_bits=4)
    with pytest.raises(ValueError, match="need optimizer_in_bwd=False"):
        SliceAdamW(net(torch.float32).parameters(), optim_bits=8, optimizer_in_bwd=True)
    model = net(torch.float64)
    optimizer = SliceAdamW(model.parameters(), optim_bits=8)
    model(torch.randn(3, 8).double()).sum().backward()
    with pytest.raises(TypeError, match="optim_bits=8 takes float32, bfloat16 and float16"):
        optimizer.step()
    with pytest.raises(
        ValueError, match=r"expected uint8 of the slice's shape and scales of shape \(1,\)"
    ):
        p = torch.zeros(3, 2)
        place = (torch.zeros(3, 2), None, None, torch.tensor(1.0))
        active = AdamWSlice8bit(p, p, p, p, p, p, *place)
        options = AdamWOptions(**HYPERPARAMETERS)
        ops.slice_adamw_8bit([active], reference.dynamic_codebook(), options)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_small_gradients_beside_a_large_one_take_no_huge_steps(name):
    """A block of 256 in which one element's gradient is thousands of times the others': the others
    move as with 32 bits.
    """
    moved = {}
    for bits in (8, 32):
        layer = get_slice_model(
            nn.Sequential(nn.Linear(16, 16, bias=False)),
            slices_alone(r=16, switch_interval=None, target_modules=["0"]),
        )
        optimizer = SliceAdamW(layer.parameters(), lr=1e-3, optim_bits=bits)
        slice_weight, generator = layer[0].slice_weight, torch.Generator().manual_seed(0)
        before = slice_weight.detach().clone()
        with ops.use_backend(name):
            for _ in range(100):
                grad = 3e-4 * torch.randn(16, 16, generator=generator)
                grad[0, 0] = torch.randn(1, generator=generator)
                slice_weight.grad = grad
                optimizer.step()
        moved[bits] = (slice_weight.detach() - before).abs().flatten()[1:].mean().item()
    assert 0.2 * moved[32] < moved[8] < 1.5 * moved[32]


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_nan_shows_in_the_moments(name):
    grad = torch.randn(4, 100)
    grad[0, 3] = float("nan")
    m, v, ms, vs = (
        torch.zeros(4, 100, dtype=torch.uint8),
        torch.zeros(4, 100, dtype=torch.uint8),
        torch.zeros(2),
        torch.zeros(2),
    )
    with ops.use_backend(name):
        place = (torch.zeros(4, 100), None, None, torch.tensor(1.0))
        active = AdamWSlice8bit(torch.zeros(4, 100), grad, m, v, ms, vs, *place)
        options = AdamWOptions(**HYPERPARAMETERS)
        ops.slice_adamw_8bit([active], reference.dynamic_codebook(), options)
    assert ms.isnan().tolist() == vs.isnan().tolist() == [True, False]


def test_a_model_cast_to_float64_is_refused():
    _, model, optimizer = train(8, steps=2)
    model.double()
    model(torch.randn(3, 64).double()).sum().backward()
    with pytest.raises(TypeError, match="optim_bits=8 takes float32"):
        optimizer.step()
