"""Several processes: DistributedDataParallel and FSDP2 train what one process trains, on two gloo
processes.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from slicefine import SliceAdamW, SliceConfig, SliceLayer, get_slice_model
from tests.configs import slices_alone
from tests.two_processes import pair

pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available(), reason="this torch has no gloo backend"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with pair(tmp_path_factory.mktemp("gloo")) as run:
        yield run


STEPS, BATCH = 7, 8  # with an interval of 3: two moves, and a step after the second


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    # 13 and 1 output features do not divide by two processes; the second process holds nothing of
    # the last layer
    return nn.Sequential(
        nn.Linear(10, 13),
        nn.Tanh(),
        nn.Linear(13, 13),
        nn.Tanh(),
        nn.Linear(13, 12),
        nn.Tanh(),
        nn.Linear(12, 1),
    ).to(dtype)


def config(**kwargs: Any) -> SliceConfig:
    kwargs = {
        "r": 3,
        "switch_interval": 3,
        "target_modules": ["0", "2", "4", "6"],
        **kwargs,
    }
    if kwargs.get("slice_type", "column") != "column":
        kwargs.setdefault("rank_pattern", {"6": 1})
    return slices_alone(**kwargs)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 10, generator=generator), torch.randn(
        BATCH, 1, generator=generator
    )


def optimizer_for(model: nn.Module, kind: str, **kwargs: Any) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "SliceAdamW":
        return SliceAdamW(parameters, lr=1e-2, weight_decay=0.1, **kwargs)
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=kind == "fused")


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, micro: int = 1
) -> list[float]:
    """Each process takes its share of the global batch; alone, all of it."""
    rank, world = (
        (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    )
    norms = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        for part in range(micro):
            mine = slice(rank * micro + part, None, world * micro)
            loss = (
                model(x[mine].to(dtype_of(model))) - y[mine].to(dtype_of(model))
            ).float().square().mean() / micro
            loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
    return norms


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(
        p.dtype
        for n, p in model.named_parameters()
        if n.endswith("weight") and "slice" not in n
    )


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {
        k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone()
        for k, v in state.items()
    }


def alone(
    kind: str, steps: int = STEPS, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[dict, list[float]]:
    model = get_slice_model(net(dtype=dtype), config(**kwargs))
    norms = train(model, optimizer_for(model, kind), range(steps))
    return whole(model), norms


def assert_close(
    states: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    before = net().state_dict()
    for name, value in expected.items():
        moved = (value.float() - before[name]).abs().max()
        if name.endswith("weight"):
            assert (
                moved > 1e-2
            )  # seven steps of Adam: what would be missed if nothing trained
        assert (states[name] - value).abs().max() <= tolerance, name


# DistributedDataParallel


def ddp_run(kind: str, micro: int, kwargs: dict) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model = get_slice_model(net(), config(**kwargs))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    reduced = []
    wrapped.register_comm_hook(None, _count(reduced))
    norms = train(wrapped, optimizer_for(wrapped, kind), range(STEPS), micro)
    masters = {
        n: p.detach().clone() for n, p in model.named_parameters() if "slice_weight" in n
    }
    positions = {
        n: dict(m.schedule.position)
        for n, m in model.named_modules()
        if isinstance(m, SliceLayer)
    }
    return {
        "state": whole(model),
        "masters": masters,
        "norms": norms,
        "positions": positions,
        "reduced": sum(reduced),
    }


def _count(reduced: list[int]):
    def hook(state, bucket):  # annotations would be strings here, which DDP refuses
        reduced.append(bucket.buffer().numel())
        return (
            dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    return hook


@pytest.mark.parametrize(
    "kind, kwargs, micro",
    [
        ("SliceAdamW", {}, 1),
        ("fused", {}, 1),
        ("SliceAdamW", {"slice_type": "row_column"}, 1),
        (
            "SliceAdamW",
            {
                "switch_mode": "magnitude",
                "contiguous": False,
                "state_on_switch": "remember",
            },
            2,
        ),
    ],
)
def test_ddp_trains_what_one_process_trains(both, kind, kwargs, micro):
    first, second = both(ddp_run, kind, micro, kwargs)
    for part in ("state", "masters"):
        assert all(
            torch.equal(first[part][name], second[part][name]) for name in first[part]
        )  # no drift, not a bit
    assert first["positions"] == second["positions"]
    expected, norms = alone(kind, **kwargs)
    assert_close(first["state"], expected, 2e-6)
    assert first["norms"] == pytest.approx(norms, rel=1e-4)
    slices = sum(
        p.numel()
        for n, p in get_slice_model(net(), config(**kwargs)).named_parameters()
        if "slice" in n
    )
    assert (
        first["reduced"] == slices * STEPS * micro
    )  # nothing but the slices crosses the network


def ddp_two_forwards() -> bool:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(get_slice_model(net(), config()))
    x, _ = batch(0)
    (
        model(x) + model(x + 1)
    ).sum().backward()  # broadcasting buffers in the second forward would spoil the first
    return all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_two_forwards_before_a_backward(both):
    assert both(ddp_two_forwards) == [True, True]


def ddp_gradient_mode() -> str:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(
        get_slice_model(net(), config(switch_mode="gradient", switch_interval=1))
    )
    with pytest.raises(RuntimeError) as error:
        train(model, optimizer_for(model, "SliceAdamW"), range(1))
    return str(error.value)


def test_gradient_mode_is_refused(both):
    assert all(
        "would choose by its own gradients" in message
        for message in both(ddp_gradient_mode)
    )


# FSDP2


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
    positions = {
        n: dict(m.schedule.position)
        for n, m in model.named_modules()
        if isinstance(m, SliceLayer)
    }
    held = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    return {"state": whole(model), "norms": norms, "positions": positions, "held": held}


@pytest.mark.parametrize(
    "kind, kwargs, micro",
    [
        ("SliceAdamW", {}, 1),
        ("fused", {}, 1),
        ("AdamW", {"state_on_switch": "remember"}, 1),
        (
            "SliceAdamW",
            {
                "switch_mode": "magnitude",
                "contiguous": False,
                "state_on_switch": "remember",
            },
            2,
        ),
    ],
)
def test_fsdp2_trains_what_one_process_trains(both, kind, kwargs, micro):
    first, second = both(fsdp_run, kind, micro, kwargs)
    assert all(
        torch.equal(first["state"][name], second["state"][name]) for name in first["state"]
    )
    assert first["positions"] == second["positions"] and set(
        first["positions"]["2"].values()
    ) != {0}
    expected, norms = alone(kind, **kwargs)
    assert_close(first["state"], expected, 2e-6)
    assert first["norms"] == pytest.approx(norms, rel=1e-4)
    everything = sum(
        p.numel() for p in get_slice_model(net(), config(**kwargs)).parameters()
    )
    assert (
        first["held"] + second["held"] == everything
        and abs(first["held"] - second["held"]) < everything / 4
    )


def fsdp_rows() -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import Shard

    torch.manual_seed(0)
    even = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 1))
    rows = config(slice_type="row", target_modules=["0", "2"], rank_pattern={"2": 1})
    model = get_slice_model(even, rows)
    alone = copy.deepcopy(model)
    shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    train(model, optimizer_for(model, "SliceAdamW"), range(STEPS))
    optimizer = optimizer_for(alone, "SliceAdamW")
    for step in range(STEPS):  # the whole batch
        x, y = batch(step)
        optimizer.zero_grad()
        (alone(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        optimizer.step()
    return {"sharded": whole(model), "alone": whole(alone)}


def test_row_slices_shard_by_input_features(both):
    for result in both(fsdp_rows):
        assert all(
            (result["sharded"][k] - v).abs().max() <= 2e-6
            for k, v in result["alone"].items()
        )


def fsdp_low_precision(one_group: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = get_slice_model(net(dtype=torch.bfloat16), config())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(model) if one_group else shard(model, mp_policy=policy)
    optimizer = optimizer_for(model, "SliceAdamW")
    train(model, optimizer, range(STEPS))
    layer: Any = model[0]
    synchronized = torch.equal(
        layer.active(layer.slice_weight).bfloat16(),
        layer.weight_matrix[:, layer.slice_cols],
    )
    return {
        "state": whole(model),
        "dtypes": {p.dtype for p in model.parameters()},
        "synchronized": synchronized,
    }


@pytest.mark.parametrize("one_group", [False, True])
def test_bfloat16_weights_keep_float32_masters_under_fsdp2(both, one_group):
    first, second = both(fsdp_low_precision, one_group)
    assert (
        first["dtypes"] == {torch.bfloat16, torch.float32}
        and first["synchronized"]
        and second["synchronized"]
    )
    expected, _ = alone("SliceAdamW", dtype=torch.bfloat16)
    assert_close(
        first["state"], expected, 0.02
    )  # bfloat16 sums in another order; an update of the whole run is 0.07


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = (
            nn.MultiheadAttention(12, 2, batch_first=True),
            nn.Linear(12, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def fsdp_attention() -> dict[str, Any]:
    torch.manual_seed(0)
    model = get_slice_model(
        Attends(),
        slices_alone(r=3, switch_interval=2, target_modules=["attention", "out"]),
    )
    alone = copy.deepcopy(model)
    shard(model)
    optimizers = [optimizer_for(m, "SliceAdamW") for m in (model, alone)]
    for step in range(5):
        x = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(step))
        for m, optimizer, part in (
            (model, optimizers[0], x[dist.get_rank() :: 2]),
            (alone, optimizers[1], x),
        ):
            optimizer.zero_grad()
            m(part).square().mean().backward()
            optimizer.step()
    return {"sharded": whole(model), "alone": whole(alone)}


def test_a_fused_projection_of_attention_shards(both):
    torch.manual_seed(0)
    before = Attends().state_dict()["attention.in_proj_weight"]
    for result in both(fsdp_attention):
        assert all(
            (result["sharded"][k] - v).abs().max() <= 2e-6
            for k, v in result["alone"].items()
        )
        changed = (result["sharded"]["attention.in_proj_weight"] != before).any(0)
        assert changed.tolist() == [True] * 9 + [False] * 3


def fsdp_experts(count: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from slicefine.modules.parameters import SliceParameter

    torch.manual_seed(0)
    layer = SliceParameter.from_parameter(
        nn.Parameter(torch.randn(count, 6, 8)), SliceConfig(r=2), "experts"
    )
    mesh = init_device_mesh("cpu", (2,))
    layer.weight = nn.Parameter(
        distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]), requires_grad=False
    )
    try:
        layer.slice_weight = nn.Parameter(
            distribute_tensor(layer.slice_weight.detach(), mesh, [Shard(0)])
        )
    except ValueError as error:
        return str(error)
    with torch.no_grad():
        layer.slice_weight.to_local().fill_(1.0)  # type: ignore[attr-defined]
    layer.write_through()
    full: Any = layer.weight
    return str(full.full_tensor().eq(1.0).sum(-1).unique().tolist())


def test_experts_shard_where_their_number_divides(both):
    assert both(fsdp_experts, 4) == [
        "[2]",
        "[2]",
    ]  # two columns of every row of every expert
    assert all(
        "experts shard only where their number divides" in message
        for message in both(fsdp_experts, 3)
    )


# Checkpoints


def fsdp_resume() -> dict[str, Any]:
    model = shard(get_slice_model(net(), config(state_on_switch="remember")))
    optimizer = optimizer_for(model, "SliceAdamW")
    original = whole(model)
    train(model, optimizer, range(4))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, range(4, STEPS))
    again = shard(get_slice_model(net(seed=1), config(state_on_switch="remember")))
    resumed = optimizer_for(again, "SliceAdamW")
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(4, STEPS))
    result = {"whole": whole(model), "again": whole(again), "original": original}
    with again.disable_adapter():
        result["disabled"] = whole(again)
    result["enabled"] = whole(again)
    return result


def test_a_sharded_run_resumes_bit_for_bit_and_can_be_disabled(both):
    for result in both(fsdp_resume):
        for one, other in (
            ("whole", "again"),
            ("original", "disabled"),
            ("again", "enabled"),
        ):
            assert all(
                torch.equal(result[one][name], value)
                for name, value in result[other].items()
            )
        assert not torch.equal(result["whole"]["2.weight"], result["original"]["2.weight"])


def distributed_checkpoint(folder: str, keep: bool) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )

    model = shard(get_slice_model(net(), config(keep_originals=keep)))
    optimizer = optimizer_for(model, "SliceAdamW")
    train(model, optimizer, range(4))
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=folder)
    train(model, optimizer, range(4, STEPS))
    again = shard(get_slice_model(net(seed=1), config(keep_originals=keep)))
    resumed = optimizer_for(again, "SliceAdamW")
    parts = dict(zip(("model", "optimizer"), get_state_dict(again, resumed), strict=True))
    try:
        dcp.load(parts, checkpoint_id=folder)
        set_state_dict(
            again,
            resumed,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
        )
    except ValueError as error:
        return {"error": str(error)}
    train(again, resumed, range(4, STEPS))
    full = get_model_state_dict(
        again, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {"whole": whole(model), "again": whole(again), "full": sorted(full)}


def test_torch_distributed_checkpoint_resumes_bit_for_bit_without_originals(both, tmp_path):
    for rank, result in enumerate(
        both(distributed_checkpoint, str(tmp_path / "lean"), False)
    ):
        assert all(
            torch.equal(result["again"][name], value)
            for name, value in result["whole"].items()
        )
        assert result["full"] == (
            sorted(net().state_dict()) if rank == 0 else []
        )  # a plain model's keys


def test_torch_distributed_checkpoint_never_loses_originals_in_silence(both, tmp_path):
    for result in both(distributed_checkpoint, str(tmp_path / "kept"), True):
        assert "originals" in result["error"] and "keep_originals=False" in result["error"]


# What does not work says so


def refusals() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def fresh(**kwargs: Any) -> Any:
        return get_slice_model(net(), config(**kwargs))

    def in_bwd_before() -> None:
        model = fresh()
        optimizer = SliceAdamW(model.parameters(), optimizer_in_bwd=True)
        shard(model)
        assert optimizer is not None

    def half_sharded(names: str) -> None:
        model = fresh()
        fully_shard(
            model,
            ignored_params={p for n, p in model.named_parameters() if n.endswith(names)},
        )
        model(torch.randn(2, 10))

    def fsdp1() -> None:
        model = FullyShardedDataParallel(
            fresh(), use_orig_params=True, device_id=torch.device("cpu")
        )
        model(torch.randn(2, 10))

    def tensor_parallel() -> None:
        model = parallelize_module(
            fresh(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()}
        )
        model(torch.randn(2, 10))

    cases = {
        "row": lambda: shard(fresh(slice_type="row")),
        "block": lambda: shard(fresh(slice_type="block")),
        "row_column": lambda: shard(fresh(slice_type="row_column")),
        "gradient": lambda: shard(fresh(switch_mode="gradient")),
        "in_bwd before": in_bwd_before,
        "in_bwd after": lambda: SliceAdamW(
            shard(fresh()).parameters(), optimizer_in_bwd=True
        ),
        "8 bits": lambda: SliceAdamW(shard(fresh()).parameters(), optim_bits=8),
        "slices of shards": lambda: get_slice_model(shard(net()), config()),
        "weights ignored": lambda: half_sharded(".weight"),
        "slices ignored": lambda: half_sharded("slice_weight"),
        "fsdp1": fsdp1,
        "tensor parallel": tensor_parallel,
        "merge": lambda: shard(fresh()).merge_and_unload(),
        "delta": lambda: shard(fresh()).delta(),
        "cast": lambda: shard(fresh()).double(),
    }
    messages = {}
    for name, case in cases.items():
        try:
            case()
        except (ValueError, RuntimeError) as error:
            messages[name] = str(error)
    assert messages.keys() == cases.keys()
    return messages


def test_what_does_not_work_says_so(both):
    said = {
        "row": "a row slice of a weight of shape (13, 10) does not work with (Shard(dim=0),)",
        "block": "Use column slices",
        "row_column": "Use column slices",
        "gradient": "switch_mode='gradient' does not work under fully_shard",
        "in_bwd before": "optimizer_in_bwd=True does not work under fully_shard",
        "in_bwd after": "optimizer_in_bwd=True does not work under fully_shard",
        "8 bits": "optim_bits=8 does not work under fully_shard",
        "slices of shards": "make slices first, then fully_shard",
        "weights ignored": "is sharded and its weight is not",
        "slices ignored": "sharded and its slice_weight is not",
        "fsdp1": "FullyShardedDataParallel (FSDP1) has taken it",
        "tensor parallel": "tensor parallelism does not work",
        "merge": "there is nothing to merge",
        "delta": "deltas are made of whole tensors",
        "cast": "before fully_shard",
    }
    for messages in both(refusals):
        assert {
            name: part for name, part in said.items() if part not in messages[name]
        } == {}
