"""What must not reach memory that is not a tensor's: each in a process of its own, because the
failure that is guarded against ends it.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from array import array
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from slicefine import SliceConfig, SliceLinear, ops
from slicefine.backends import cpu
from slicefine.backends.operands import AdamWOptions, AdamWSlice

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=str(cpu.unavailable))


def said(code: str) -> list[str]:
    """The lines that code prints in a process of its own, which must end well."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_an_input_of_the_wrong_width_is_refused_in_the_words_of_linear():
    lines = said("""
        import torch
        from torch import nn
        from slicefine import SliceConfig, SliceLinear, get_slice_model

        model = get_slice_model(nn.Sequential(nn.Linear(64, 64)), SliceConfig(r=4))
        model(torch.randn(4, 64)).sum().backward()  # the ops have run once in this process
        plain = nn.Linear(4_000_000, 1)
        layer = SliceLinear.from_linear(plain, SliceConfig(r=16, start_position=249_999))
        for x in (torch.zeros(4, 8), torch.zeros(2, 3, 8), torch.zeros(4, 0)):
            for each in (layer, plain):
                try:
                    each(x)
                except RuntimeError as error:
                    print(error)
        """)
    assert len(lines) == 6 and lines[::2] == lines[1::2]
    assert all("shapes cannot be multiplied" in line for line in lines)


PUBLIC = """
    import sys
    import torch
    import slicefine.ops

    p, g, m, v = (torch.zeros(8, 2) for _ in range(4))
    adamw = (1e-3, 0.9, 0.99, 1e-8, 0.0)
    one, weight, place = torch.ones(()), torch.zeros(8, 8), torch.tensor([0, 1])
    update = lambda w, cols, step: torch.ops.slicefine.slice_adamw(
        [p], [g], [m], [v], [w], [None], [cols], [step], *adamw
    )
    book = torch.arange(512.0).view(2, 256)
    codes, scales = [torch.zeros(8, 2).byte() for _ in range(2)], [torch.zeros(1)] * 2
    def eight(cols):
        lists = ([t] for t in (p, g, *codes, *scales))
        rest = ([t] for t in (weight, None, cols, one))
        torch.ops.slicefine.slice_adamw_8bit(*lists, book, *rest, *adamw)
    fused = lambda rows, cols: torch.ops.slicefine.slice_grad_adamw(
        torch.randn(4, 8), torch.randn(4, 2), torch.zeros(len(rows), 2),
        torch.zeros(len(rows), 2), torch.zeros(len(rows), 2), weight, rows, cols, one, *adamw
    )
    buffer = torch.zeros(100)
    view = buffer[:16].view(8, 2)
    whole = torch.zeros(8, 2), torch.zeros(8, 2)
    far = torch.tensor([0, 10**11])
    calls = {
        "rows": lambda: torch.ops.slicefine.slice_grad(
            torch.randn(64, 32), torch.randn(64, 8), torch.tensor([10**12])
        ),
        "negative": lambda: torch.ops.slicefine.slice_grad(
            torch.randn(64, 32), torch.randn(64, 8), torch.tensor([-1])
        ),
        "cols": lambda: update(weight, far, one),
        "cols in 8 bits": lambda: eight(far),
        "fused": lambda: fused(torch.tensor([0, 8]), place),
        "write": lambda: torch.ops.slicefine.write_slices([p], [weight], [None], [far]),
        "small": lambda: update(view, torch.tensor([0, 60]), one),
        "step": lambda: update(weight, place, torch.ones(0)),
        "fused step": lambda: torch.ops.slicefine.slice_grad_adamw(
            torch.randn(4, 8), torch.randn(4, 2), p, m, v, weight, None, place, torch.ones(0), *adamw
        ),
    }
    for name, call in calls.items():
        try:
            call()
            print(name, "ran")
        except (IndexError, ValueError) as error:
            print(f"{name}: {type(error).__name__}: {error}")
    print(int((buffer != 0).sum()), int((weight != 0).sum()))
    """


def test_public_ops_check_indices_and_steps():
    *lines, written = said(PUBLIC)
    assert lines == [
        "rows: IndexError: rows holds 1000000000000; there are features 0 to 31",
        "negative: IndexError: rows holds -1; there are features 0 to 31",
        "cols: IndexError: cols holds 100000000000; there are features 0 to 7",
        "cols in 8 bits: IndexError: cols holds 100000000000; there are features 0 to 7",
        "fused: IndexError: rows holds 8; there are features 0 to 7",
        "write: IndexError: cols holds 100000000000; there are features 0 to 7",
        "small: IndexError: cols holds 60; there are features 0 to 1",
        "step: ValueError: slice_adamw: step has shape (0,); expected one number",
        "fused step: ValueError: slice_grad_adamw: step has shape (0,); expected one number",
    ]
    assert written == "0 0"


