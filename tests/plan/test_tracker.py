"""No tensor as large as a weight: asserted on every allocation of forward, backward and step, and
on the peak.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops, track_memory
from slicefine.plan.tracker import _StorageTracker

OUT, IN, TOKENS = 192, 160, 24


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest storage that an operator has created."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if (
                isinstance(t, torch.Tensor)
                and t.untyped_storage().data_ptr() not in self.known
            ):
                elements = t.untyped_storage().nbytes() // t.element_size()
                if elements > self.largest:
                    self.largest, self.by = elements, str(func)
        return result


@pytest.mark.parametrize("mode", ["ascending", "gradient", "magnitude"])
@pytest.mark.parametrize("in_bwd", [False, True])
@pytest.mark.parametrize("slice_type", ["column", "row", "block", "row_column"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_nothing_as_large_as_the_weight_is_allocated(name, slice_type, in_bwd, mode):
    model = get_slice_model(
        nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)),
        SliceConfig(r=4, slice_type=slice_type, switch_interval=2, switch_mode=mode),
    )
    optimizer = SliceAdamW(model.parameters(), optimizer_in_bwd=in_bwd)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with ops.use_backend(name), LargestAllocation(model.parameters()) as seen:
        for _ in range(5):  # two moves among them
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    limit = max(TOKENS * max(OUT, IN), 4 * max(OUT, IN))  # an activation, or a slice
    assert 0 < seen.largest <= limit < OUT * IN, f"{seen.largest} elements by {seen.by}"


def test_the_check_would_notice_a_dense_gradient():
    model = nn.Sequential(nn.Linear(IN, OUT))
    with LargestAllocation(model.parameters()) as seen:
        model(torch.randn(TOKENS, IN)).square().mean().backward()
    assert seen.largest == OUT * IN


def peak(run, held) -> int:
    gc.collect()
    with track_memory(held) as report:
        run()
    return report.peak_bytes - report.bytes_before


def test_the_tracker_counts_what_is_alive():
    def run():
        a = torch.empty(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = torch.cat([b, b])  # 4,000 + 8,000
        del b, c
        torch.empty(2500)  # 10,000

    assert peak(run, []) == 12_000
    tracker = _StorageTracker()
    with tracker:
        x = torch.empty(100)
        y = x.view(10, 10)  # the same storage
    assert tracker.current == 400
    del x
    assert tracker.current == 400
    del y
    assert tracker.current == 0


def test_a_tensor_held_before_counts_and_can_be_freed():
    held = [torch.empty(1000)]
    with track_memory(held) as report:
        held.clear()
        torch.empty(500)
    assert (report.bytes_before, report.peak_bytes) == (4_000, 4_000)


def training_peak(model, parameters, x, in_bwd=None) -> int:
    optimizer = (
        torch.optim.AdamW(parameters)
        if in_bwd is None
        else SliceAdamW(parameters, optimizer_in_bwd=in_bwd)
    )

    def one_step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    one_step()  # optimizer state exists from here on
    optimizer.zero_grad()
    state = [
        v
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    ]
    return peak(one_step, [*model.parameters(), *state]) + sum(t.nbytes for t in state)


def make_deep(width=256, depth=6):
    """LayerNorm keeps its input, ReLU its output: a linear layer's own input is kept by nobody but
    the layer itself.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        *[
            layer
            for _ in range(depth)
            for layer in (nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
        ]
    )


def test_peaks_are_ordered_as_the_design_says():
    """Above the frozen baseline: column a little, row an activation per layer, full training
    weights x 3.
    """
    x = torch.randn(1024, 256, requires_grad=True)
    floor = make_deep().requires_grad_(False)
    floor_peak = peak(lambda: floor(x).square().mean().backward(), list(floor.parameters()))
    x.grad = None
    peaks = {}
    for kind in ("column", "row"):
        model = get_slice_model(
            make_deep(), SliceConfig(r=8, slice_type=kind, switch_interval=None)
        )
        peaks[kind] = training_peak(model, list(model.parameters()), x, in_bwd=False)
        x.grad = None
    model = make_deep()
    peaks["full"] = training_peak(model, list(model.parameters()), x)
    assert floor_peak <= peaks["column"] < peaks["row"] < peaks["full"]
    kept, slices = 6 * 1024 * 8 * 4, 6 * 256 * 8 * 4
    assert (
        peaks["column"] - floor_peak <= kept + 6 * slices
    )  # X[:, S] per layer; gradients, moments, temporaries
    assert peaks["row"] - floor_peak >= 0.8 * 6 * 1024 * 256 * 4  # X per layer
