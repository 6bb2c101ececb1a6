"""What the Triton kernels really load, store and multiply, counted in the interpreter, against the
model of kernels/README.md.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

interpreter = pytest.importorskip("triton.runtime.interpreter")

from slicefine_kernels import launch
from slicefine_kernels.configs import grad_config, token_splits

from slicefine import ops
from slicefine.backends import reference
from slicefine.backends.operands import AdamWOptions, AdamWSlice, AdamWSlice8bit, SliceWrite

ROOT = Path(__file__).parents[2]
ADAMW = AdamWOptions(1e-2, 0.9, 0.999, 1e-8, 0.0)


@contextmanager
def counting():
    """{"loaded", "stored"}: bytes that unmasked lanes touch; "flops" of tl.dot, padding included."""
    builder, count = interpreter.InterpreterBuilder, {"loaded": 0, "stored": 0, "flops": 0}
    before = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    width = lambda ptrs: ptrs.get_element_ty().primitive_bitwidth // 8

    def load(self, ptrs, mask, *rest):
        count["loaded"] += int(mask.data.sum()) * width(ptrs)
        return before[0](self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest):
        count["stored"] += int(mask.data.sum()) * width(ptrs)
        return before[1](self, ptrs, value, mask, *rest)

    def dot(self, a, b, *rest):
        count["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return before[2](self, a, b, *rest)

    builder.create_masked_load, builder.create_masked_store, builder.create_dot = (
        load,
        store,
        dot,
    )
    try:
        with ops.use_backend("triton"):
            yield count
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.create_dot = before


def readme(op: str, column: str, **sizes: int) -> float:
    """A formula of the table in kernels/README.md, with numbers: "e n (R + K)" -> e * n * (R + K)."""
    lines = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8").splitlines()
    header = next(
        [c.strip() for c in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| op |")
    )
    row = next(
        [c.strip() for c in line.strip("|").split("|")]
        for line in lines
        if line.startswith(f"| `{op}` |")
    )
    formula = row[header.index(column)]
    return eval(
        re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), {"__builtins__": {}}, sizes
    )


SHAPES = [
    ("column", 300, 100, 16),
    ("column", 1100, 40, 5),
    ("row", 300, 16, 100),
    ("row", 700, 3, 130),
    ("block", 70, 20, 30),
]


def operands(kind, n, R, K, dtype):
    out = R if kind == "column" else 2 * R
    rows = None if kind == "column" else torch.randperm(out)[:R]
    return torch.randn(n, out).to(dtype), torch.randn(n, K).to(dtype), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "n", "R", "K"), SHAPES)
def test_slice_grad_moves_the_bytes_of_the_model(kind, n, R, K, dtype):
    dy, x, rows = operands(kind, n, R, K, dtype)
    e, config = dtype.itemsize, grad_config(R, K, dtype.itemsize, "cpu")
    tiles_r, tiles_k = -(-R // config.BLOCK_R), -(-K // config.BLOCK_K)
    splits, _ = token_splits(
        n, tiles_r * tiles_k, launch.processors(dy.device), config.BLOCK_T
    )
    with counting() as count:
        ops.slice_grad(dy, x, rows)
    compulsory = readme("slice_grad", "bytes", n=n, R=R, K=K, e=e)
    again = (
        e * n * (R * (tiles_k - 1) + K * (tiles_r - 1))
    )  # a tile's operands, once more for each tile beside it
    partials = (
        8 * splits * tiles_r * tiles_k * config.BLOCK_R * config.BLOCK_K
        if splits > 1
        else 0
    )
    indices = 0 if rows is None else 8 * R * tiles_k * splits
    tickets = 4 * tiles_r * tiles_k if splits > 1 else 0
    assert (
        count["loaded"] + count["stored"]
        == compulsory + again + partials + indices + tickets
    )
    assert min(tiles_r, tiles_k) == 1  # the wide operand is read once
    padded = readme(
        "slice_grad",
        "flops",
        n=splits * -(-n // splits),
        R=tiles_r * config.BLOCK_R,
        K=tiles_k * config.BLOCK_K,
    )
    assert (
        padded
        <= count["flops"]
        <= 1.5 * padded
        + 2 * splits * config.BLOCK_T * tiles_r * config.BLOCK_R * tiles_k * config.BLOCK_K
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "n", "R", "K"), [s for s in SHAPES if s[1] < 500])
def test_slice_grad_adamw_moves_no_gradient(kind, n, R, K, dtype):
    dy, x, rows = operands(kind, n, R, K, dtype)
    e, config = dtype.itemsize, grad_config(R, K, dtype.itemsize, "cpu")
    tiles_r, tiles_k = -(-R // config.BLOCK_R), -(-K // config.BLOCK_K)
    cols = None if kind == "row" else torch.arange(K)
    state = [torch.rand(R, K) for _ in range(3)]
    weight = torch.randn(dy.shape[1], K + 3 if cols is not None else K).to(dtype)
    splits, _ = token_splits(
        n, tiles_r * tiles_k, launch.processors(dy.device), config.BLOCK_T
    )
    with counting() as count:
        place = (weight, rows, cols, torch.tensor(1.0))
        ops.slice_grad_adamw(dy, x, AdamWSlice(state[0], None, *state[1:], *place), ADAMW)
    compulsory = readme("slice_grad_adamw", "bytes", n=n, R=R, K=K, e=e)
    again = e * n * (R * (tiles_k - 1) + K * (tiles_r - 1))
    partials = (
        (8 * config.BLOCK_R * config.BLOCK_K + 0) * splits * tiles_r * tiles_k
        if splits > 1
        else 0
    )
    tickets = 4 * tiles_r * tiles_k if splits > 1 else 0
    small = 4 * tiles_r * tiles_k  # the step count, read by whoever updates
    indices = 8 * R * tiles_k * (splits + 1) if rows is not None else 0
    indices += 8 * K * tiles_r if cols is not None else 0
    assert (
        count["loaded"] + count["stored"]
        == compulsory + again + partials + tickets + small + indices
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slice_adamw_moves_the_bytes_of_the_model(dtype):
    R, K, layers = 70, 33, 3
    tensors = [[torch.rand(R, K) for _ in range(layers)] for _ in range(4)]
    weights = [torch.randn(R, K).to(dtype) for _ in range(layers)]
    nothing, steps = [None] * layers, [torch.tensor(1.0)] * layers
    with counting() as count:
        columns = (*tensors, weights, nothing, nothing, steps)
        ops.slice_adamw([AdamWSlice(*t) for t in zip(*columns, strict=True)], ADAMW)
    programs = layers * -(-R * K // 1024)
    table = programs * (13 * 8 + 4)  # the slice's entry and its step count
    assert (
        count["loaded"] + count["stored"]
        == layers * readme("slice_adamw", "bytes", R=R, K=K, e=dtype.itemsize) + table
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_slices_moves_the_bytes_of_the_model(dtype):
    R, K, layers = 70, 33, 3
    slices = [
        SliceWrite(torch.rand(R, K), torch.randn(R, K).to(dtype), None, None)
        for _ in range(layers)
    ]
    with counting() as count:
        ops.write_slices(slices)
    table = layers * -(-R * K // 1024) * 8 * 8
    compulsory = layers * readme("write_slices", "bytes", R=R, K=K, e=dtype.itemsize)
    assert count["loaded"] + count["stored"] == compulsory + table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slice_adamw_8bit_moves_the_bytes_of_the_model(dtype):
    R, K, layers = 64, 36, 3  # nine scales, a program for four
    masters, grads = ([torch.rand(R, K) for _ in range(layers)] for _ in range(2))
    codes = [
        [torch.zeros(R, K, dtype=torch.uint8) for _ in range(layers)] for _ in range(2)
    ]
    scales = [[torch.ones(R * K // 256) for _ in range(layers)] for _ in range(2)]
    weights = [torch.randn(R, K).to(dtype) for _ in range(layers)]
    nothing, steps = [None] * layers, [torch.tensor(1.0)] * layers
    book = reference.dynamic_codebook()
    with counting() as count:
        columns = (masters, grads, *codes, *scales, weights, nothing, nothing, steps)
        slices = [AdamWSlice8bit(*t) for t in zip(*columns, strict=True)]
        ops.slice_adamw_8bit(slices, book, ADAMW)
    programs = layers * -(-R * K // 1024)
    table = programs * (14 * 8 + 4)
    books = (
        programs * 1024 * 2 * (1 + 2 * 8) * 4
    )  # from a cache: both moments decoded, two values per step of a search
    compulsory = layers * readme("slice_adamw_8bit", "bytes", R=R, K=K, e=dtype.itemsize)
    assert count["loaded"] + count["stored"] == compulsory + table + books
