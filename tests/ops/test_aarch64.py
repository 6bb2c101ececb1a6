"""The C++ ops on a 64-bit Arm CPU, by cross compiler and emulator where this machine has them
(Debian: g++-aarch64-linux-gnu, qemu-user): the same numbers as float64 says, stochastic rounding
bit for bit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from slicefine.backends import reference
from slicefine.backends.operands import AdamWOptions, AdamWSlice
from slicefine.slices import write_slice

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
pytestmark = pytest.mark.skipif(
    not (COMPILER and EMULATOR), reason="no cross compiler or emulator for aarch64 here"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("aarch64") / "check"
    sources = [
        ROOT / "csrc" / f"{name}.cpp"
        for name in ("slice_grad", "slice_adamw", "slice_grad_adamw", "parallel")
    ]
    flags = [
        "-std=gnu++17",
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-static",
        "-pthread",
        "-Wall",
        "-Wno-psabi",
    ]
    isa = ["-DSLICEFINE_ISA=generic", "-DSLICEFINE_LANES=4"]
    command = [
        COMPILER,
        *flags,
        *isa,
        str(ROOT / "tests" / "ops" / "aarch64_check.cpp"),
        *map(str, sources),
        "-o",
        str(path),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return path


def raw(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )


@pytest.mark.parametrize("kind", ["column", "block"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_ops_on_aarch64(program, dtype, kind):
    n, out, width = 130, 45, 37
    rows, cols = (
        (None if kind == "column" else torch.tensor([2, 3, 40])),
        torch.tensor([0, 5, 6, 7, 36]),
    )
    R, K = out if rows is None else len(rows), len(cols)
    dy, x, weight = (
        torch.randn(n, out).to(dtype),
        torch.randn(n, K).to(dtype),
        torch.randn(out, width).to(dtype),
    )
    state = [torch.randn(R, K), 0.1 * torch.randn(R, K), 0.1 * torch.rand(R, K)]
    header = torch.tensor([n, R, K, DTYPES[dtype], int(rows is not None), out, width])
    parts = [header, dy, x, weight, *([rows] if rows is not None else []), cols, *state]
    command = [EMULATOR, str(program)]
    data = subprocess.run(
        command, input=b"".join(map(raw, parts)), check=True, capture_output=True
    ).stdout
    numbers = lambda count, kind=np.float32: torch.from_numpy(
        np.frombuffer(take(count * np.dtype(kind).itemsize), kind).copy()
    )
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        return data[position - size : position]

    exact = reference.slice_grad(dy.double(), x.double(), rows)
    torch.testing.assert_close(
        numbers(R * K).view(R, K).double(), exact, rtol=1e-5, atol=1e-4
    )
    expected = [t.double() for t in state]
    place = (weight.double(), rows, cols, torch.tensor(3.0))
    active = AdamWSlice(expected[0], None, *expected[1:], *place)
    options = AdamWOptions(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    reference.slice_grad_adamw(dy.double(), x.double(), active, options)
    for _ in range(2):  # slice_adamw, slice_grad_adamw
        found = [numbers(R * K).view(R, K) for _ in range(3)]
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=1e-5)
        written = torch.frombuffer(bytearray(take(weight.nbytes)), dtype=dtype).view(
            out, width
        )
        seed = 1234567 if dtype == torch.bfloat16 else None
        after = weight.clone()
        write_slice(after, rows, cols, reference.round_to(found[0], dtype, seed, 0))
        assert torch.equal(written, after)  # the slice, and nothing else
    assert position == len(data)
