"""Masters written to their weights, on every backend; and slices prepared once for many steps."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slicefine import ops
from slicefine.backends import cpu, reference
from slicefine.backends.operands import AdamWOptions, AdamWSlice, AdamWSlice8bit, SliceWrite
from slicefine.slices import read_slice, write_slice
from tests.ops.test_ops import (
    DTYPES,
    FEATURES,
    HYPERPARAMETERS,
    make_slices,
    relaxed,
    some_slices,
)

OPTIONS = AdamWOptions(**HYPERPARAMETERS)


def check_writes(name, dtype, features, shape=(21, 33)):
    masters, _, _, _, weights = make_slices(dtype, features, shape)
    before = [w.clone() for w in weights]
    slices = [
        SliceWrite(*t)
        for t in zip(masters, weights, *zip(*features, strict=True), strict=True)
    ]
    with ops.use_backend(name):
        ops.write_slices(slices)
    for s, old in zip(slices, before, strict=True):
        assert torch.equal(read_slice(s.weight, s.rows, s.cols), s.master.to(dtype))
        write_slice(s.weight, s.rows, s.cols, read_slice(old, s.rows, s.cols))
        assert torch.equal(s.weight, old)  # nothing outside the slice
        base = s.weight._base
        assert (
            base is not None and int(base.isnan().sum()) == base.numel() - s.weight.numel()
        )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_write_slices(name, dtype):
    if name == "triton" and dtype == torch.float64:
        pytest.skip(
            "Triton takes no float64; test_a_dtype_that_a_backend_lacks checks the error"
        )
    check_writes(name, dtype, FEATURES)


@relaxed
@given(some_slices(), st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_write_slices_anywhere(name, slices, dtype):
    shape, features = slices
    check_writes(name, dtype, features, shape)


@pytest.mark.parametrize("isa", cpu._C.isas() if cpu._C else [])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_instruction_set_writes(isa, dtype):
    before = cpu._C.current_isa()
    cpu._C.select_isa(isa)
    try:
        check_writes("cpu", dtype, FEATURES)
    finally:
        cpu._C.select_isa(before)


def test_write_slices_as_a_registered_op():
    weight, cols = torch.randn(3, 4), torch.arange(2)
    torch.library.opcheck(
        torch.ops.slicefine.write_slices, ([torch.ones(3, 2)], [weight], [None], [cols])
    )
    x = torch.randn(2, 4, requires_grad=True)
    y = nn.functional.linear(x, weight)
    ops.write_slices([SliceWrite(torch.ones(3, 2), weight, None, cols)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(
        ValueError, match=r"write_slices: the slice of weight \(3, 4\) has shape"
    ):
        ops.write_slices([SliceWrite(torch.ones(2, 2), weight, None, cols)])
    ops.write_slices([])


# Prepared slices


def adamw_slices(dtype=torch.float32):
    own = lambda index: None if index is None else index.clone()
    rows, cols = [own(r) for r, _ in FEATURES], [own(c) for _, c in FEATURES]
    masters, grads, moments, squares, weights = make_slices(dtype, FEATURES)
    steps = [torch.tensor(1.0) for _ in masters]
    columns = (masters, grads, moments, squares, weights, rows, cols, steps)
    return [AdamWSlice(*tensors) for tensors in zip(*columns, strict=True)]


def eight_bit_slices():
    book, found = reference.dynamic_codebook(), []
    for s in adamw_slices():
        m, ms = reference.quantize_blockwise(s.exp_avg, book[0])
        v, vs = reference.quantize_blockwise(s.exp_avg_sq, book[1])
        found.append(AdamWSlice8bit(s.master, s.grad, m, v, ms, vs, *s[4:]))
    return found


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        for name, one, other in zip(a._fields, a, b, strict=True):
            assert one is other or torch.equal(one, other), name


class Watching(TorchDispatchMode):
    """A mode that sees every op and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("name", [None, "reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_slices_take_the_same_steps(name, dtype, watched):
    """New gradients at every step, some with a tail, some not contiguous, and new options."""
    mine, theirs = adamw_slices(dtype), adamw_slices(dtype)
    prepared = ops.PreparedAdamW(mine)
    with ops.use_backend(name):
        for count in range(1, 5):
            grads = [torch.randn(s.master.shape) for s in mine]
            options = dataclasses.replace(OPTIONS, lr=0.01 / count, seed=count)
            for s in (*mine, *theirs):
                s.step.fill_(count)
            given = list(grads)
            given[1] = torch.cat([grads[1].flatten(), torch.full((5,), torch.nan)])
            if count == 3:
                given[0] = grads[0].t().contiguous().t()
            if watched:
                with Watching():
                    prepared.step(given, options)
            else:
                prepared.step(given, options)
            ops.slice_adamw(
                [s._replace(grad=g) for s, g in zip(theirs, grads, strict=True)], options
            )
            assert_same(
                [s._replace(grad=None) for s in mine],
                [s._replace(grad=None) for s in theirs],
            )


@pytest.mark.parametrize("name", [None, "reference"])
def test_prepared_slices_with_8_bits_take_the_same_steps(name):
    mine, theirs, book = (
        eight_bit_slices(),
        eight_bit_slices(),
        reference.dynamic_codebook(),
    )
    prepared = ops.PreparedAdamW(mine, book)
    with ops.use_backend(name):
        for count in range(1, 4):
            grads = [torch.randn(s.master.shape) for s in mine]
            for s in (*mine, *theirs):
                s.step.fill_(count)
            prepared.step(grads, OPTIONS)
            ops.slice_adamw_8bit(
                [s._replace(grad=g) for s, g in zip(theirs, grads, strict=True)],
                book,
                OPTIONS,
            )
            assert_same(
                [s._replace(grad=g) for s, g in zip(mine, grads, strict=True)],
                [s._replace(grad=g) for s, g in zip(theirs, grads, strict=True)],
            )
    with pytest.raises(ValueError, match="need a codebook"):
        ops.PreparedAdamW(mine)


def test_prepared_slices_follow_their_tensors_to_other_memory():
    """``.data = ...`` frees what the table pointed at; a move rewrites the indices in place."""
    weight, master = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(8, 2))
    cols, moments = torch.arange(2), [torch.zeros(8, 2) for _ in range(2)]
    active = AdamWSlice(master, None, *moments, weight, None, cols, torch.tensor(1.0))
    values = SliceWrite(master, weight, None, cols)
    update, writes = ops.PreparedAdamW([active]), ops.PreparedWrites([values])
    for first in range(4):
        cols.copy_(torch.arange(first, first + 2))
        update.step([torch.ones(8, 2)], OPTIONS)
        assert torch.equal(weight[:, first : first + 2], master) and bool(
            (master != 0).all()
        )
        for t in (weight, master):
            t.data = torch.zeros(t.shape)
        gc.collect()
        junk = [torch.full((8, 6), 7.0) for _ in range(20)]
        master.data.fill_(first + 1.0)
        writes.write()
        assert bool((weight[:, first : first + 2] == first + 1).all())
        assert float(weight.detach().sum()) == 16.0 * (first + 1)
        assert all(bool((t == 7).all()) for t in junk)
        for t in (weight, master):
            t.data = torch.zeros(t.shape)


def test_a_prepared_step_is_seen_by_autograd_and_refuses_what_does_not_fit():
    slices = adamw_slices()
    prepared = ops.PreparedAdamW(slices)
    versions = [(s.master._version, s.weight._version) for s in slices]
    grads = [s.grad for s in slices]
    prepared.step(grads, OPTIONS)
    assert all(
        s.master._version > a and s.weight._version > b
        for s, (a, b) in zip(slices, versions, strict=True)
    )
    with pytest.raises(ValueError, match="1 gradients for 7 slices"):
        prepared.step(grads[:1], OPTIONS)
    writes = ops.PreparedWrites(
        [SliceWrite(s.master, s.weight, s.rows, s.cols) for s in slices]
    )
    writes.write()
    before = [s.weight.clone() for s in slices]
    slices[-3].cols[0] = 10**9
    for call in (lambda: prepared.step(grads, OPTIONS), writes.write):
        with pytest.raises(
            IndexError, match=r"cols holds 1000000000; there are features 0 to 32"
        ):
            call()
    assert all(torch.equal(s.weight, b) for s, b in zip(slices, before, strict=True))
    bad = slices[0]._replace(exp_avg=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"has shape \(21, 5\); got master"):
        ops.PreparedAdamW([bad]).step(grads[:1], OPTIONS)
    ops.PreparedAdamW([]).step([], OPTIONS)
    ops.PreparedWrites([]).write()
