"""The CUDA kernels without a GPU: the real csrc/*.cu run on the host by tests/ops/cuda_on_host.h,
and compiled for every target.

On a machine with a GPU, benchmarks/gpu is what runs them there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cuda_resources
from slicefine.backends import cuda, reference, select
from slicefine.backends.operands import AdamWOptions, AdamWSlice, AdamWSlice8bit
from slicefine.slices import read_slice, write_slice
from tests.ops import test_ops
from tests.ops import test_slice_adamw_8bit as test_8bit

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
H100, ONE = 132, 1  # processors: with one, no tile is split


def build(
    folder: Path, source: Path, units: tuple[str, ...] = cuda_resources.UNITS
) -> Path:
    """_CUDA for the host: the .cu files by g++ through the emulator, and the bindings as they are."""
    common = ["g++", "-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{source}"]
    python = [
        f"-I{sysconfig.get_paths()['include']}",
        f"-I{Path(torch.__file__).parent / 'include'}",
    ]
    emulator = ["-x", "c++", "-include", str(ROOT / "tests" / "ops" / "cuda_on_host.h")]
    macros = ['-DSLICEFINE_VERSION="test"', '-DSLICEFINE_CUDA_ARCHS="host"']
    objects = folder / "bindings.o"
    if not objects.exists():
        subprocess.run(
            [*common, *python, *macros, "-c", source / "bindings_cuda.cpp", "-o", objects],
            check=True,
        )
    for unit in units:
        subprocess.run(
            [
                *common,
                "-O1",
                *emulator,
                "-c",
                source / f"{unit}.cu",
                "-o",
                folder / f"{unit}.o",
            ],
            check=True,
        )
    module = folder / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *folder.glob("*.o"), "-o", module], check=True)
    return module


def load(path: Path):
    # pybind11 keeps one module per name; the package in front of it tells several builds apart
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._CUDA", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def host_module(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated kernels")
    return load(build(tmp_path_factory.mktemp("cuda_on_host"), ROOT / "csrc"))


class Emulated:
    """A stream of an emulated GPU: how many processors it has, and its workspace with sentinels
    behind it.
    """

    SENTINELS = 64

    def __init__(self, module) -> None:
        self.module, self.processors = module, H100

    def workspace(self, launch):
        values = self.module.workspace_values(self.processors)
        counters = self.module.workspace_counters(self.processors)
        self.partials = torch.full((values + self.SENTINELS,), float("nan"))
        self.counters = torch.zeros(counters + self.SENTINELS, dtype=torch.int32)
        return self.partials, self.counters

    def splits_were_added(self) -> bool:
        return bool(self.partials.isfinite().any())

    def check(self) -> None:
        """Nothing behind the workspace was written and the counters are ready for the next call."""
        assert self.partials[-self.SENTINELS :].isnan().all() and not self.counters.any()


@pytest.fixture
def gpu(host_module, monkeypatch):
    """The `cuda` backend on CPU tensors."""
    emulated = Emulated(host_module)
    monkeypatch.setattr(cuda, "_CUDA", host_module)
    monkeypatch.setattr(cuda, "unavailable", None)
    monkeypatch.setattr(cuda, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "_launch", lambda tensor: (0, 0, emulated.processors))
    monkeypatch.setattr(cuda, "_workspace", emulated.workspace)
    backend = dataclasses.replace(select.BACKENDS["cuda"], devices=lambda: ("cuda", "cpu"))
    monkeypatch.setitem(select.BACKENDS, "cuda", backend)
    return emulated


def surrounded(values: torch.Tensor, pad: int, offset: int) -> torch.Tensor:
    """The same values with a longer row stride, NaN all around."""
    buffer = torch.full(
        (values.shape[0] + 2, values.shape[1] + pad + offset),
        float("nan"),
        dtype=values.dtype,
    )
    view = buffer[1:-1, offset : offset + values.shape[1]]
    return view.copy_(values)


# (n, out, K, rows): column, row and block slices; aligned copies, single values; borders on both
# sides of a tile
SHAPES = {
    "column r=16": (129, 256, 16, None),
    "column r=1": (63, 129, 1, None),
    "column r=24": (65, 136, 24, None),
    "column r=129": (33, 130, 129, None),
    "row r=16, side by side": (129, 64, 256, torch.arange(16, 32)),
    "row r=3, misaligned": (63, 64, 129, torch.arange(5, 8)),
    "row r=17, scattered": (65, 200, 130, torch.randperm(200)[:17]),
    "block 16 x 8": (129, 64, 8, torch.arange(48, 64)),
    "block 70 x 70": (31, 129, 70, torch.randperm(129)[:70]),
    "full": (40, 65, 65, None),
    "one": (1, 1, 1, None),
}


@pytest.mark.parametrize("strides", ["dense", "surrounded", "odd"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slice_grad(gpu, dtype, shape, strides):
    n, out, width, rows = SHAPES[shape]
    grad_output, input = torch.randn(n, out).to(dtype), torch.randn(n, width).to(dtype)
    if strides != "dense":  # surrounded: still 16-byte aligned where the width is
        pad, offset = (64, 8) if strides == "surrounded" else (3, 1)
        grad_output, input = (
            surrounded(grad_output, pad, offset),
            surrounded(input, pad, offset),
        )
    exact = reference.slice_grad(grad_output.double(), input.double(), rows)
    plain = reference.slice_grad(grad_output, input, rows)
    test_ops.assert_as_good_as_torch(
        cuda.slice_grad(grad_output, input, rows), exact, plain
    )
    gpu.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_give_zeros(gpu, dtype):
    result = cuda.slice_grad(
        torch.empty(0, 40, dtype=dtype), torch.empty(0, 3, dtype=dtype)
    )
    assert torch.equal(result, torch.zeros(40, 3))


@pytest.mark.parametrize("width", [16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_blocks_and_threads_changes_no_bit(gpu, dtype, width, monkeypatch):
    grad_output, input = (
        torch.randn(1000, 200).to(dtype),
        torch.randn(1000, width).to(dtype),
    )
    result = cuda.slice_grad(grad_output, input)
    assert gpu.splits_were_added()
    exact, plain = (
        reference.slice_grad(a, b)
        for a, b in ((grad_output.double(), input.double()), (grad_output, input))
    )
    test_ops.assert_as_good_as_torch(result, exact, plain)
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("SLICEFINE_EMULATOR_SEED", seed)
        assert torch.equal(cuda.slice_grad(grad_output, input), result)
        gpu.check()
    monkeypatch.delenv("SLICEFINE_EMULATOR_SEED")
    gpu.processors = ONE
    test_ops.assert_as_good_as_torch(cuda.slice_grad(grad_output, input), exact, plain)
    assert not gpu.splits_were_added()


@test_ops.relaxed
@given(
    st.integers(0, 700),
    st.sampled_from([1, 15, 130, 300]),
    st.sampled_from([1, 16, 17, 70]),
    st.integers(1, 300),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_tokens_and_processors(gpu, dtype, n, out, width, processors):
    """Every token once: within the bound of a float32 sum in any order, n 2^-24 |dY|^T |X|, where
    one token weighs far more.
    """
    gpu.processors = processors
    grad_output, input = torch.randn(n, out).to(dtype), torch.randn(n, width).to(dtype)
    exact = reference.slice_grad(grad_output.double(), input.double())
    bound = (
        n * 2**-24 * reference.slice_grad(grad_output.double().abs(), input.double().abs())
    )
    assert ((cuda.slice_grad(grad_output, input) - exact).abs() <= bound).all()
    gpu.check()


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("width", [16, 70])
def test_tf32_only_where_torch_allows_it(gpu, width):
    grad_output, input = torch.randn(129, 136), torch.randn(129, width)
    rounded = [to_tf32(t) for t in (grad_output, input)]
    exact, plain = (
        reference.slice_grad(*(t.double() for t in rounded)),
        reference.slice_grad(*rounded),
    )
    precise = cuda.slice_grad(grad_output, input)
    with pytest.raises(AssertionError):
        test_ops.assert_as_good_as_torch(precise, exact, plain)
    before, torch.backends.cuda.matmul.fp32_precision = (
        torch.backends.cuda.matmul.fp32_precision,
        "tf32",
    )
    try:
        test_ops.assert_as_good_as_torch(cuda.slice_grad(grad_output, input), exact, plain)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# The tests of every backend


def test_slice_grad_like_every_backend(gpu):
    test_ops.test_slice_grad(name="cuda")
    gpu.check()


@pytest.mark.parametrize("seed", [None, 2**40 + 12345])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slice_adamw_like_every_backend(gpu, dtype, seed):
    test_ops.test_slice_adamw("cuda", dtype, seed)


def test_slice_adamw_anywhere_like_every_backend(gpu):
    test_ops.test_slice_adamw_anywhere(name="cuda")


@pytest.mark.parametrize("seed", [None, 2**40 + 12345])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slice_adamw_8bit_like_every_backend(gpu, dtype, seed):
    test_8bit.test_slice_adamw_8bit("cuda", dtype, seed)


def test_slice_adamw_8bit_anywhere_like_every_backend(gpu):
    test_8bit.test_slice_adamw_8bit_anywhere(name="cuda")


def test_8bit_codes_are_the_nearest_like_every_backend(gpu):
    test_8bit.test_codes_are_the_nearest_over_the_whole_range("cuda")


@pytest.mark.parametrize("slice_type", ["column", "row", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slice_grad_adamw_like_every_backend(gpu, dtype, slice_type):
    for transposed in (False, True):
        test_ops.test_slice_grad_adamw_against_float64(
            "cuda", dtype, slice_type, transposed
        )
    test_ops.test_slice_grad_adamw_is_the_two_others_in_one("cuda", dtype, slice_type)
    gpu.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slice_type", ["column", "row"])
def test_slice_grad_adamw_over_many_splits(gpu, dtype, slice_type, monkeypatch):
    """The last block of each tile updates the slice: bit-equal in every order, and to the two ops
    apart; rounding by the oracle's bits.
    """
    features = (
        (None, torch.randperm(150)[:16])
        if slice_type == "column"
        else (torch.arange(8, 24), None)
    )
    grad_output, input = torch.randn(700, 140).to(dtype), torch.randn(700, 150).to(dtype)
    input = input if features[1] is None else input[:, features[1]].contiguous()
    step, options = torch.tensor(5.0), AdamWOptions(**test_ops.HYPERPARAMETERS, seed=77)
    results = []
    for seed in ("0", "1"):
        monkeypatch.setenv("SLICEFINE_EMULATOR_SEED", seed)
        (master,), _, (moment,), (square,), (weight,) = test_ops.make_slices(
            dtype, [features], (140, 150)
        )
        before = weight.clone()
        active = AdamWSlice(master, None, moment, square, weight, *features, step)
        cuda.slice_grad_adamw(grad_output, input, active, options)
        assert gpu.splits_were_added()
        gpu.check()
        assert torch.equal(
            read_slice(weight, *features), reference.round_to(master, dtype, 77, 0)
        )
        write_slice(weight, *features, read_slice(before, *features))
        assert torch.equal(weight, before)  # nothing outside the slice
        results.append((master, moment, square))
    (master,), _, (moment,), (square,), (weight,) = test_ops.make_slices(
        dtype, [features], (140, 150)
    )
    grad = cuda.slice_grad(grad_output, input, features[0])
    active = AdamWSlice(master, grad, moment, square, weight, *features, step)
    cuda.slice_adamw([active], options)
    for a, b, apart in zip(*results, (master, moment, square), strict=True):
        assert torch.equal(a, b) and torch.equal(a, apart)


def test_more_slices_than_one_launch_holds(gpu):
    features = [(None, torch.tensor([i % 5])) for i in range(650)]
    test_ops.check_adamw(cuda, torch.bfloat16, features, seed=3, shape=(3, 5))
    test_8bit.check_8bit("cuda", torch.bfloat16, features, seed=3, shape=(3, 5))


def test_8bit_is_the_same_bits_in_every_order_and_at_every_address(gpu, monkeypatch):
    """Blocks, warps and lanes in any order; tensors one element off the 16 bytes, sentinels on both
    sides of them.
    """
    book, R, K = (
        reference.dynamic_codebook(),
        37,
        61,
    )  # 2257 elements: two blocks of the launch, a quantum of 209
    values = torch.randn(R, K), torch.randn(R, K), torch.randn(R, K), torch.rand(R, K)
    results = []
    for offset, seed in ((0, None), (1, "1"), (2, "2"), (3, "3")):
        if seed:
            monkeypatch.setenv("SLICEFINE_EMULATOR_SEED", seed)
        m, ms = reference.quantize_blockwise(values[2], book[0])
        v, vs = reference.quantize_blockwise(values[3], book[1])
        buffers = [
            torch.full((t.numel() + 8,), 77, dtype=t.dtype)
            for t in (values[0], values[1], m, v, ms, vs)
        ]
        master, grad, m, v, ms, vs = (
            buffer[offset : offset + t.numel()].view(t.shape).copy_(t)
            for buffer, t in zip(buffers, (values[0], values[1], m, v, ms, vs), strict=True)
        )
        weight = torch.zeros(R, K, dtype=torch.bfloat16)
        place = (weight, None, None, torch.tensor(5.0))
        active = AdamWSlice8bit(master, grad, m, v, ms, vs, *place)
        options = AdamWOptions(**test_ops.HYPERPARAMETERS, seed=77)
        cuda.slice_adamw_8bit([active], book, options)
        results.append([t.clone() for t in (master, m, v, ms, vs, weight)])
        for buffer, t in zip(buffers, (master, grad, m, v, ms, vs), strict=True):
            assert (buffer[:offset] == 77).all() and (
                buffer[offset + t.numel() :] == 77
            ).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_8bit_zeros_stay_zeros_and_a_nan_shows(gpu):
    """A quantum without a gradient beside one with a NaN in it: the scale tells, as the reference's
    does.
    """
    book, grad = reference.dynamic_codebook(), torch.zeros(3, 256)
    grad[1, 7], grad[2, 3] = float("nan"), 2.0
    states = {}
    for module in (reference, cuda):
        codes, scales = (
            [torch.zeros(3, 256, dtype=torch.uint8) for _ in range(2)],
            [torch.zeros(3) for _ in range(2)],
        )
        place = (torch.zeros(3, 256), None, None, torch.tensor(1.0))
        active = AdamWSlice8bit(torch.ones(3, 256), grad, *codes, *scales, *place)
        module.slice_adamw_8bit([active], book, AdamWOptions(**test_ops.HYPERPARAMETERS))
        states[module] = [
            reference.dequantize_blockwise(*pair)
            for pair in zip(codes, scales, book, strict=True)
        ]
    for mine, theirs in zip(states[cuda], states[reference], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0, equal_nan=True)
        assert not mine[0].any() and mine[1].isnan().all() and mine[2, 3] != 0


# Errors


def test_a_failed_launch_names_the_op_and_the_call(gpu, monkeypatch):
    monkeypatch.setenv("SLICEFINE_EMULATOR_FAIL", "1")
    with pytest.raises(
        RuntimeError,
        match="slice_grad: kernel launch failed: invalid configuration argument",
    ):
        cuda.slice_grad(torch.randn(3, 4), torch.randn(3, 5))


class NoLaunch:
    """Stands where the compiled module is; a call would fail the test."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was called")