def test_a_layers_own_index_buffer_that_was_overwritten():
    """The same kernels, reached through a layer."""
    layer = SliceLinear.from_linear(nn.Linear(64, 8), SliceConfig(r=4))
    layer(torch.randn(3, 64)).sum().backward()
    layer.slice_cols[2] = 10**11
    with pytest.raises(
        IndexError, match="cols holds 100000000000; there are features 0 to 63"
    ):
        layer(torch.randn(3, 64))


def test_threads_that_cannot_be_started_leave_their_work_to_the_caller():
    lines = said("""
        import resource, torch
        from torch import nn
        from slicefine import SliceConfig, get_slice_model

        torch.set_num_threads(1)
        model = get_slice_model(nn.Sequential(nn.Linear(1024, 1024)), SliceConfig(r=16))
        x = torch.randn(4096, 1024)
        model(x).sum().backward()
        expected = model[0].slice_weight.grad.clone()
        model.zero_grad()
        loss = model(x).sum()
        torch.set_num_threads(8)
        from slicefine import ops
        dy, kept = torch.ones(4096, 1024), ops.take_columns(x, model[0].slice_cols)
        torch.set_num_threads(64)
        pages = int(open("/proc/self/statm").read().split()[0])
        size = pages * resource.getpagesize() + 2**25  # as a container's limit on memory
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        grad = ops.slice_grad(dy, kept)
        print((grad - expected).abs().max().item() < 1e-3 * expected.abs().max().item())
        """)
    assert lines == ["True"]


def test_a_negated_view_is_what_it_stands_for():
    dy, x = torch.randn(6, 5), torch.randn(6, 3)
    ops.slice_grad(dy, x)  # the first op chooses the backend
    exact = dy.t() @ x
    for a, b in ((torch._neg_view(-dy), x), (dy, torch._neg_view(-x))):
        assert a.is_neg() or b.is_neg()
        torch.testing.assert_close(ops.slice_grad(a, b), exact)
    whole = torch._neg_view(-torch.randn(4, 9))
    assert torch.equal(ops.take_columns(whole, torch.tensor([1, 8])), whole[:, [1, 8]])


def test_a_weight_that_is_no_matrix_is_refused():
    p = torch.zeros(3, 2)
    place = (torch.zeros(3, 4, 5), None, torch.arange(2), torch.tensor(1.0))
    options = AdamWOptions(1e-3, 0.9, 0.99, 1e-8, 0.0)
    with pytest.raises(
        ValueError, match=r"weight has shape \(3, 4, 5\); expected \(out, in\)"
    ):
        ops.slice_adamw([AdamWSlice(p, p, p, p, *place)], options)
    with pytest.raises(TypeError, match=r"cols is torch.int64 of shape \(1, 2\)"):
        place = (torch.zeros(3, 4), None, torch.arange(2).view(1, 2), torch.tensor(1.0))
        ops.slice_adamw([AdamWSlice(p, p, p, p, *place)], options)


def test_a_layer_trains_on_where_every_thread_fails():
    """The case of a container's limit in the middle of a training: forward and backward."""
    lines = said("""
        import resource, torch
        from torch import nn
        from slicefine import SliceConfig, get_slice_model

        torch.set_num_threads(8)
        model = nn.Sequential(nn.Linear(1024, 1024)); get_slice_model(model, SliceConfig(r=16))
        x = torch.randn(4096, 1024)
        loss = model(x).sum(); loss.backward(); loss = model(x).sum()
        pages = int(open("/proc/self/statm").read().split()[0])
        size = pages * resource.getpagesize() + 2**25
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        try:
            loss.backward()
            print("fine")
        except (RuntimeError, MemoryError) as error:
            print("fine" if "memory" in str(error) or "allocate" in str(error) else error)
        """)
    assert lines == ["fine"]


def test_a_module_of_other_sources_is_refused_by_name():
    """Rows that Python and C++ describe differently would be addresses in the wrong place."""
    from slicefine.backends import table

    other: Any = ModuleType("slicefine._C")
    other.__file__ = "/somewhere/_C.so"
    assert "slicefine._C at /somewhere/_C.so was built from other sources" in (
        table.mismatch(other) or ""
    )
    other.layout = dict(cpu._C.layout)
    assert table.mismatch(other) is None
    weight, *others = other.layout["SliceRow"]
    for change in ({"SliceRow": (*others, weight)}, {"BLOCK_8BIT": 128}, {"dtypes": {}}):
        other.layout = {**cpu._C.layout, **change}
        assert table.mismatch(other) is not None, change


def test_the_compiled_module_checks_the_size_of_rows_and_tables():
    row, options = [0] * len(cpu.SliceRow._fields), AdamWOptions(1e-3, 0.9, 0.99, 1e-8, 0.0)
    for numbers in (array("q", row[:-1]), array("q", [*row, 0]), array("i", row)):
        with pytest.raises(ValueError, match="expected rows of 17 int64"):
            cpu._C.slice_adamw(numbers, options, 1)
        with pytest.raises(ValueError, match="expected rows of 17 int64"):
            cpu._C.write_slices(numbers, 1)
    for short in ((0,) * 10, (0,) * 12):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            cpu._C.slice_grad(short, 0, 1)
