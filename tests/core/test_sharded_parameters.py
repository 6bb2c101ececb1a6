"""Slices of parameters, attention's and experts', under fully_shard in two processes: the same
weights as in one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slicefine import SliceAdamW, get_slice_model
from tests.configs import slices_alone
from tests.two_processes import pair


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with pair(tmp_path_factory.mktemp("pair")) as run:
        yield run


def attention() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return get_slice_model(
        nn.TransformerDecoder(layer, 2), slices_alone(r=4, switch_interval=2)
    )


def experts(count: int = 4) -> nn.Module:
    import transformers

    from tests.families import MOE

    torch.manual_seed(0)
    config: Any = transformers.Qwen3MoeConfig(**MOE, num_experts=count)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    return get_slice_model(
        model,
        slices_alone(
            r=4,
            switch_interval=2,
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    )


def trained(make: Any, sharded: bool) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model: Any = make()
    if sharded:
        for layer in model.layers if make is attention else model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        optimizer.zero_grad()
        if make is attention:
            x, m = (
                torch.randn(2, 5, 16, generator=generator),
                torch.randn(2, 7, 16, generator=generator),
            )
            loss = model(x, m).square().mean()
        else:
            ids = torch.randint(1, 40, (2, 6), generator=generator)
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return {
        key: value.full_tensor() if sharded else value
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("make", [attention, experts])
def test_two_processes_train_what_one_does(both, make):
    if make is experts:
        pytest.importorskip("transformers", reason="pip install transformers")
    before, alone = make().state_dict(), trained(make, False)
    together = both(trained, make, True)[0]
    assert sorted(together) == sorted(alone)
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=0, atol=1e-6)
    assert sum(not torch.equal(value, before[key]) for key, value in alone.items()) == 12


def uneven() -> str:
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError) as error:
        fully_shard(experts(3))
    return str(error.value)


def test_experts_that_do_not_divide_are_refused(both):
    pytest.importorskip("transformers", reason="pip install transformers")
    assert all(
        "experts shard only where their number divides" in message
        for message in both(uneven)
    )
