"""RMSNorm and the gated product of lean models against float64, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slicefine.backends import cpu
from slicefine.backends import lean_reference as reference
from slicefine.lean import ops
from slicefine.ops import use_backend
from tests.ops.test_ops import DTYPES, assert_as_good_as_torch, relaxed

KINDS = reference.ACTIVATIONS
BACKENDS = ["reference", "cpu", "triton"]
INTERNAL = {torch.float64: torch.float64}


def view(shape, dtype, seed, layout="whole", scale=1.0):
    """Numbers in a buffer of NaN: whole, rows apart, features apart, or at an odd offset."""
    generator = torch.Generator().manual_seed(seed)
    values = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(
        dtype
    )
    *rows, d = shape
    if layout == "whole":
        return values
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    buffer = torch.full((*rows, 2 * d + 3), float("nan"), dtype=dtype)
    part = buffer[..., 3 : 3 + d] if layout == "odd" else buffer[..., :d]
    return part.copy_(values)


LAYOUTS = st.sampled_from(["whole", "rows", "odd", "transposed"])
SHAPES = st.tuples(
    st.sampled_from([(0,), (1,), (3,), (2, 3)]),
    st.sampled_from([1, 2, 63, 64, 65, 129, 200]),
).map(lambda parts: (*parts[0], parts[1]))


def check_norm(name, shape, dtype, layouts, offset, late_cast):
    internal = INTERNAL.get(dtype, torch.float32)
    x, grad = (view(shape, dtype, i, how) for i, how in enumerate(layouts))
    weight = view((shape[-1],), dtype, 2, scale=0.3).add_(1 - offset)
    options = (1e-5, offset, late_cast)
    wide = [t.double() for t in (x, weight)]
    exact = reference.rms_norm(*wide, *options, torch.float64)
    plain = reference.rms_norm(x, weight, *options, internal)
    with use_backend(name):
        found = ops.rms_norm(x, weight, *options, internal)
        back = ops.rms_norm_backward(grad, x, found[1], weight, offset)
    assert found[0].dtype == x.dtype and found[1].dtype == internal
    assert found[0].shape == x.shape == back.shape and found[0].is_contiguous()
    # one rounding where the product of two roundings is allowed to fall on either side
    unit = torch.finfo(dtype).eps if exact[0].numel() else 0.0
    for one, precise, other in zip(found, exact, plain, strict=True):
        most = precise.abs().max().item() if precise.numel() else 0.0
        assert_as_good_as_torch(one, precise, other, magnitude=most * unit * 2**24)
    exact_back = reference.rms_norm_backward(
        grad.double(), wide[0], exact[1], wide[1], offset
    )
    plain_back = reference.rms_norm_backward(grad, x, plain[1], weight, offset)
    sums = (grad.double().abs().max() * found[1].max()).item() if back.numel() else 0.0
    assert_as_good_as_torch(back, exact_back, plain_back, magnitude=4 * sums)


@relaxed
@given(
    SHAPES,
    st.sampled_from(DTYPES),
    st.tuples(LAYOUTS, LAYOUTS),
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_rms_norm(name, shape, dtype, layouts, offset, late_cast):
    check_norm(name, shape, dtype, layouts, offset, late_cast)


def check_gate(name, shape, dtype, layouts, kind):
    gate, up, grad = (view(shape, dtype, i, how, 3.0) for i, how in enumerate(layouts))
    wide = [t.double() for t in (gate, up, grad)]
    with use_backend(name):
        found = ops.gated_activation(gate, up, kind)
        back = ops.gated_activation_backward(grad, gate, up, kind)
    results = (found, *back)
    exact = (
        reference.gated_activation(*wide[:2], kind),
        *reference.gated_activation_backward(wide[2], *wide[:2], kind),
    )
    plain = (
        reference.gated_activation(gate, up, kind),
        *reference.gated_activation_backward(grad, gate, up, kind),
    )
    # the slope is a sum whose terms may cancel
    terms = 4 * (wide[1] * wide[2]).abs().max().item() if found.numel() else 0.0
    for one, precise, other in zip(results, exact, plain, strict=True):
        assert one.dtype == dtype and one.shape == gate.shape
        most = precise.abs().max().item() + terms if precise.numel() else 0.0
        unit = torch.finfo(dtype).eps
        assert_as_good_as_torch(one, precise, other, magnitude=most * unit * 2**24)


@relaxed
@given(
    SHAPES,
    st.sampled_from(DTYPES),
    st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    st.sampled_from(KINDS),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_gated_activation(name, shape, dtype, layouts, kind):
    check_gate(name, shape, dtype, layouts, kind)


@pytest.mark.parametrize("isa", cpu._C.isas() if cpu._C else [])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_instruction_set(isa, dtype):
    before = cpu._C.current_isa()
    cpu._C.select_isa(isa)
    try:
        for width in (1, 31, 64, 200):
            for offset, late in ((0.0, False), (1.0, True), (1.0, False)):
                check_norm("cpu", (7, width), dtype, ("rows", "odd"), offset, late)
            for kind in KINDS:
                check_gate("cpu", (7, width), dtype, ("rows", "odd", "whole"), kind)
    finally:
        cpu._C.select_isa(before)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_several_threads_and_long_rows_give_the_same_bits(name):
    """More elements than a thread or a program takes at a time."""
    x, gate, up = (view((9, 5000), torch.float32, i) for i in range(3))
    weight = view((5000,), torch.float32, 3)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            with use_backend(name):
                y, rstd = ops.rms_norm(x, weight, 1e-6, 0.0, False, torch.float32)
                dx = ops.rms_norm_backward(gate, x, rstd, weight, 0.0)
                both = ops.gated_activation_backward(x, gate, up, "silu")
                results.append([y, dx, ops.gated_activation(gate, up, "silu"), *both])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact, _ = reference.rms_norm(
        x.double(), weight.double(), 1e-6, 0.0, False, torch.float64
    )
    assert (results[0][0] - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_far_out_and_not_a_number(name, kind):
    """Where e^x overflows a float32, and what is not a number stays so."""
    gate = torch.tensor([-1e4, -200.0, -88.5, -30.0, 0.0, 30.0, 88.5, 200.0, 1e4])
    up = torch.full_like(gate, 0.5)
    with use_backend(name):
        found = ops.gated_activation(gate, up, kind)
        slopes, _ = ops.gated_activation_backward(up, gate, up, kind)
        broken = ops.gated_activation(gate.fill_(float("nan")), up, kind)
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 15.0, 44.25, 100.0, 5e3])
    assert (found - wanted).abs().max() <= 1e-10 * 5e3
    assert (slopes - torch.tensor([0.0] * 4 + [0.125] + [0.25] * 4)).abs().max() <= 1e-6
    assert broken.isnan().all()


def test_as_registered_ops():
    x, weight = torch.randn(3, 8), torch.rand(8)
    run = torch.ops.slicefine
    torch.library.opcheck(run.rms_norm, (x, weight, 1e-6, 0.0, False, torch.float32))
    torch.library.opcheck(run.rms_norm_backward, (x, x, torch.rand(3, 1), weight, 0.0))
    torch.library.opcheck(run.gated_activation, (x, x.clone(), "silu"))
    torch.library.opcheck(run.gated_activation_backward, (x, x.clone(), x.clone(), "gelu"))


@pytest.mark.parametrize("watched", [False, True])
def test_errors_name_what_was_given_and_expected(watched):
    x, weight = torch.randn(3, 8), torch.rand(8)
    # the short way on the CPU is open once a backend has been chosen, and closed where one is forced
    ops.gated_activation(x, x, "silu")
    with use_backend("reference" if watched else None):
        with pytest.raises(
            ValueError, match=r"rms_norm: x has shape \(3, 8\) and weight \(7,"
        ):
            ops.rms_norm(x, weight[:7], 1e-6, 0.0, False, torch.float32)
        with pytest.raises(
            TypeError, match=r"rms_norm: x is torch.float32, weight torch.bfl"
        ):
            ops.rms_norm(x, weight.bfloat16(), 1e-6, 0.0, False, torch.float32)
        with pytest.raises(TypeError, match="the arithmetic torch.bfloat16"):
            ops.rms_norm(x, weight, 1e-6, 0.0, False, torch.bfloat16)
        with pytest.raises(ValueError, match=r"x has shape \(3, 8\) on cpu, grad \(2, 8\)"):
            ops.rms_norm_backward(x[:2], x, x[:, :1], weight, 0.0)
        with pytest.raises(ValueError, match="no activation 'relu'; expected one of silu"):
            ops.gated_activation(x, x, "relu")
        with pytest.raises(TypeError, match=r"gate is torch.float32, up torch.float64"):
            ops.gated_activation(x, x.double(), "silu")
        with pytest.raises(
            ValueError, match=r"gate has shape \(3, 8\) on cpu, grad \(3, 7\)"
        ):
            ops.gated_activation_backward(x[:, :7], x, x, "silu")
