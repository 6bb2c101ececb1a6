"""Every family of models of tests/families.py, trained beside a dense masked run of the same model; what is refused, and how."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from torch import Tensor, nn

from slicefine import SliceAdamW, SliceConfig, SliceLinear, get_slice_model

STEPS, INTERVAL, LR = 5, 2, 1e-2


def build(family: Family) -> nn.Module:
    """The model in float64 with random weights, dropout off."""
    torch.manual_seed(0)
    library: Any = pytest.importorskip(family.library)
    if family.library == "timm":
        return library.create_model(family.model, **family.sizes).double().eval()
    config = getattr(library, family.config)(**family.sizes)
    model = getattr(library, family.model)(config).double().eval()
    if family.parameters:
        model.set_experts_implementation("eager")  # the one that takes float64
    return model


def loss_of(model: Any, family: Family, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 39, (3, 6), generator=generator)
    size = 32 if "convnext" in family.model else 16
    image = torch.randn(3, 3, size, size, generator=generator, dtype=torch.float64)
    if family.inputs == "image_text":
        return model(input_ids=tokens, pixel_values=image, return_loss=True).loss
    if family.inputs == "seq2seq":
        return model(input_ids=tokens, labels=tokens.flip(1)).loss
    if family.inputs == "tokens":
        causal = family.model.endswith(("CausalLM", "LMHeadModel"))
        return model(input_ids=tokens, labels=tokens if causal else tokens[:, 0] % 2).loss
    out = model(image)
    logits = getattr(out, "logits", out)
    return nn.functional.cross_entropy(logits, tokens[:, 0] % logits.shape[-1])


class DenseMasked:
    """torch's dense AdamW on whole weights whose gradients are masked; its state starts anew wherever the slice has moved.

    The slices are written from the definition: r neighbouring features, one position further every INTERVAL steps.
    """

    def __init__(self, weights: dict[str, Tensor], transposed: set[str], r: int, slice_type: str) -> None:
        self.weights, self.transposed, self.r, self.slice_type = weights, transposed, r, slice_type
        for weight in weights.values():
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(weights.values(), lr=LR, weight_decay=0.0)
        self.visited = {name: torch.zeros(w.shape, dtype=torch.bool) for name, w in weights.items()}

    def mask(self, name: str, step: int) -> Tensor:
        move = step // INTERVAL
        column = self.slice_type == "column" or move % 2 == 0
        turn = move if self.slice_type == "column" else move // 2
        mask = torch.zeros(self.weights[name].shape, dtype=torch.bool)
        view = mask.t() if name in self.transposed else mask  # (..., out, in)
        features = view.shape[-1] if column else view.shape[0]
        start = min(turn % -(-features // self.r) * self.r, features - self.r)
        if column:
            view[..., start : start + self.r] = True
        else:
            view[start : start + self.r] = True
        return mask

    def step(self, step: int) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None, f"{name} has no gradient"
            mask = self.mask(name, step)
            weight.grad.mul_(mask)
            self.visited[name] |= mask
        self.optimizer.step()
        for name, weight in self.weights.items():
            if not torch.equal(self.mask(name, step), self.mask(name, step + 1)):
                self.optimizer.state.pop(weight, None)


@pytest.mark.parametrize("slice_type", ["column", "row_column"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.filterwarnings("ignore:.*stays as it is")
def test_family(family: Family, slice_type: str):
    if family.parameters and slice_type != "column":
        pytest.skip("experts take column slices")
    plain = build(family).requires_grad_(False)
    keys = list(plain.state_dict())
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = get_slice_model(
        copy.deepcopy(plain),
        SliceConfig(
            r=family.r, slice_type=slice_type, switch_interval=INTERVAL, target_parameters=family.parameters or None
        ),
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SliceLinear)}
    key_of = {n: n if n not in {k.rpartition(".")[0] for k in keys} else f"{n}.weight" for n in layers}
    assert len(layers) == family.layers
    assert sorted(model.state_dict()) == sorted(keys)
    parameters = dict(plain.named_parameters())
    transposed = {n for n, layer in layers.items() if layer.fan_in_fan_out}
    oracle = DenseMasked({n: parameters[key_of[n]] for n in layers}, transposed, family.r, slice_type)
    optimizer = SliceAdamW(model.parameters(), lr=LR)
    for step in range(STEPS):
        expected, loss = loss_of(plain, family, step), loss_of(model, family, step)
        assert abs(loss.item() - expected.item()) < 1e-9
        oracle.optimizer.zero_grad()
        optimizer.zero_grad()
        expected.backward()
        loss.backward()
        oracle.step(step)
        optimizer.step()
    after = model.state_dict()
    for name in layers:
        key, visited = key_of[name], oracle.visited[name]
        torch.testing.assert_close(after[key], oracle.weights[name].detach(), rtol=0, atol=1e-9)
        assert torch.equal(after[key][~visited], before[key][~visited])
        assert bool((after[key] != before[key])[visited].any())
    sliced = set(key_of.values())
    assert all(torch.equal(after[key], before[key]) for key in keys if key not in sliced)
    trained = loss_of(model, family, 0)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, SliceLinear) for m in merged.modules())
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert list(merged.state_dict()) == keys
    assert all(torch.equal(value, after[key]) for key, value in merged.state_dict().items())
    if (
        family.parameters
    ):  # merged experts go through the implementation that is set; the default one's bits: test_experts.py
        assert abs(loss_of(merged, family, 0).item() - trained.item()) < 1e-12
    else:
        assert torch.equal(loss_of(merged, family, 0), trained)