@pytest.fixture
def no_launch(monkeypatch):
    monkeypatch.setattr(cuda, "_CUDA", NoLaunch())


ANY = AdamWOptions(1.0, 0.0, 0.0, 0.0, 0.0)


def adamw_8bit(codebook: torch.Tensor | None = None, **states: torch.Tensor) -> None:
    """slice_adamw_8bit of one 4 x 4 slice, of good tensors but for those that are named."""
    two, codes, scale = (
        torch.randn(4, 4),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(1),
    )
    good = {
        "exp_avg": codes,
        "exp_avg_sq": codes,
        "exp_avg_scale": scale,
        "exp_avg_sq_scale": scale,
    }
    place = (two, None, None, torch.tensor(1.0))
    active = AdamWSlice8bit(two, two, *(good | states).values(), *place)
    book = reference.dynamic_codebook() if codebook is None else codebook
    cuda.slice_adamw_8bit([active], book, ANY)


def test_a_wrong_device_is_refused_before_a_launch(no_launch):
    two, one = torch.randn(3, 4), torch.tensor(1.0)
    with pytest.raises(
        ValueError,
        match="slice_grad: grad_output is on cpu; the cuda backend takes tensors on a CUDA",
    ):
        cuda.slice_grad(two, two)
    with pytest.raises(ValueError, match="slice_adamw: weight is on cpu"):
        cuda.slice_adamw([AdamWSlice(two, two, two, two, two, None, None, one)], ANY)
    with pytest.raises(ValueError, match="slice_grad_adamw: grad_output is on cpu"):
        active = AdamWSlice(two, None, two, two, two, None, None, one)
        cuda.slice_grad_adamw(two, two, active, ANY)
    with pytest.raises(ValueError, match="slice_adamw_8bit: weight is on cpu"):
        adamw_8bit()


