"""Activations in host memory: equal results, weights stay, and what is refused."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import slicefine
from slicefine import SliceConfig, get_slice_model, track_memory
from slicefine.lean import offload
from tests.lean.test_lean import assert_equal, batch, build, exact, gradients, loss_of


class Host:
    """Host memory that is told apart from the device's by being a list."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.taken, self.brought = [], 0

    def pack(self, tensor):
        assert tensor.untyped_storage().data_ptr() not in self.parameters
        self.taken.append(tensor.nbytes)
        return tensor.clone().numpy(), tensor.stride()

    def unpack(self, packed):
        values, stride = packed
        self.brought += 1
        return torch.from_numpy(values).as_strided(values.shape, stride)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "ViT"])
@pytest.mark.parametrize("slice_type", ["column", "row"])
@pytest.mark.parametrize("checkpoint", [None, "full"])
def test_a_step_through_host_memory_is_the_same(monkeypatch, name, slice_type, checkpoint):
    monkeypatch.setattr(offload, "SMALLEST", 64)
    config = SliceConfig(r=4, slice_type=slice_type, modules_to_save=[])
    wanted = gradients(get_slice_model(exact(build(name)), config), name)
    model = get_slice_model(exact(build(name)), config)
    slicefine.lean(model, checkpoint=checkpoint, verbose=False)
    host = Host(model)
    with offload.Offload(model, host.pack, host.unpack):
        loss = loss_of(model, name)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal({**found, "loss": loss.detach()}, wanted)
    assert host.taken and host.brought >= len(host.taken) // 2


def test_what_is_small_stays():
    model = build("Llama")
    host = Host(model)
    with offload.Offload(model, host.pack, host.unpack):
        loss_of(model, "Llama")
    assert min(host.taken, default=offload.SMALLEST) >= offload.SMALLEST


def test_the_switch(monkeypatch, capsys):
    """By torch's own save_on_cpu, around the model's forward in training and nowhere else."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(offload, "SMALLEST", 64)
    model = get_slice_model(exact(build("Llama")), SliceConfig(r=4))
    wanted = gradients(model, "Llama")
    slicefine.lean(model, offload="activations")
    assert "activations wait in host memory" in capsys.readouterr().out
    entered = []
    begin = offload.Offload.__enter__
    monkeypatch.setattr(
        offload.Offload, "__enter__", lambda self: entered.append(self) or begin(self)
    )
    assert_equal(gradients(model, "Llama"), wanted)
    assert len(entered) == 1 and offload._ACTIVE not in vars(model)
    with torch.no_grad():
        model(**batch("Llama"))
    with pytest.raises(ValueError, match="input_ids"):
        model()
    assert len(entered) == 2 and offload._ACTIVE not in vars(model)
    # nothing is left of it on the stack of hooks, so this tracker sees what is kept
    slicefine.lean.undo(model)
    with track_memory(model=model) as report:
        loss_of(model, "Llama").backward()
    assert len(entered) == 2 and report.breakdown["activations"] > 0


def test_it_is_refused_where_it_moves_nothing(monkeypatch):
    model = build("Llama")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="torch sees no accelerator here: on a CPU they are"
    ):
        slicefine.lean(model, offload="activations")
    with pytest.raises(ValueError, match="offload is 'weights'; expected None or"):
        slicefine.lean(model, offload="weights")
    assert "_lean_report" not in vars(model)
    with monkeypatch.context() as there:
        there.setattr(torch.accelerator, "is_available", lambda: True)
        slicefine.lean(model, loss=False, offload="activations", verbose=False)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="torch.compile decides itself what is kept"):
        torch.compile(model, backend="aot_eager")(**batch("Llama"))
    torch._dynamo.reset()
