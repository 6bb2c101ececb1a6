"""Every backend of every op against float64, on hostile shapes; schemas, fakes and the choice of a
backend.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from slicefine import ops
from slicefine.backends import cpu, reference, select
from slicefine.backends.operands import AdamWOptions, AdamWSlice
from slicefine.slices import read_slice, write_slice

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HYPERPARAMETERS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
}
relaxed = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def assert_as_good_as_torch(result, exact, plain, factor=2.0, magnitude=0.0):
    """The error against float64 is at most ``factor`` times that of plain PyTorch in the same
    precision.

    magnitude: the largest sum of absolute products; one float32 rounding of it is allowed as well,
    since plain PyTorch can hit a sum of few terms exactly where another order of adding does not.
    """
    error, allowed = (result.double() - exact).abs(), (plain.double() - exact).abs()
    if not exact.numel():
        return
    bound = (
        factor * allowed.max().item() + 1e-6 * exact.abs().max().item() + magnitude * 2**-24
    )
    if error.max().item() > bound:
        worst = divmod(int(error.argmax()), error.shape[-1])
        raise AssertionError(
            f"error {error.max():.3e} (RMS {error.square().mean().sqrt():.3e}) at {worst}, allowed"
            f" {bound:.3e}"
        )


@st.composite
def gradients(draw):
    """(grad_output, input, rows) with odd sizes, strides and offsets; buffers are surrounded by
    NaN.
    """
    n, out, width = (
        draw(st.sampled_from([0, 1, 2, 31, 63, 65])),
        draw(st.sampled_from([1, 5, 16, 33, 129])),
        draw(st.sampled_from([1, 3, 16, 17, 40])),
    )
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def matrix(columns):
        pad, offset, transposed = (
            draw(st.sampled_from([0, 1, 7])),
            draw(st.sampled_from([0, 1, 3])),
            draw(st.booleans()),
        )
        shape = (columns, n) if transposed else (n, columns)
        buffer = torch.full((shape[0], shape[1] + pad + offset), float("nan"), dtype=dtype)
        view = buffer[:, offset : offset + shape[1]]
        view.copy_(torch.randn(shape, generator=generator))
        return view.t() if transposed else view

    rows = None
    if draw(st.booleans()):
        rows = torch.randperm(out, generator=generator)[: draw(st.integers(1, out))]
        if draw(st.booleans()):
            rows = torch.arange(out)[-len(rows) :]  # at the border
    return matrix(out), matrix(width), rows


@relaxed
@given(gradients())
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_slice_grad(name, operands):
    grad_output, input, rows = operands
    exact = reference.slice_grad(grad_output.double(), input.double(), rows)
    chosen = grad_output if rows is None else grad_output[:, rows]
    with ops.use_backend(name):
        result = ops.slice_grad(grad_output, input, rows)
    assert result.dtype == torch.float32 and result.shape == exact.shape
    magnitude = chosen.double().abs().t() @ input.double().abs()
    most = magnitude.max().item() if magnitude.numel() else 0.0
    plain = chosen.float().t() @ input.float()
    assert_as_good_as_torch(result, exact, plain, magnitude=most)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_long_sums_stay_as_precise_as_torchs(name, dtype):
    grad_output, input = torch.randn(8192, 40).to(dtype), torch.randn(8192, 16).to(dtype)
    exact = reference.slice_grad(grad_output.double(), input.double())
    with ops.use_backend(name):
        result = ops.slice_grad(grad_output, input)
    assert_as_good_as_torch(result, exact, grad_output.float().t() @ input.float())


@pytest.mark.skipif(cpu._C is None, reason="no compiled module")
@pytest.mark.parametrize("isa", cpu._C.isas() if cpu._C else [])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_instruction_set(isa, dtype):
    before = cpu._C.current_isa()
    cpu._C.select_isa(isa)
    try:
        grad_output, input = torch.randn(130, 77).to(dtype), torch.randn(130, 19).to(dtype)
        exact = grad_output.double().t() @ input.double()
        result = cpu.slice_grad(grad_output, input)
        torch.testing.assert_close(
            result.double(),
            exact,
            rtol=1e-5 if dtype != torch.float64 else 1e-12,
            atol=1e-4 if dtype != torch.float64 else 1e-12,
        )
        check_adamw(cpu, dtype, [(None, torch.arange(3, 8))], seed=None)
    finally:
        cpu._C.select_isa(before)


def test_an_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match="'sse9' is not one of"):
        cpu._C.select_isa("sse9")


def make_slices(dtype, features, shape=(21, 33)):
    """Tensors of slice_adamw for several slices, weights inside NaN-filled buffers, every second
    one stored transposed.
    """
    masters, moments, squares, weights, grads = [], [], [], [], []
    generator = torch.Generator().manual_seed(1)
    precise = reference.accumulation_dtype(dtype)
    for i, (rows, cols) in enumerate(features):
        buffer = torch.full((shape[0] + 2, shape[1] + 3), float("nan"), dtype=dtype)
        weight = buffer[1:-1, 1:-2]
        if i % 2:
            weight = torch.full((shape[1] + 3, shape[0] + 2), float("nan"), dtype=dtype)[
                1:-2, 1:-1
            ].t()
        weight.copy_(torch.randn(shape, generator=generator))
        R, K = (
            len(rows) if rows is not None else shape[0],
            (len(cols) if cols is not None else shape[1]),
        )
        random = lambda R=R, K=K: torch.randn(
            R, K, generator=generator, dtype=torch.float64
        ).to(precise)
        masters.append(random())
        grads.append(random())
        moments.append(0.1 * random())
        squares.append(0.1 * random().square())
        weights.append(weight)
    return masters, grads, moments, squares, weights


def together(*columns):
    """Lists of masters, gradients and so on -> a slice of each."""
    return [AdamWSlice(*tensors) for tensors in zip(*columns, strict=True)]


def check_adamw(module, dtype, features, seed, maximize=False, shape=(21, 33)):
    masters, grads, moments, squares, weights = make_slices(dtype, features, shape)
    before = [w.clone() for w in weights]
    exact = [[t.double() for t in group] for group in (masters, grads, moments, squares)]
    scratch = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    rows, cols = [r for r, _ in features], [c for _, c in features]
    steps = [torch.tensor(float(1 + 7 * i)) for i in range(len(features))]
    nearest = AdamWOptions(**HYPERPARAMETERS, maximize=maximize)
    reference.slice_adamw(together(*exact, scratch, rows, cols, steps), nearest)
    mine = together(masters, grads, moments, squares, weights, rows, cols, steps)
    module.slice_adamw(mine, dataclasses.replace(nearest, seed=seed))
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12}
        if dtype == torch.float64
        else {"rtol": 3e-6, "atol": 3e-7}
    )
    for i, weight in enumerate(weights):
        for mine, theirs in zip(
            (masters, moments, squares), (exact[0], exact[2], exact[3]), strict=True
        ):
            torch.testing.assert_close(mine[i].double(), theirs[i], **tolerance)
        written = read_slice(weight, rows[i], cols[i])
        if seed is not None and dtype == torch.bfloat16:
            assert torch.equal(written, reference.round_to(masters[i], dtype, seed, i))
        else:
            assert torch.equal(written, masters[i].to(dtype))
        outside = torch.ones(weight.shape, dtype=torch.bool)
        write_slice(
            outside, rows[i], cols[i], torch.zeros(masters[i].shape, dtype=torch.bool)
        )
        assert torch.equal(weight[outside], before[i][outside])
        base = weight._base
        assert (
            base is not None and int(base.isnan().sum()) == base.numel() - weight.numel()
        )  # the sentinels are untouched


FEATURES = [
    (None, torch.arange(0, 5)),
    (None, torch.arange(28, 33)),
    (torch.arange(16, 21), None),
    (torch.tensor([0, 20]), torch.tensor([32, 1, 7])),
    (None, torch.tensor([4])),
    (torch.tensor([3]), None),
    (None, None),
]


@pytest.mark.parametrize("seed", [None, 2**40 + 12345])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_slice_adamw(name, dtype, seed):
    if name == "triton" and dtype == torch.float64:
        pytest.skip(
            "Triton takes no float64; test_a_dtype_that_a_backend_lacks checks the error"
        )
    module, reason = select.BACKENDS[name].load()
    assert module is not None, reason
    features = [f if f[0] is None else (f[0].contiguous(), f[1]) for f in FEATURES]
    for maximize in (False, True):
        check_adamw(module, dtype, [(r, c) for r, c in features], seed, maximize)


@st.composite
def some_slices(draw):
    """(shape of W, [(rows, cols), ...]): widths from 1 to full, anywhere, in any order."""
    shape = (
        draw(st.sampled_from([1, 2, 31, 64, 129])),
        draw(st.sampled_from([1, 3, 16, 63, 130])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def index(features):
        width = draw(st.sampled_from([0, 1, features // 2, features]))
        return torch.randperm(features, generator=generator)[:width] if width else None

    return shape, [
        (index(shape[0]), index(shape[1])) for _ in range(draw(st.integers(1, 3)))
    ]


@relaxed
@given(some_slices(), st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_slice_adamw_anywhere(name, slices, dtype):
    shape, features = slices
    module, reason = select.BACKENDS[name].load()
    assert module is not None, reason
    check_adamw(module, dtype, features, None, shape=shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slice_type", ["column", "row", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_slice_grad_adamw_against_float64(name, dtype, slice_type, transposed):
    rows = None if slice_type == "column" else torch.tensor([2, 3, 20])
    cols = None if slice_type == "row" else torch.arange(9, 25)
    masters, _, moments, squares, weights = make_slices(dtype, [(rows, cols), (rows, cols)])
    master, moment, square, weight = (
        group[transposed] for group in (masters, moments, squares, weights)
    )
    before = weight.clone()
    wide = torch.randn(70, 50).to(dtype)
    grad_output, input = torch.randn(70, 23).to(dtype)[:, 1:22], wide[:, :33]  # strided
    input = input if cols is None else input[:, cols]
    exact = [t.double() for t in (master, moment, square)]
    step, options = torch.tensor(3.0), AdamWOptions(**HYPERPARAMETERS)
    place = (rows, cols, step)
    truth = AdamWSlice(exact[0], None, *exact[1:], weight.double(), *place)
    reference.slice_grad_adamw(grad_output.double(), input.double(), truth, options)
    with ops.use_backend(name):
        found = AdamWSlice(master, None, moment, square, weight, *place)
        ops.slice_grad_adamw(grad_output, input, found, options)
    for mine, theirs in zip((master, moment, square), exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-6)
    assert torch.equal(read_slice(weight, rows, cols), master.to(dtype))
    outside = torch.ones(weight.shape, dtype=torch.bool)
    write_slice(outside, rows, cols, torch.zeros(master.shape, dtype=torch.bool))
    assert torch.equal(weight[outside], before[outside])
    base = weight._base
    assert base is not None and int(base.isnan().sum()) == base.numel() - weight.numel()


@pytest.mark.parametrize("slice_type", ["column", "row", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_slice_grad_adamw_is_the_two_others_in_one(name, dtype, slice_type):
    rows = None if slice_type == "column" else torch.tensor([2, 3, 20])
    cols = None if slice_type == "row" else torch.arange(9, 25)
    (master,), _, (moment,), (square,), (weight,) = make_slices(dtype, [(rows, cols)])
    grad_output, input = torch.randn(70, 21).to(dtype), torch.randn(70, 33).to(dtype)
    input = input if cols is None else input[:, cols]
    fused, apart = ([t.clone() for t in (master, moment, square)] for _ in range(2))
    fused_weight, weight = weight.clone(), weight.clone()
    place = (rows, cols, torch.tensor(3.0))
    options = AdamWOptions(**HYPERPARAMETERS, seed=99)
    with ops.use_backend(name):
        active = AdamWSlice(fused[0], None, *fused[1:], fused_weight, *place)
        ops.slice_grad_adamw(grad_output, input, active, options)
        grad = ops.slice_grad(grad_output, input, rows)
        ops.slice_adamw([AdamWSlice(apart[0], grad, *apart[1:], weight, *place)], options)
    for a, b in zip(fused, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        fused_weight, weight, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("slice_type", ["column", "row", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_splits_tokens_and_the_last_arriver_adds_them_up(
    monkeypatch, dtype, slice_type
):
    """Three splits of each tile, poisoned workspace: the gradient is right, the update follows it,
    the tickets end at zero.
    """
    from slicefine_kernels import launch

    n, out, width, used = 1100, 21, 33, []
    rows = None if slice_type == "column" else torch.tensor([2, 3, 20])
    cols = None if slice_type == "row" else torch.arange(9, 25)
    (master,), _, (moment,), (square,), (weight,) = make_slices(dtype, [(rows, cols)])

    def workspace(device):
        used.append(
            (
                torch.full((launch.workspace_floats(4),), float("nan")),
                torch.zeros(4, dtype=torch.int32),
            )
        )
        return used[-1]

    monkeypatch.setattr(launch, "workspace", workspace)
    grad_output, input = torch.randn(n, out).to(dtype), torch.randn(n, width).to(dtype)
    input = input if cols is None else input[:, cols]
    place, options = (rows, cols, torch.tensor(3.0)), AdamWOptions(**HYPERPARAMETERS)
    active = lambda state, weight: AdamWSlice(state[0], None, *state[1:], weight, *place)
    with ops.use_backend("triton"):
        first, second = (ops.slice_grad(grad_output, input, rows) for _ in range(2))
        assert torch.equal(first, second) and len(used) == 2
        chosen = grad_output if rows is None else grad_output[:, rows]
        exact = reference.slice_grad(grad_output.double(), input.double(), rows)
        assert_as_good_as_torch(first, exact, chosen.float().t() @ input.float())
        state = [t.clone() for t in (master, moment, square)]
        ops.slice_grad_adamw(grad_output, input, active(state, weight), options)
    expected = [t.double() for t in (master, moment, square)]
    reference.slice_grad_adamw(
        grad_output.double(), input.double(), active(expected, weight.double()), options
    )
    for mine, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=1e-4)
    assert torch.equal(read_slice(weight, rows, cols), state[0].to(dtype))
    for partials, tickets in used:
        assert tickets.tolist() == [0] * 4 and not bool(
            partials[0].isnan()
        )  # it was used, and left as it was found


def test_stochastic_rounding_is_unbiased_and_only_picks_neighbors():
    value = torch.full((40_000,), 1.0 + 0.3 * 2**-7)  # 30 % of the way to the next bfloat16
    rounded = reference.round_to(value, torch.bfloat16, seed=5).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((rounded > 1).float().mean().item() - 0.3) < 0.01  # four standard errors
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    assert torch.equal(
        reference.round_to(special, torch.bfloat16, seed=5)[1:],
        special[1:].to(torch.bfloat16),
    )


def test_philox_matches_the_published_vector():
    # Random123's known-answer test for philox4x32-10 with zero key and counter
    assert hex(int(reference.philox(0, torch.tensor([0]), 0))) == "0x6627e8d5"


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 3])])
def test_opcheck(rows):
    grad_output, input = torch.randn(6, 5), torch.randn(6, 4)
    torch.library.opcheck(torch.ops.slicefine.slice_grad, (grad_output, input, rows))
    R = 5 if rows is None else 2
    tensors = lambda: [torch.rand(R, 4) for _ in range(3)]
    weight, cols, step = torch.randn(5, 9), torch.arange(4), torch.tensor(1.0)
    torch.library.opcheck(
        torch.ops.slicefine.slice_grad_adamw,
        (
            grad_output,
            input,
            *tensors(),
            weight,
            rows,
            cols,
            step,
            *HYPERPARAMETERS.values(),
        ),
    )
    p, m, v = tensors()
    lists = ([p], [torch.rand(R, 4)], [m], [v], [weight], [rows], [cols], [step])
    torch.library.opcheck(
        torch.ops.slicefine.slice_adamw, (*lists, *HYPERPARAMETERS.values())
    )


def test_a_write_is_seen_by_autograd():
    weight = torch.randn(3, 4)
    x = torch.randn(2, 4, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    state = [torch.zeros(3, 2) for _ in range(3)]
    place = (weight, None, torch.arange(2), torch.tensor(1.0))
    active = AdamWSlice(state[0], torch.ones(3, 2), *state[1:], *place)
    ops.slice_adamw([active], AdamWOptions(**HYPERPARAMETERS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_errors_name_what_was_given_and_expected():
    with pytest.raises(
        ValueError, match=r"grad_output has shape \(3, 4\) and input \(2, 5\)"
    ):
        ops.slice_grad(torch.randn(3, 4), torch.randn(2, 5))
    with pytest.raises(TypeError, match="expected one dtype"):
        ops.slice_grad(torch.randn(3, 4), torch.randn(3, 5).half())
    place = (torch.randn(3, 4), None, torch.arange(2), torch.tensor(1.0))
    update = lambda t: ops.slice_adamw(
        [AdamWSlice(t, t, t, t, *place)], AdamWOptions(**HYPERPARAMETERS)
    )
    with pytest.raises(ValueError, match=r"has shape \(3, 2\); got master \(2, 2\)"):
        update(torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"must be torch\.float32; got torch\.float16"):
        update(torch.zeros(3, 2).half())


def test_an_op_inside_autocast_still_accumulates_in_float32():
    grad_output, input = torch.randn(64, 5), torch.randn(64, 4)
    for name in ("reference", "cpu"):
        with ops.use_backend(name), torch.autocast("cpu", dtype=torch.bfloat16):
            result = ops.slice_grad(grad_output, input)
        torch.testing.assert_close(result, grad_output.t() @ input)


@pytest.fixture
def environment(monkeypatch):
    """name -> SLICEFINE_BACKEND as a process has it that starts with it: it is read once."""

    def ask(name):
        (
            monkeypatch.setenv("SLICEFINE_BACKEND", name)
            if name
            else monkeypatch.delenv("SLICEFINE_BACKEND")
        )
        forget()

    def forget():
        select._environments_name.cache_clear()
        select._chosen.clear()
        select._compiled.clear()

    yield ask
    monkeypatch.undo()
    forget()


def test_an_unknown_backend_lists_those_that_exist(environment):
    with (
        pytest.raises(
            ValueError, match="no backend 'cuda13'; expected one of reference, cpu, triton"
        ),
        ops.use_backend("cuda13"),
    ):
        pass
    environment("fast")
    with pytest.raises(ValueError, match="SLICEFINE_BACKEND: no backend 'fast'"):
        ops.slice_grad(torch.randn(3, 4), torch.randn(3, 5))


def test_a_forced_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", "it was not built")
    with (
        ops.use_backend("cpu"),
        pytest.raises(
            RuntimeError, match=r"'cpu' was asked for.*\n.*\n  cpu: it was not built"
        ),
    ):
        ops.slice_grad(torch.randn(3, 4), torch.randn(3, 5))
    assert ops.slice_grad(torch.randn(3, 4), torch.randn(3, 5)).shape == (
        4,
        5,
    )  # chosen freely, the reference runs


def test_a_dtype_that_a_backend_lacks():
    with (
        ops.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"triton: it takes .*, not torch\.float64"),
    ):
        ops.slice_grad(torch.randn(3, 4).double(), torch.randn(3, 5).double())


def test_the_environment_variable_chooses(environment):
    environment("reference")
    assert select.backend_for("cpu", {torch.float32}) is reference
    environment(None)
    assert select.backend_for("cpu", {torch.float32}) is cpu


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_arguments_that_would_be_memory_faults_are_refused(name):
    p, w, step = torch.zeros(3, 2), torch.zeros(3, 4), torch.tensor(1.0)
    options = AdamWOptions(**HYPERPARAMETERS)
    update = lambda cols: ops.slice_adamw(
        [AdamWSlice(p, p, p, p, w, None, cols, step)], options
    )
    with ops.use_backend(name):
        with pytest.raises(
            TypeError,
            match=r"cols is torch\.int32 of shape \(2,\) on cpu; expected \(features,\) int64",
        ):
            update(torch.arange(2, dtype=torch.int32))
        with pytest.raises(TypeError, match=r"rows is torch\.int32"):
            ops.slice_grad(
                torch.randn(5, 3), torch.randn(5, 2), torch.arange(2, dtype=torch.int32)
            )
        with pytest.raises(ValueError, match=r"input: only the columns of the slice"):
            active = AdamWSlice(
                p, None, p.clone(), p.clone(), w, None, torch.arange(2), step
            )
            ops.slice_grad_adamw(torch.randn(5, 3), torch.randn(5, 4), active, options)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("cols", [[0], [7, 8, 9], [12, 13], [1, 4, 11], list(range(14))])
@pytest.mark.parametrize("layout", ["whole", "rows", "transposed", "empty"])
def test_columns_are_taken_bit_for_bit(dtype, cols, layout):
    whole = torch.randn(3, 5, 14).to(dtype)
    whole[0, 0] = torch.nan
    made = {
        "whole": whole,
        "rows": torch.randn(6, 5, 30).to(dtype)[::2, :, 3:17],
        "empty": whole[:0],
        "transposed": torch.randn(3, 14, 5).to(dtype).transpose(1, 2),
    }
    input, index = made[layout], torch.tensor(cols)
    found = cpu.take_columns(input, index)
    assert found.shape == (input.shape[0] * 5, len(cols)) and found.is_contiguous()
    torch.testing.assert_close(
        found, input[..., index].reshape(-1, len(cols)), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(ops.take_columns(input, index).nan_to_num(), found.nan_to_num())


@pytest.mark.parametrize("width", [8, 16, 24, 20])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_a_thin_operand_is_read_in_place_or_packed_alike(n, width):
    """A contiguous X[:, S] whose width is a multiple of the kernel's eight is not packed; a view of
    a wider X is.
    """
    dy, x = torch.randn(n, 70), torch.randn(n, width)
    wider = torch.cat([torch.full((n, 3), torch.nan), x, torch.full((n, 5), torch.nan)], 1)[
        :, 3 : 3 + width
    ]
    with ops.use_backend("cpu"):
        assert torch.equal(ops.slice_grad(dy, x), ops.slice_grad(dy, wider))
    exact = dy.double().t() @ x.double()
    assert (ops.slice_grad(dy, x).double() - exact).abs().max() <= 1e-6 * n**0.5 * 4


def test_the_short_way_to_a_backend_is_taken_only_where_nothing_watches():
    dy, x = torch.randn(6, 5), torch.randn(6, 3)
    ops.slice_grad(dy, x)  # the first op chooses the backend
    assert select.direct(x) is cpu
    with ops.use_backend("reference"):
        assert select.direct(x) is None
    with TorchDispatchMode():
        assert select.direct(x) is None
    with FakeTensorMode() as mode:
        assert select.direct(mode.from_tensor(x)) is None
    with torch.profiler.profile() as found:
        ops.slice_grad(dy, x)
    assert any(event.key == "slicefine::slice_grad" for event in found.key_averages())


def test_available_backends_gives_none_or_the_reason(monkeypatch):
    from slicefine import available_backends

    found = available_backends()
    assert found.keys() == {"reference", "cpu", "triton", "cuda"}
    assert found["reference"] is None and found["cpu"] is None
    if not torch.cuda.is_available():
        assert found["cuda"] is not None and (
            "GPU" in found["cuda"] or "_CUDA" in found["cuda"]
        )
    monkeypatch.setattr(cpu, "unavailable", "it was not built")
    assert available_backends()["cpu"] == "it was not built"
