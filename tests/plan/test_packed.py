"""Plans of packed (quantized) bases: bytes as the library's, and the bars of the issue."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from benchmarks.memory import MODELS, rows
from slicefine import SliceAdamW, SliceConfig, get_slice_model, track_memory
from slicefine.plan import methods
from slicefine.plan.estimate import estimate
from slicefine.plan.modes import MODES
from slicefine.plan.packed import PackedLinear, with_base
from slicefine.plan.workloads import workload
from tests.modules.packed import available, pack, pack_linear
from tests.plan.test_estimate import tiny

GIB = 2**30


def bytes_of(module: nn.Module) -> int:
    tensors = {id(t): t for t in module.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_layer_has_the_bytes_of_the_librarys(kind):
    if reason := available(kind):
        pytest.skip(reason)
    linear = nn.Linear(512, 768, bias=False, dtype=torch.bfloat16)
    planned = bytes_of(PackedLinear(linear, kind))
    real = bytes_of(pack_linear(linear, kind))
    # tables of codes and a record of the settings, the same for a layer of any size
    assert planned <= real <= planned + 2048


def test_a_plan_on_nf4_is_what_a_step_takes(tmp_path):
    """Tracked tensors of real packed weights beside the plan, within 3 %."""
    if reason := available("nf4"):
        pytest.skip(reason)
    import transformers

    path = tiny(tmp_path, hidden_size=256, intermediate_size=512, vocab_size=512)
    planned = estimate(
        with_base(workload(path, torch.bfloat16), "nf4"), methods.slices(8), 2, 64
    )
    config = transformers.AutoConfig.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    pack(model, "nf4").train()
    get_slice_model(model, SliceConfig(r=8, modules_to_save=[]))
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 512, (2, 64))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with track_memory([ids], model=model, optimizer=optimizer, logits_width=512) as report:
        step()
    assert planned.base == "nf4"
    assert report.peak_bytes == pytest.approx(planned.peak_bytes, rel=0.03)


def test_the_bars_of_llama_on_nf4():
    step = MODES["lean+checkpointing"]
    small = str(MODELS / "llama-3.2-3b")
    large = str(MODELS / "llama-3.1-8b")
    ours = {
        path: estimate(
            step(with_base(workload(path, torch.bfloat16), "nf4")),
            methods.slices(16),
            *size,
        ).peak_bytes
        for path, size in ((small, (4, 768)), (large, (1, 2048)))
    }
    assert ours[small] <= 3.6 * GIB and ours[large] <= 7.5 * GIB
    peft = pytest.importorskip("slicefine.plan.peft")
    made = step(with_base(workload(small, torch.bfloat16), "nf4"))
    assert ours[small] < estimate(made, peft.method("LoRA", 16), 4, 768).peak_bytes


def test_rows_say_which_base_they_are_of(tmp_path):
    path = tiny(tmp_path)
    found = list(rows([path], 2, 16, r=4, quick=True, modes=["eager", "compiled"]))
    by_base = {(row["mode"], row["base"]) for row in found}
    # products with packed weights are not compiled
    assert by_base == {
        ("eager", "bf16"),
        ("eager", "int8"),
        ("eager", "nf4"),
        ("compiled", "bf16"),
    }
    assert {row["dtype"] for row in found} == {"bf16"}
    peaks = {
        row["base"]: row["weights"]
        for row in found
        if row["method"] == "frozen baseline" and row["mode"] == "eager"
    }
    assert peaks["nf4"] < peaks["int8"] < peaks["bf16"]
    json.dumps(found)


def test_a_base_of_another_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="base is 'int3'; expected bf16, int8 or nf4"):
        with_base(workload(tiny(tmp_path), torch.bfloat16), "int3")
