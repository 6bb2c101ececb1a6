"""The questions of docs/faq.md, a test each (`pytest -k faq`). Some rows have
theirs elsewhere.

Thorough tests of each mechanism stand in its own file; these go through the public interface once,
from end to end.
"""

from __future__ import annotations

import ast
import copy
import io
import logging
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import slicefine
from slicefine import (
    SliceAdamW,
    SliceLayer,
    SliceLinear,
    get_slice_model,
    list_targets,
    ops,
    track_memory,
)
from tests.configs import slices_alone
from tests.repo.test_architecture import ENV, TRAIN, run_without
from tests.two_processes import pair

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo backend")
    with pair(tmp_path_factory.mktemp("faq")) as run:
        yield run


class Net(nn.Module):
    """Embedding, two blocks, a head: enough for every row that is not about a library."""

    def __init__(self, width: int = 24, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 40), nn.GELU(), nn.Dropout(dropout), nn.Linear(40, width)
            )
            for _ in range(2)
        )
        self.classifier = nn.Linear(width, 3)
        self.reentrant: bool | None = None  # activation checkpointing, of either kind

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + (
                block(x)
                if self.reentrant is None
                else checkpoint(block, x, use_reentrant=self.reentrant)
            )
        return self.classifier(x.mean(1))


def sliced(
    interval: int | None = 3,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    **options: Any,
) -> Any:
    torch.manual_seed(0)
    options = {"modules_to_save": ["classifier"], **options}
    return get_slice_model(
        Net(dropout=dropout).to(dtype),
        slices_alone(r=4, switch_interval=interval, **options),
    )


def batch(step: int = 0, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 50, (size, 6), generator=generator), torch.randint(
        0, 3, (size,), generator=generator
    )


def loss_of(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).float(), labels)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, micro: int = 1
) -> list[float]:
    losses = []
    for step in steps:
        ids, labels = batch(step)
        optimizer.zero_grad()
        total = 0.0
        for i, y in zip(ids.chunk(micro), labels.chunk(micro), strict=True):
            part = loss_of(model, i, y) / micro
            part.backward()
            total += part.item()
        optimizer.step()
        losses.append(total)
    return losses


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def dense_slice_gradients(model: nn.Module, step: int = 0) -> list[torch.Tensor]:
    """Slice gradients and those of the head, cut out of an ordinary model's full gradients."""
    plain = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    plain.requires_grad_(True)
    loss_of(plain, *batch(step)).backward()
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, SliceLayer):
            found.append(plain.get_submodule(name).weight.grad[:, layer.slice_cols])  # type: ignore[index, union-attr]
    return [*found, plain.classifier.weight.grad, plain.classifier.bias.grad]  # type: ignore[list-item, union-attr]


def test_faq_01_gradient_accumulation():
    one, four = sliced(), sliced()
    losses = train(one, SliceAdamW(one.parameters(), lr=1e-2), range(7))
    again = train(four, SliceAdamW(four.parameters(), lr=1e-2), range(7), micro=4)
    assert again == pytest.approx(losses, rel=1e-5)
    assert [m.schedule.steps for m in four.modules() if isinstance(m, SliceLayer)] == [
        7
    ] * 4  # four batches, one update
    torch.testing.assert_close(weights(four), weights(one), rtol=0, atol=2e-5)
    with pytest.raises(
        RuntimeError,
        match="use SliceAdamW.*optimizer_in_bwd=False.* for gradient accumulation",
    ):
        in_bwd = sliced()
        train(
            in_bwd,
            SliceAdamW(in_bwd.parameters(), optimizer_in_bwd=True),
            range(1),
            micro=2,
        )


def test_faq_02_gradient_clipping():
    model = sliced()
    expected = dense_slice_gradients(model)
    norm = torch.stack([g.norm() for g in expected]).norm()
    loss_of(model, *batch()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1 * norm.item())
    clipped = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(clipped) == len(expected)
    torch.testing.assert_close(
        torch.stack([g.norm() for g in clipped]).norm(), 0.1 * norm, rtol=1e-4, atol=0
    )
    model.zero_grad()
    loss_of(model, *batch()).backward()
    torch.nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.requires_grad], 10 * norm.item()
    )  # no effect
    torch.testing.assert_close(
        sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None),
        sorted(g.norm().item() for g in expected),
    )