def test_types_and_strides_are_refused_before_a_launch(no_launch, monkeypatch):
    monkeypatch.setattr(cuda, "_on_gpu", lambda tensor: True)
    two, one = torch.randn(4, 4), torch.tensor(1.0)
    with pytest.raises(
        TypeError,
        match=r"grad_output is torch\.float64; the cuda backend takes torch\.float32",
    ):
        cuda.slice_grad(two.double(), two.double())
    with pytest.raises(
        ValueError,
        match=r"rows is torch\.int32 with strides \(1,\); expected a contiguous int64",
    ):
        cuda.slice_grad(two, two, torch.arange(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rows is torch\.int64 with strides \(2,\)"):
        cuda.slice_grad(two, two, torch.arange(4)[::2])
    adamw = lambda master, step: cuda.slice_adamw(
        [AdamWSlice(master, two, two, two, two, None, None, step)], ANY
    )
    with pytest.raises(
        ValueError,
        match=r"master is torch\.float32 on cpu with strides \(1, 4\).*expected contiguous",
    ):
        adamw(two.t(), one)
    with pytest.raises(ValueError, match=r"step is torch\.int64"):
        adamw(two, torch.tensor(1))
    with pytest.raises(
        ValueError, match=r"exp_avg is torch\.float32 on cpu .* expected contiguous uint8"
    ):
        adamw_8bit(exp_avg=two)
    with pytest.raises(
        ValueError, match=r"exp_avg_sq is torch\.uint8 on cpu with strides \(1, 4\)"
    ):
        adamw_8bit(exp_avg_sq=torch.zeros(4, 4, dtype=torch.uint8).t())
    with pytest.raises(
        ValueError, match=r"exp_avg_scale is torch\.float64 .* expected contiguous float32"
    ):
        adamw_8bit(exp_avg_scale=torch.zeros(1).double())
    with pytest.raises(
        ValueError, match=r"the codebook has shape \(256,\); expected \(2, 256\)"
    ):
        adamw_8bit(codebook=torch.zeros(256))
    with pytest.raises(ValueError, match=r"codebook is torch\.float64 on cpu"):
        adamw_8bit(codebook=torch.zeros(2, 256).double())


def test_an_old_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    cuda._too_old.cache_clear()
    try:
        assert (
            cuda.refuses_a_device()
            == "Tesla T4 has compute capability 7.5; the cuda backend needs 8.0 or newer"
        )
    finally:
        cuda._too_old.cache_clear()


def test_without_a_compiler_triton_leaves_a_gpu_to_cuda(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda, "unavailable", None)
    select._load_triton.cache_clear()
    try:
        assert "triton needs a C compiler when it runs" in (
            select.BACKENDS["triton"].refusal("cuda", {torch.float32}) or ""
        )
        assert select.backend_for("cuda", {torch.bfloat16}) is cuda
        assert select.backend_for("cuda", {torch.float64}) is reference
    finally:
        select._load_triton.cache_clear()


def test_the_built_module_imports_without_a_driver():
    if cuda._CUDA is None:
        pytest.skip(cuda.unavailable or "")
    assert cuda._CUDA.workspace_values(132) == 2 * 132 * 128 * 64  # 8.25 MiB on an H100


# Would the tests notice?

FAULTS = {
    "a barrier left out": (
        "gradient_tile.cuh",
        "    __syncthreads();  // this stage has arrived",
        "    // ",
    ),
    "a wait left out": ("gradient_tile.cuh", "    cp_async_wait<Tile::kStages - 2>();", ""),
    "a fragment transposed": (
        "multiply.cuh",
        "matrix / 2 * 8 + row) * PitchA + i * 16 + matrix % 2",
        "matrix % 2 * 8 + row) * PitchA + i * 16 + matrix / 2",
    ),
    "sums in the order of arrival": (
        "gradient_tile.cuh",
        "work.split) * Accumulators",
        "(work.split + 1) % a.plan.splits) * Accumulators",
    ),
    "counters left": ("gradient_tile.cuh", "a.counters[work.tile] = 0;", ";"),
}


# none of them writes further than the sentinels of the tests reach
FAULTS_8BIT = {
    "books not waited for": (
        "slice_adamw_8bit.cu",
        "  __syncthreads();\n  if (!exists)",
        "  if (!exists)",
    ),
    "a scale for every lane": (
        "slice_adamw_8bit.cu",
        "__reduce_max_sync(0xFFFFFFFFu, largest)",
        "largest",
    ),
    "a reduction by some lanes": (
        "slice_adamw_8bit.cu",
        "  if (!exists) return;",
        "  if (!exists || valid_of(0) == 0) return;",
    ),
    "midpoints off the middle": (
        "slice_adamw_8bit.cu",
        "codebook[i - 1] + value) * 0.5f",
        "codebook[i - 1] + value) * 0.52f",
    ),
    "codes behind the slice": (
        "slice_adamw_8bit.cu",
        "v_codes.word[j], valid, words &&",
        "v_codes.word[j], valid ? 4 : 0, words &&",
    ),
}


def build_with(fault: tuple[str, str, str], unit: str, folder: Path, healthy: Path):
    """The module with one unit compiled from sources with a fault: (file, text, what stands there
    instead).
    """
    name, old, new = fault
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / name).read_text()
    assert text.count(old) == 1
    (sources / name).write_text(text.replace(old, new))
    for other in ("bindings", *cuda_resources.UNITS):
        if other != unit:
            shutil.copy(healthy / f"{other}.o", folder)
    return load(build(folder, sources, (unit,)))


@pytest.mark.parametrize("fault", FAULTS_8BIT)
def test_the_8bit_tests_would_notice(gpu, fault, tmp_path, monkeypatch):
    faulty = build_with(
        FAULTS_8BIT[fault], "slice_adamw_8bit", tmp_path, Path(gpu.module.__file__).parent
    )
    monkeypatch.setattr(cuda, "_CUDA", faulty)
    with pytest.raises((AssertionError, RuntimeError)):
        test_8bit_is_the_same_bits_in_every_order_and_at_every_address(gpu, monkeypatch)
        test_8bit.test_slice_adamw_8bit("cuda", torch.bfloat16, None)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_would_notice(gpu, fault, tmp_path, monkeypatch):
    faulty = build_with(
        FAULTS[fault], "slice_grad", tmp_path, Path(gpu.module.__file__).parent
    )
    monkeypatch.setenv("SLICEFINE_EMULATOR_SEED", "4")
    grad_output, input = torch.randn(500, 160).bfloat16(), torch.randn(500, 16).bfloat16()
    healthy = cuda.slice_grad(grad_output, input)
    monkeypatch.setattr(cuda, "_CUDA", faulty)
    try:
        result = cuda.slice_grad(grad_output, input)
    except RuntimeError as error:
        assert "emulated GPU" in str(error)
        return
    assert not torch.equal(result, healthy) or gpu.counters.any()


# Compiled for GPUs that are not here


@pytest.mark.slow
@pytest.mark.skipif(cuda_resources.find_nvcc() is None, reason="no CUDA toolkit")
def test_no_kernel_spills():
    found = cuda_resources.rows(["sm_80", "sm_90", "sm_100", "sm_120"])
    print("\n" + cuda_resources.table(found))
    assert len(found) == 4 * (
        2 * 4 * 2 + 2
    )  # targets x (2 ops x 4 kinds of arithmetic x 2 tiles + 2 of AdamW alone)
    assert [r for r in found if r["spill_bytes"]] == []
    assert [
        r for r in found if r["shared_bytes"] > 1024 * cuda_resources.SHARED_KB[r["target"]]
    ] == []
    # two blocks of a gradient kernel fit a processor, four of the others: registers (65,536 of
    # them) and shared memory
    for r in found:
        if r["kernel"] in ("slice_adamw", "slice_adamw_8bit"):
            assert 4 * 256 * r["registers"] <= 65536
        else:
            assert 2 * 128 * r["registers"] <= 65536
            assert 2 * r["shared_bytes"] <= 1024 * cuda_resources.SHARED_KB[r["target"]]


def test_kernel_names_are_short():
    symbol = "_ZN9slicefine4cuda43_GLOBAL__N__7b9f15gradient_kernelINS0_7HalfMmaINS_4bf16EEELi16ENS0_13StoreGradientEEEvNS0_13GradArgumentsET1_"
    assert cuda_resources.describe(symbol, "slice_grad") == (
        "slice_grad",
        "bf16 mma, 128x16",
    )
    assert cuda_resources.describe(
        "_ZN9slicefine4cudaL18slice_adamw_kernelENS0_10SliceTableE", "slice_adamw"
    ) == (
        "slice_adamw",
        "all dtypes",
    )
