"""Several processes: DistributedDataParallel and FSDP2 train what one process trains, on two gloo processes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from slicefine import SliceAdamW, SliceConfig, SliceLinear, get_slice_model
from tests.two_processes import pair

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with pair(tmp_path_factory.mktemp("gloo")) as run:
        yield run


STEPS, BATCH = 7, 8  # with an interval of 3: two moves, and a step after the second


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    # 13 and 1 output features do not divide by two processes; the second process holds nothing of the last layer
    return nn.Sequential(
        nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 13), nn.Tanh(), nn.Linear(13, 12), nn.Tanh(), nn.Linear(12, 1)
    ).to(dtype)


def config(**kwargs: Any) -> SliceConfig:
    kwargs = {"r": 3, "switch_interval": 3, "target_modules": ["0", "2", "4", "6"], **kwargs}
    if kwargs.get("slice_type", "column") != "column":
        kwargs["rank_pattern"] = {"6": 1}
    return SliceConfig(**kwargs)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 10, generator=generator), torch.randn(BATCH, 1, generator=generator)


def optimizer_for(model: nn.Module, kind: str, **kwargs: Any) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "SliceAdamW":
        return SliceAdamW(parameters, lr=1e-2, weight_decay=0.1, **kwargs)
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=kind == "fused")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, micro: int = 1) -> list[float]:
    """Each process takes its share of the global batch; alone, all of it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    norms = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        for part in range(micro):
            mine = slice(rank * micro + part, None, world * micro)
            loss = (model(x[mine].to(dtype_of(model))) - y[mine].to(dtype_of(model))).float().square().mean() / micro
            loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
    return norms


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for n, p in model.named_parameters() if n.endswith("weight") and "slice" not in n)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in state.items()}


def alone(kind: str, steps: int = STEPS, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[dict, list[float]]:
    model = get_slice_model(net(dtype=dtype), config(**kwargs))
    norms = train(model, optimizer_for(model, kind), range(steps))
    return whole(model), norms


def assert_close(states: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    before = net().state_dict()
    for name, value in expected.items():
        moved = (value.float() - before[name]).abs().max()
        if name.endswith("weight"):
            assert moved > 1e-2  # seven steps of Adam: what would be missed if nothing trained
        assert (states[name] - value).abs().max() <= tolerance, name


# -- DistributedDataParallel ----------------------------------------------------------------------------------------------


def ddp_run(kind: str, micro: int, kwargs: dict) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model = get_slice_model(net(), config(**kwargs))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    reduced = []
    wrapped.register_comm_hook(None, _count(reduced))
    norms = train(wrapped, optimizer_for(wrapped, kind), range(STEPS), micro)
    masters = {n: p.detach().clone() for n, p in model.named_parameters() if "slice_weight" in n}
    positions = {n: dict(m.schedule.position) for n, m in model.named_modules() if isinstance(m, SliceLinear)}
    return {"state": whole(model), "masters": masters, "norms": norms, "positions": positions, "reduced": sum(reduced)}


def _count(reduced: list[int]):
    def hook(state, bucket):  # annotations would be strings here, which DDP refuses
        reduced.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future().then(
            lambda future: future.value()[0]
        )

    return hook


@pytest.mark.parametrize("kind, kwargs, micro", [
    ("SliceAdamW", {}, 1), ("fused", {}, 1), ("SliceAdamW", {"slice_type": "row_column"}, 1),
    ("SliceAdamW", {"switch_mode": "magnitude", "contiguous": False, "state_on_switch": "remember"}, 2),
])  # fmt: skip
def test_ddp_trains_what_one_process_trains(both, kind, kwargs, micro):
    first, second = both(ddp_run, kind, micro, kwargs)
    for part in ("state", "masters"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])  # no drift, not a bit
    assert first["positions"] == second["positions"]
    expected, norms = alone(kind, **kwargs)
    assert_close(first["state"], expected, 2e-6)
    assert first["norms"] == pytest.approx(norms, rel=1e-4)
    slices = sum(p.numel() for n, p in get_slice_model(net(), config(**kwargs)).named_parameters() if "slice" in n)
    assert first["reduced"] == slices * STEPS * micro  # nothing but the slices crosses the network


def ddp_two_forwards() -> bool:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(get_slice_model(net(), config()))
    x, _ = batch(0)
    (model(x) + model(x + 1)).sum().backward()  # broadcasting buffers in the second forward would spoil the first
    return all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_two_forwards_before_a_backward(both):
    assert both(ddp_two_forwards) == [True, True]


def ddp_gradient_mode() -> str:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(get_slice_model(net(), config(switch_mode="gradient", switch_interval=1)))
    with pytest.raises(RuntimeError) as error:
        train(model, optimizer_for(model, "SliceAdamW"), range(1))
    return str(error.value)


def test_gradient_mode_is_refused(both):
    assert all("would choose by its own gradients" in message for message in both(ddp_gradient_mode))


# -- FSDP2 ---------------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, **kwargs: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if isinstance(child, nn.Linear):
            fully_shard(child, **kwargs)
    fully_shard(model, **kwargs)
    return model


def fsdp_run(kind: str, micro: int, kwargs: dict) -> dict[str, Any]:
    model = shard(get_slice_model(net(), config(**kwargs)))
    norms = train(model, optimizer_for(model, kind), range(STEPS), micro)
    positions = {n: dict(m.schedule.position) for n, m in model.named_modules() if isinstance(m, SliceLinear)}
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    return {"state": whole(model), "norms": norms, "positions": positions, "held": held}


@pytest.mark.parametrize("kind, kwargs, micro", [
    ("SliceAdamW", {}, 1), ("fused", {}, 1), ("AdamW", {"state_on_switch": "remember"}, 1),
    ("SliceAdamW", {"switch_mode": "magnitude", "contiguous": False, "state_on_switch": "remember"}, 2),
])  # fmt: skip
def test_fsdp2_trains_what_one_process_trains(both, kind, kwargs, micro):
    first, second = both(fsdp_run, kind, micro, kwargs)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert first["positions"] == second["positions"] and set(first["positions"]["2"].values()) != {0}
    expected, norms = alone(kind, **kwargs)
    assert_close(first["state"], expected, 2e-6)
    assert first["norms"] == pytest.approx(norms, rel=1e-4)
    everything = sum(p.numel() for p in get_slice_model(net(), config(**kwargs)).parameters())
    assert first["held"] + second["held"] == everything and abs(first["held"] - second["held"]) < everything / 4
