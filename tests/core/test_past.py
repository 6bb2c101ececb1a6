"""Layers whose weight is read past them, and forwards that are nn.Linear's or are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slicefine import SliceLinear, get_slice_model, list_targets
from slicefine.past import linear_forward, reads_past
from tests.configs import slices_alone


class Reads(nn.Module):
    """Every way in which a module uses, or only looks at, the weights of its layers."""

    def __init__(self, bias=None, fused=False):
        super().__init__()
        self.called, self.read, self.asked = (nn.Linear(8, 8) for _ in range(3))
        self.helped, self.either, self.by_flag = (nn.Linear(8, 8) for _ in range(3))
        self.bias, self.fused = bias, fused

    def forward(self, x):
        x = self.called(x).to(self.asked.weight.dtype)
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight is not None:
            x = self.asked(x)
        x = F.linear(x, weight=self.read.weight)
        x = self._helper(x)
        x = F.linear(x, self.either.weight) if x.is_cuda else self.either(x)
        if self.bias is None and not self.fused:
            return self.by_flag(x)
        return F.linear(x, self.by_flag.weight, self.bias)

    def _helper(self, x):
        return x @ self.helped.weight.t()

    def never_in_forward(self):
        return self.called.weight.sum()


def test_what_a_forward_reads_is_told_from_what_it_calls():
    module = Reads()
    assert reads_past(module, "called") is None and reads_past(module, "asked") is None
    assert reads_past(module, "read") == ("Reads.forward", False)
    assert reads_past(module, "helped") == ("Reads._helper", False)
    assert reads_past(module, "either") == ("Reads.forward", True)


def test_a_branch_that_this_module_does_not_take_is_left_out():
    class Branches(Reads):
        def forward(self, x):
            if self.bias is None:
                return self.by_flag(x)
            elif self.fused:
                return self.read(x)
            else:
                return F.linear(x, self.read.weight, self.bias)

    bias = torch.zeros(8)
    assert reads_past(Branches(), "read") is None
    assert reads_past(Branches(bias, fused=True), "read") is None
    name = f"{Branches.__qualname__}.forward"
    assert reads_past(Branches(bias), "read") == (name, False)


def test_all_linear_leaves_them_out_and_says_so_once():
    model = nn.Sequential(Reads(), Reads())
    with pytest.warns(UserWarning) as warned:
        get_slice_model(model, slices_alone(r=2))
    (message,) = [str(w.message) for w in warned]
    assert message.splitlines() == [
        "0.read, 1.read stay as they are: it is not called: Reads.forward reads its weight itself,"
        " so a slice would not train",
        "0.helped, 1.helped stay as they are: it is not called: Reads._helper reads its weight"
        " itself, so a slice would not train",
        "0.either, 0.by_flag, 1.either, 1.by_flag stay as they are: it is not always called:"
        " Reads.forward may read its weight instead, past a slice",
    ]
    sliced = {name for name, m in model.named_modules() if isinstance(m, SliceLinear)}
    assert sliced == {"0.called", "0.asked", "1.called", "1.asked"}


def test_naming_such_a_layer_is_an_error_unless_it_is_called_too():
    with pytest.raises(
        ValueError, match=r"^0.read is not called: Reads.forward reads its weight"
    ):
        list_targets(nn.Sequential(Reads()), slices_alone(r=2, target_modules=["read"]))
    with pytest.warns(
        UserWarning, match="0.either may train only at times: Reads.forward also"
    ):
        model = get_slice_model(
            nn.Sequential(Reads()), slices_alone(r=2, target_modules=["either"])
        )
    assert isinstance(model.get_submodule("0.either"), SliceLinear)


@pytest.mark.parametrize(
    ("name", "read"), [("beit_base_patch16_224", True), ("vit_tiny_patch16_224", False)]
)
def test_qkv_of_timm(name, read):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model(name, num_classes=0, **sizes)
    rows = {row.name: row.skipped for row in list_targets(model, slices_alone(r=2))}
    assert (rows["blocks.1.attn.qkv"] is not None) is read
    assert rows["blocks.1.attn.proj"] is None


class Matmul(nn.Linear):
    """As Falcon's."""

    def forward(self, input):
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Casting(nn.Linear):
    """As openai-whisper's."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1e3, 1e3)


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class NoBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class Scaled(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class TwoInputs(nn.Linear):
    def forward(self, x, y):
        return super().forward(x) + y


@pytest.mark.parametrize("kind", [Matmul, Casting])
@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_that_is_linear_becomes_a_slice(kind, bias):
    model = nn.Sequential(kind(6, 4, bias))
    state = torch.get_rng_state()
    assert linear_forward(model[0]) and torch.equal(torch.get_rng_state(), state)
    x = torch.randn(3, 6)
    before = model(x)
    get_slice_model(model, slices_alone(r=2))
    assert isinstance(model[0], SliceLinear)
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert model[0].slice_weight.grad.abs().min() > 0
    model.merge_and_unload()
    assert type(model[0]) is kind and torch.equal(model(x), before)


@pytest.mark.parametrize("kind", [Doubled, Clipped, Dropping, NoBias, Scaled, TwoInputs])
def test_a_forward_that_computes_something_else_is_named(kind):
    assert not linear_forward(kind(6, 4))
    with pytest.raises(
        ValueError, match=f"0 is a {kind.__name__} with a forward of its own"
    ):
        list_targets(nn.Sequential(kind(6, 4)), slices_alone(r=2, target_modules=["0"]))
    model = nn.Sequential(kind(6, 4), nn.Linear(4, 4))
    skipped = {row.name: row.skipped for row in list_targets(model, slices_alone(r=2))}
    assert skipped["1"] is None and "computes something else than nn.Linear" in skipped["0"]
