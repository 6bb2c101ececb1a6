"""PaCA and SHiRA adapters, read and written. SHiRA is held to PEFT itself; PaCA, which PEFT has since
0.22 (not in the registry here), to what its source computes.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slicefine import (
    Delta,
    DeltaError,
    SliceAdamW,
    SliceModel,
    get_slice_model,
)
from slicefine.deltas.peft_formats import read_adapter, to_paca, to_shira
from tests.configs import slices_alone

peft = pytest.importorskip("peft")
# torch, of the sparse tensors that PEFT makes
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 16)
        self.head = nn.Linear(16, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def trained(config, dtype=torch.float32, steps=5):
    model = get_slice_model(Net(dtype), config)
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randn(8, 12, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
    return model


def columns(**more):
    settings = {"r": 3, "target_modules": ["first", "second"], "modules_to_save": []}
    return slices_alone(
        **{**settings, "contiguous": False, "switch_interval": None, **more}
    )


X = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("save", [None, ["head"]])
def test_peft_trains_shira_and_we_read_it_bit_for_bit(tmp_path, save):
    config = peft.ShiraConfig(
        r=1, target_modules=["first", "second"], random_seed=1, modules_to_save=save
    )
    adapted = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path)
    base = Net()
    delta = read_adapter(tmp_path, base)
    SliceModel.from_pretrained(base, delta)
    assert torch.equal(base(X), adapted(X))
    base.revert()
    assert torch.equal(base(X), Net()(X)) or save


@pytest.mark.parametrize("slice_type", ["column", "row", "block"])
def test_peft_reads_the_shira_that_we_write(tmp_path, slice_type):
    model = trained(columns(slice_type=slice_type, r=2, switch_interval=2))
    adapter = to_shira(model.delta())
    adapter.save(tmp_path)
    served = peft.PeftModel.from_pretrained(Net(), tmp_path)
    merged = served.merge_and_unload()
    assert_same_weights(merged, model, adapter.error)
    # and back
    again = SliceModel.from_pretrained(Net(), read_adapter(tmp_path, Net()))
    assert_same_weights(again, merged, 0.0)


def assert_same_weights(model, other, error):
    """The error that an export states is the error that it has."""
    differences = [
        (getattr(model, name).weight - getattr(other, name).weight).abs().max().item()
        for name in ("first", "second")
    ]
    assert max(differences) == error <= 2**-25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_paca_adapter_goes_out_and_comes_back(tmp_path, dtype):
    model = trained(columns(), dtype)
    adapter = to_paca(model.delta())
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PACA" and config["r"] == 3
    # what peft/tuners/paca/layer.py (at 51203ba) does with it before its product
    base = Net(dtype)
    for name in ("first", "second"):
        idx = tensors[f"base_model.model.{name}.paca_indices"]
        values = tensors[f"base_model.model.{name}.paca_delta"]
        weight = getattr(base, name).weight.detach()
        original = weight.index_select(1, idx)
        out = torch.empty_like(original)
        torch.add(original, values, alpha=config["paca_alpha"] / config["r"], out=out)
        weight.index_copy_(1, idx, out)
    assert adapter.error == 0 or dtype == torch.float32
    assert_same_weights(base, model, adapter.error)
    # read, it is a delta like any other
    read_adapter(tmp_path, Net(dtype)).save(tmp_path / "delta")
    again = SliceModel.from_pretrained(Net(dtype), Delta.load(tmp_path / "delta"))
    assert_same_weights(again, base, 0.0)


def paca_folder(folder, **changed):
    values = {
        "base_model.model.first.paca_delta": torch.randn(20, 2),
        "base_model.model.first.paca_indices": torch.tensor([7, 2]),
        "base_model.model.head.weight": torch.randn(3, 16),
        "base_model.model.head.bias": torch.randn(3),
    }
    values.update(changed)
    folder.mkdir(exist_ok=True)
    save_file(
        {k: v for k, v in values.items() if v is not None},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "PACA", "r": 2, "paca_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return values


def test_scaling_order_and_heads_of_paca(tmp_path):
    values = paca_folder(tmp_path)
    base = Net()
    weight = base.first.weight.detach().clone()
    weight[:, [7, 2]] += 2 * values["base_model.model.first.paca_delta"]
    delta = read_adapter(tmp_path, base)
    before = copy.deepcopy(base.state_dict())
    SliceModel.from_pretrained(base, delta)
    assert torch.equal(base.first.weight, weight)
    assert torch.equal(base.head.weight, values["base_model.model.head.weight"])
    base.revert()
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"first.paca_indices": None}, "expected paca_indices too"),
        ({"first.paca_indices": torch.tensor([0, 12])}, "positions 0 to 12 of 12"),
        ({"first.paca_delta": torch.randn(20, 3)}, r"\(20, 3\) values for 2 columns"),
        ({"head.weight": torch.randn(4, 16)}, r"head.weight is \(4, 16\) in the adapter"),
        ({"third.paca_delta": torch.randn(1, 1)}, "the model has no third"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(tmp_path, changed, words):
    paca_folder(tmp_path, **{f"base_model.model.{k}": v for k, v in changed.items()})
    with pytest.raises(DeltaError, match=words):
        read_adapter(tmp_path, Net())


def test_what_is_not_exact_is_refused(tmp_path):
    moving = trained(columns(slice_type="row")).delta()
    with pytest.raises(DeltaError, match="rows or blocks; PaCA holds whole columns"):
        to_paca(moving)
    uneven = trained(columns(rank_pattern={"second": 4})).delta()
    with pytest.raises(DeltaError, match="one r for all layers; first has 3 .* second 4"):
        to_paca(uneven)
    with_bias = trained(columns(bias="slice_only")).delta()
    for export in (to_paca, to_shira):
        with pytest.raises(DeltaError, match="trained beside the slices"):
            export(with_bias)
    with pytest.raises(DeltaError, match="exact for float32 only"):
        to_shira(trained(columns(), torch.bfloat16).delta())
    with pytest.raises(DeltaError, match="too much has changed"):
        to_shira(trained(columns(r=12), steps=2).delta())
    trained(columns()).save_pretrained(tmp_path / "delta")
    with pytest.raises(DeltaError, match="holds a slicefine delta"):
        to_paca(trained(columns()).delta()).save(tmp_path / "delta")
    lora = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(DeltaError, match="holds a LORA adapter"):
        read_adapter(tmp_path / "lora", Net())