def test_faq_03_gradient_norm_is_seen():
    model = sliced()
    expected = torch.stack([g.norm() for g in dense_slice_gradients(model)]).norm()
    loss_of(model, *batch()).backward()
    torch.testing.assert_close(
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9), expected, rtol=1e-5, atol=0
    )
    assert expected > 0


def test_faq_04_lr_scheduler():
    model = sliced(interval=None)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    rates = [1.0, 0.0, 0.5]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rates[min(step, 2)]
    )
    moved = []
    for step in range(3):
        before = weights(model)
        train(model, optimizer, range(step, step + 1))
        moved.append(
            max(
                (value - before[name]).abs().max().item()
                for name, value in weights(model).items()
            )
        )
        scheduler.step()
    assert moved[0] == pytest.approx(
        1e-2, rel=1e-3
    )  # Adam's first step has the size of the learning rate
    assert moved[1] == 0 and 1e-3 < moved[2] < 6e-3
    assert optimizer.param_groups[0]["lr"] == 0.005


def test_faq_05_state_saves_resumes_and_loads_safely():
    options = {"state_on_switch": "remember", "switch_mode": "random"}
    whole = sliced(interval=2, **options)
    optimizer = SliceAdamW(whole.parameters(), lr=1e-2)
    train(whole, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses = train(whole, optimizer, range(5, 30))  # more than a sweep: moments come back
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # tensors and numbers only
    again = sliced(interval=2, **options)
    resumed = SliceAdamW(again.parameters(), lr=1.0)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(again, resumed, range(5, 30)) == losses
    assert all(
        torch.equal(value, whole.state_dict()[name])
        for name, value in again.state_dict().items()
    )


def ddp() -> dict[str, Any]:
    model = sliced()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = SliceAdamW(wrapped.parameters(), lr=1e-2)
    for step in range(5):
        ids, labels = batch(step)
        mine = slice(dist.get_rank() * 32, dist.get_rank() * 32 + 32)
        optimizer.zero_grad()
        loss_of(wrapped, ids[mine], labels[mine]).backward()
        optimizer.step()
    largest = max(p.grad.numel() for p in model.parameters() if p.grad is not None)
    return {"weights": weights(model), "largest": largest}


def test_faq_06_ddp(both):
    first, second = both(ddp)
    assert all(
        torch.equal(first["weights"][name], value)
        for name, value in second["weights"].items()
    )
    alone = sliced()
    train(alone, SliceAdamW(alone.parameters(), lr=1e-2), range(5))
    torch.testing.assert_close(first["weights"], weights(alone), rtol=0, atol=1e-5)
    assert first["largest"] == 40 * 4  # a slice of 4 columns; a weight has 960


def fsdp2() -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = sliced()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    for step in range(8):
        ids, labels = batch(step)
        mine = slice(dist.get_rank() * 32, dist.get_rank() * 32 + 32)
        optimizer.zero_grad()
        loss_of(model, ids[mine], labels[mine]).backward()
        optimizer.step()
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def test_faq_07_a_changing_set_trains_under_fsdp(both):
    alone = sliced()
    before = weights(alone)
    parameters = {name: (p, p.requires_grad) for name, p in alone.named_parameters()}
    train(alone, SliceAdamW(alone.parameters(), lr=1e-2), range(8))  # two moves
    for name, (parameter, flag) in parameters.items():
        assert (
            dict(alone.named_parameters())[name] is parameter
            and parameter.requires_grad is flag
        )  # never toggled
    for sharded in both(fsdp2):
        torch.testing.assert_close(sharded, weights(alone), rtol=0, atol=1e-5)
        changed = (sharded["blocks.0.0.weight"] != before["blocks.0.0.weight"]).any(0)
        assert changed.tolist() == [True] * 12 + [False] * 12  # three positions


def test_faq_08_moves_need_no_callback():
    for make in (
        SliceAdamW,
        torch.optim.SGD,
        lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
    ):
        model = sliced(interval=2)
        before = weights(model)
        train(
            model,
            make([p for p in model.parameters() if p.requires_grad], lr=1e-2),
            range(6),
        )
        after = weights(model)
        changed = (before["blocks.1.3.weight"] != after["blocks.1.3.weight"]).any(0)
        assert changed.tolist() == [True] * 12 + [False] * 28
    plain = Net()
    with pytest.raises(ValueError, match="make slices first"):
        SliceAdamW(plain.parameters())


def test_faq_09_no_table_of_architectures():
    class Unheard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zeta, self.stack = (
                nn.Linear(8, 8),
                nn.ModuleDict({"eta_in": nn.Linear(8, 8), "eta": nn.Linear(8, 8)}),
            )

    def matched(targets: Any) -> list[str]:
        return [
            match.name
            for match in list_targets(Unheard(), slices_alone(r=2, target_modules=targets))
        ]

    assert matched("all-linear") == ["zeta", "stack.eta_in", "stack.eta"]
    assert matched(["eta"]) == ["stack.eta"] and matched(r"stack\..*") == [
        "stack.eta_in",
        "stack.eta",
    ]


def kept_for_backward(run: Any) -> int:
    """Bytes of activations that autograd holds after a forward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def test_faq_11_column_slices_keep_only_their_columns():
    peft = pytest.importorskip("peft")
    x = torch.randn(32, 64)
    kept = {}
    for kind in ("column", "row"):
        layer = SliceLinear.from_linear(
            nn.Linear(64, 64), slices_alone(r=4, slice_type=kind)
        )
        kept[kind] = kept_for_backward(lambda layer=layer: layer(x))
    lora = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(r=4, target_modules=["0"])
    )
    kept["lora"] = kept_for_backward(lambda: lora(x))
    assert (
        kept["column"] == 32 * 4 * 4
        and kept["row"] == 32 * 64 * 4
        and kept["lora"] >= 32 * 64 * 4
    )
    documents = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert "column" in documents and "row" in documents


def test_faq_12_memory_is_told_with_its_parts():
    from slicefine.plan.tracker import KINDS

    model = sliced()
    optimizer = SliceAdamW(model.parameters())
    train(model, optimizer, range(1))
    with track_memory(batch(1), model=model, optimizer=optimizer) as report:
        train(model, optimizer, range(1, 2))
    assert (
        report.breakdown.keys() == set(KINDS)
        and sum(report.breakdown.values()) == report.peak_bytes
    )
    assert (
        report.breakdown["weights"] >= sum(p.nbytes for p in model.parameters())
        and report.breakdown["activations"] > 0
    )
    import json

    results = sorted((ROOT / "benchmarks" / "results" / "peft_comparison").glob("*.json"))
    for path in results:  # on a GPU reserved memory: its maximum, 99th percentile and mean; and for what batch
        result = json.loads(path.read_text(encoding="utf-8"))
        keys = {
            "accelerator_memory_max",
            "accelerator_memory_reserved_99th",
            "accelerator_memory_reserved_avg",
        }
        assert keys <= result["train_info"].keys()
        assert {"batch_size", "max_seq_length"} <= result["run_info"]["train_config"].keys()
    assert results


def test_faq_14_bfloat16_updates_do_not_vanish():
    model, plain = sliced(dtype=torch.bfloat16, interval=None), Net().to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    name, before = "blocks.0.0.weight", model.blocks[0][0].weight.clone()
    train(model, SliceAdamW(model.parameters(), lr=1e-5), range(100))
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0), range(100))
    large = before[:, :4].abs() > 0.05  # half a bfloat16 step there is larger than 1e-5
    moved = (model.state_dict()[name][:, :4] != before[:, :4])[large].float().mean()
    vanished = (plain.state_dict()[name][:, :4] != before[:, :4])[large].float().mean()
    assert moved > 0.3 and vanished == 0
    stochastic = sliced(dtype=torch.bfloat16, interval=None)
    train(
        stochastic,
        SliceAdamW(stochastic.parameters(), lr=1e-5, bf16_stochastic_round=True),
        range(1),
    )
    changed = (stochastic.state_dict()[name][:, :4] != before[:, :4]).float().mean()
    assert 0.005 < changed < 0.5  # one step moves a few, in expectation by 1e-5 each


def test_faq_15_fp16_grad_scaler():
    model = sliced(dtype=torch.float16)
    assert all(
        p.dtype == torch.float32 for n, p in model.named_parameters() if "slice_weight" in n
    )
    optimizer = SliceAdamW(
        [p for n, p in model.named_parameters() if "slice_weight" in n], lr=1e-2
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # pyright: ignore[reportPrivateImportUsage]
    before = weights(model)
    for step, spoil in enumerate((False, True, False)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, *batch(step))).backward()
        if spoil:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(
                float("inf")
            )
        scaler.unscale_(
            optimizer
        )  # raised "Attempting to unscale FP16 gradients" elsewhere
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    steps = [m.schedule.steps for m in model.modules() if isinstance(m, SliceLayer)]
    assert (
        steps == [2] * 4 and scaler.get_scale() == 2.0**9
    )  # the overflow was skipped and counted nowhere
    assert (weights(model)["blocks.0.0.weight"] != before["blocks.0.0.weight"]).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_faq_16_checkpointing_with_frozen_embeddings(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    get_slice_model(model, slices_alone(r=4, modules_to_save=["classifier"]))
    plain = copy.deepcopy(model)
    old, new = (
        "gradient_checkpointing_enable",
        "activation_checkpointing_enable",
    )  # transformers 4 and 5
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": reentrant})
    ids, labels = batch(size=4)
    for m in (model, plain):
        m(input_ids=ids, labels=labels % 2).loss.backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "embeddings" not in name:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_faq_17_checkpointing_compile_and_dropout():
    torch._dynamo.reset()
    model = sliced(dropout=0.5, interval=1)
    model.reentrant = False
    twin = copy.deepcopy(model)
    twin.reentrant = None
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [SliceAdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for step in range(4):
        results = []
        for run, optimizer in zip((compiled, twin), optimizers, strict=True):
            torch.manual_seed(step)  # the same dropout
            results.append(train(run, optimizer, range(step, step + 1))[0])
        assert results[0] == pytest.approx(
            results[1], rel=1e-5
        )  # a mask drawn anew in backward would show after one update
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=2e-5)


def test_faq_19_target_modules():
    model = Net()
    names = [
        m.name
        for m in list_targets(model, slices_alone(r=2, target_modules=["0.0", "1.3"]))
    ]
    assert names == [
        "blocks.0.0",
        "blocks.1.3",
    ]  # a list is suffixes, a string one regular expression for the whole name
    assert [
        m.name
        for m in list_targets(model, slices_alone(r=2, target_modules=r"blocks\.1\..*3"))
    ] == ["blocks.1.3"]
    everything = list_targets(model, slices_alone(r=2))
    assert [m.name for m in everything if m.skipped is None] == [
        f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 3)
    ]
    with pytest.raises(ValueError) as error:
        list_targets(
            model, slices_alone(r=2, target_modules=["0.0", "clasifier", "q_proj"])
        )
    assert "'clasifier': nothing matches; nearest names: classifier" in str(
        error.value
    ) and "'q_proj'" in str(error.value)


def test_faq_22_compile_has_no_graph_break():
    torch._dynamo.reset()
    model = sliced()
    explained = torch._dynamo.explain(copy.deepcopy(model))(batch()[0])
    assert explained.graph_break_count == 0
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = loss_of(whole, *batch())
    loss.backward()
    expected = sliced()
    loss_of(expected, *batch()).backward()
    for (name, mine), theirs in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_faq_23_ten_moves_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = sliced(interval=1)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    train(compiled, SliceAdamW(model.parameters(), lr=1e-2), range(11))
    assert counter.frame_count == 1
    assert {m.schedule.moves for m in model.modules() if isinstance(m, SliceLayer)} == {11}


def test_faq_24_update_in_backward_is_refused_under_compile():
    torch._dynamo.reset()
    model = sliced()
    optimizer = SliceAdamW(model.parameters(), optimizer_in_bwd=True)
    with pytest.raises(
        Exception,
        match="optimizer_in_bwd=True does not work under torch.compile; use SliceAdamW without it",
    ):
        torch.compile(model, backend="eager", fullgraph=True)(batch()[0])
    assert optimizer.optimizer_in_bwd


def test_faq_25_more_than_one_device(both):
    """DDP and FSDP2 have rows of their own (6, 7); here device maps. Two real GPUs have not been
    run.
    """
    accelerate = pytest.importorskip("accelerate")
    model, plain = sliced(), sliced()
    for m in (
        accelerate.dispatch_model(model, {"": "cpu"}),
        plain,
    ):  # slices first, then a device map
        train(m, SliceAdamW(m.parameters(), lr=1e-2), range(4))
    assert all(
        torch.equal(value, weights(plain)[name]) for name, value in weights(model).items()
    )
    devices = {"embedding": "cpu", "blocks": "cpu", "classifier": "cpu"}
    dispatched = accelerate.dispatch_model(
        Net(), devices, main_device="cpu", force_hooks=True
    )
    before = dispatched(batch()[0])
    get_slice_model(
        dispatched, slices_alone(r=4, switch_interval=3, modules_to_save=["classifier"])
    )  # and the other order
    assert torch.equal(dispatched(batch()[0]), before)
    layer: Any = dispatched.blocks[0][0]
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(type(module)))
    start = weights(dispatched)
    train(dispatched, SliceAdamW(dispatched.parameters(), lr=1e-2), range(4))
    assert seen and all(
        issubclass(kind, SliceLayer) for kind in seen
    )  # the slice is called, not what it replaced
    assert (weights(dispatched)["blocks.0.0.weight"] != start["blocks.0.0.weight"]).any(
        0
    ).sum() == 8
    trained = dispatched(batch()[0])
    assert torch.equal(dispatched.merge_and_unload()(batch()[0]), trained)  # type: ignore[operator]
    assert type(dispatched.blocks[0][0]) is nn.Linear and hasattr(
        dispatched.blocks[0][0], "_hf_hook"
    )
    with pytest.raises(
        ValueError, match="has its weight on the meta device.*a device map that offloads"
    ):
        get_slice_model(
            accelerate.cpu_offload(Net()), slices_alone(r=4, modules_to_save=["classifier"])
        )


def test_faq_26_hooks_and_keys_are_kept():
    plain, calls = Net(), []
    keys, layers = (
        list(plain.state_dict()),
        [m for m in plain.modules() if type(m) is nn.Linear],
    )
    layers[0].register_forward_hook(
        lambda module, inputs, output: calls.append(type(module))
    )
    layers[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    layers[2].register_forward_pre_hook(lambda module, inputs: calls.append("pre"))
    model = get_slice_model(plain, slices_alone(r=4, modules_to_save=["classifier"]))
    loss_of(model, *batch()).backward()
    assert calls == [SliceLinear, "pre", "backward"]
    assert list(model.state_dict()) == keys
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == len(layers)
    assert sum(isinstance(m, SliceLayer) for m in model.modules()) == 4


def test_faq_28_the_compiled_module_knows_nothing_of_torch():
    from slicefine.backends import cpu

    path = getattr(sys.modules.get("slicefine._C"), "__file__", None)
    if path is None:
        pytest.skip(f"no compiled module here: {cpu.unavailable}")
    binary = Path(path).read_bytes()
    assert not any(
        word in binary
        for word in (b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10", b"_ZN5torch")
    )
    assert b"pybind11" in binary  # the words would be found


def test_faq_29_one_wheel_serves_every_torch():
    # it loads where there is no torch at all, so there is no torch that it was built for; Triton
    # needs no build
    result = run_without(
        "torch", "import importlib.machinery, importlib.util, pathlib\n" + _LOAD
    )
    built = sorted((ROOT / "slicefine").glob("_C.*.so")) or sorted(
        (ROOT / "slicefine").glob("_C.*.pyd")
    )
    assert result.stdout.strip() == ("loaded" if built else "not built"), (
        result.stdout + result.stderr
    )
    assert (ROOT / "kernels" / "slicefine_kernels" / "slice_grad.py").exists()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'"torch>=[\d.]+"', project)  # a lower bound and no upper one


_LOAD = """
found = sorted(pathlib.Path("slicefine").glob("_C.*" + importlib.machinery.EXTENSION_SUFFIXES[-1])) or sorted(pathlib.Path("slicefine").glob("_C.*.so"))
if found:
    spec = importlib.util.spec_from_file_location("slicefine._C", found[0])
    importlib.util.module_from_spec(spec)
print("loaded" if found else "not built")
"""


def test_faq_30_builds_without_torch():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    system = project[project.index("[build-system]") : project.index("[project]")]
    assert "requires" in system and "torch" not in system
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        node.module
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert imported <= {"setuptools", "os", "sys", "pathlib", "__future__"}
    lines = [
        line.split("#")[0]
        for p in (ROOT / "csrc").glob("*.cmake")
        for line in p.read_text().splitlines()
    ]
    lines += [
        line.split("#")[0]
        for line in (ROOT / "csrc" / "CMakeLists.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert any("pybind11" in line for line in lines) and not any(
        "torch" in line.lower() for line in lines
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """A process that trains with nothing on its PATH, and then says whether it has imported the
    Triton kernels.
    """
    paths = {
        "PATH": str(tmp_path_factory.mktemp("empty")),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    code = textwrap.dedent(
        TRAIN + "\n    import sys\n    print('slicefine_kernels.slice_grad' in sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_faq_31_no_compiler_at_run_time_and_reasons_for_what_is_missing(bare):
    assert bare.stdout.split()[:1] == ["trained"], (
        bare.stderr
    )  # neither nvcc nor a C compiler
    with (
        pytest.raises(ValueError, match="no backend 'cudnn'.*reference"),
        ops.use_backend("cudnn"),
    ):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError) as error, ops.use_backend("cuda"):
            ops.slice_grad(torch.randn(2, 3), torch.randn(2, 3))
        assert "cuda" in str(error.value) and len(str(error.value)) > 60


def test_faq_32_no_silent_fallback(caplog):
    code = """
        import logging, torch, slicefine
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        model = slicefine.get_slice_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), slicefine.SliceConfig(r=2))
        optimizer = slicefine.SliceAdamW(model.parameters())
        for _ in range(3):
            model(torch.randn(3, 8)).sum().backward()
            optimizer.step()
        """
    result = run_without("slicefine._C", code)
    lines = [
        line for line in result.stderr.splitlines() if "slicefine runs on backend" in line
    ]
    assert len(lines) == 1 and "'reference'" in lines[0] and "slicefine._C" in lines[0], (
        result.stderr
    )  # once, with its reason
    broken = run_without("torch", ENV)
    assert (
        broken.returncode == 0
        and "torch imports:      broken: ModuleNotFoundError" in broken.stdout
    ), broken.stderr
    assert logging.getLogger("slicefine") is not None


def test_faq_33_no_hard_dependency_on_triton():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    marker = next(
        line for line in project.splitlines() if line.strip().startswith('"triton')
    )
    from packaging.requirements import Requirement

    requirement = Requirement(marker.strip().strip(",").strip('"'))
    assert requirement.marker is not None
    for system, expected in (("Linux", True), ("Windows", False), ("Darwin", False)):
        assert (
            requirement.marker.evaluate(
                {"platform_system": system, "platform_machine": "x86_64"}
            )
            is expected
        )
    result = run_without("triton", TRAIN)
    assert result.stdout.strip() == "trained", result.stderr


def test_faq_34_triton_is_imported_late(bare):
    assert bare.stdout.split() == [
        "trained",
        "False",
    ], bare.stderr  # on a CPU the kernels are never imported
    matrix = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert re.search(
        r"torch, Triton, Python \| \d[\d.]+, \d[\d.]+, \d[\d.]+ and \d[\d.]+, \d[\d.]+, \d[\d.]+",
        matrix,
    )


def test_faq_35_amd():
    """Compiled ahead of time for HIP, wavefronts of 64, by tests/ops/test_kernels_aot.py too; not
    run on AMD hardware.
    """
    pytest.importorskip("triton")
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "kernels").rglob("*.py")]
    assert sources and not any("libdevice" in source for source in sources)
    from tests.ops.test_kernels_aot import compiled

    code = """if True:
        from benchmarks import aot
        seen = set()
        for variant in aot.variants("gfx942"):
            if variant.kernel not in seen:  # the first configuration of every kernel
                seen.add(variant.kernel)
                kernel = variant.compile("gfx942")
                text = kernel.asm["amdgcn"]
                assert ".wavefront_size: 64" in text and "ocml" not in text.lower()
                print(variant.kernel, aot.resources(kernel, "gfx942")["spill_bytes"])
        """
    result = compiled(code=code)
    lines = dict(line.split() for line in result.stdout.splitlines())
    assert result.returncode == 0, result.stderr
    assert len(lines) >= 3 and set(lines.values()) == {"0"}


def test_faq_36_the_loss_is_never_touched():
    plain = Net()
    expected = loss_of(plain, *batch())
    model = get_slice_model(plain, slices_alone(r=4, modules_to_save=["classifier"]))
    SliceAdamW(model.parameters())
    assert torch.equal(loss_of(model, *batch()), expected)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    ids, labels = batch()
    loss_of(whole, ids, labels).backward()
    sizes = (10, 54)  # unequal micro-batches, weighed by whoever owns the loss
    for i, y in zip(ids.split(sizes), labels.split(sizes), strict=True):
        F.cross_entropy(parts(i), y, reduction="sum").div(64).backward()
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_faq_37_new_heads_train_all_the_time():
    model = sliced(interval=2)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    head = nn.Linear(24, 3)
    head.load_state_dict(model.classifier.state_dict())
    reference = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0)
    for step in range(6):  # three moves beside it
        before = model.classifier.weight.clone()
        train(model, optimizer, range(step, step + 1))
        for mine, theirs in zip(
            head.parameters(), model.classifier.parameters(), strict=True
        ):
            mine.grad = theirs.grad.clone()
        reference.step()
        assert not torch.equal(before, model.classifier.weight)
    torch.testing.assert_close(
        dict(model.classifier.state_dict()), dict(head.state_dict()), rtol=0, atol=1e-7
    )
    with pytest.warns(
        UserWarning, match="classifier is fully trained, as a new output head"
    ):
        model = get_slice_model(Net(), slices_alone(r=4))
    assert all(p.requires_grad for p in model.classifier.parameters())


def test_faq_38_coverage_is_known_before_the_run():
    model = sliced(interval=2)
    said = model.planned_coverage(7)
    assert (
        "7 steps, interval 2, r 4: 4 positions, 67 % of each 24-wide weight (2 layers)"
        in said
    )
    assert (
        "7 steps, interval 2, r 4: 4 positions, 40 % of each 40-wide weight (2 layers)"
        in said
    )
    before = weights(model)
    train(model, SliceAdamW(model.parameters(), lr=1e-2), range(7))
    coverage = model.coverage()
    for name, share in coverage.items():
        changed = (
            (model.state_dict()[f"{name}.weight"] != before[f"{name}.weight"])
            .any(0)
            .float()
            .mean()
            .item()
        )
        assert share == pytest.approx(changed)  # what was reported is what has changed
    assert sorted(set(coverage.values())) == pytest.approx([0.4, 2 / 3])


def test_the_public_interface_is_what_these_rows_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {
            "SliceAdamW",
            "SliceConfig",
            "get_slice_model",
            "list_targets",
            "track_memory",
        } <= set(slicefine.__all__)


PAGE = ROOT / "docs" / "faq.md"


def test_the_page_and_the_tests_agree():
    """38 rows, each with an answer and the name of a test; each test of a row stands on the page."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdigit():
            number, question, answer, test = cells
            assert question.endswith("?") and answer, line
            assert int(number) not in rows, number
            rows[int(number)] = test.strip("`")
    assert sorted(rows) == list(range(1, 39))
    sources = [
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    ]
    written = set(re.findall(r"^def (test_faq_\d\d_\w+)", "\n".join(sources), re.M))
    for number, test in rows.items():
        assert test.startswith(f"test_faq_{number:02}_") and test in written, test
    assert {int(name[9:11]) for name in written} == rows.keys()
