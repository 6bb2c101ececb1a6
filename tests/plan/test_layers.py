"""Two and three layers of a stack say what all of them need: byte for byte the full evaluation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from slicefine.plan import methods, peft
from slicefine.plan.estimate import estimate
from slicefine.plan.layers import identical_layers
from slicefine.plan.modes import MODES
from slicefine.plan.workloads import workload_of
from tests.plan.test_estimate import tiny

METHODS = {
    "floor": methods.floor,
    "column": lambda: methods.slices(8),
    "row": lambda: methods.slices(8, "row"),
    "in backward": lambda: methods.slices(8, in_bwd=True),
    "masked": lambda: methods.masked(8),
    "full": methods.full,
    "LoRA": lambda: peft.method("LoRA", 8),
    "DoRA": lambda: peft.method("DoRA", 8),
    "VeRA": lambda: peft.method("VeRA", 8),
}


def stacked(config_class: str, **changes):
    import transformers

    config = getattr(transformers, config_class)(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=11,
        num_attention_heads=4,
        vocab_size=500,
        **changes,
    )
    return workload_of(config, config_class, torch.bfloat16)


@pytest.mark.parametrize("length", [16, 128])
@pytest.mark.parametrize("mode", ["eager", "checkpointing"])
@pytest.mark.parametrize("name", METHODS)
def test_a_llama_of_eleven_layers(name, mode, length):
    """Short and long sequences: at the peak stand the update, the loss, or a layer's backward."""
    made = MODES[mode](stacked("LlamaConfig", num_key_value_heads=2))
    found, full = (
        estimate(made, METHODS[name](), 2, length, whole=whole) for whole in (False, True)
    )
    assert identical_layers(made.build()) == 11
    assert found.row() == full.row()


@pytest.mark.filterwarnings("ignore:classifier is fully trained")
@pytest.mark.parametrize("kind", ["BertConfig", "ViTConfig", "GPTNeoXConfig"])
def test_other_families(kind):
    made = stacked(kind)
    found, full = (estimate(made, methods.slices(8), 2, 64, whole=w) for w in (False, True))
    assert identical_layers(made.build()) == 11
    assert found.row() == full.row()


@pytest.mark.slow
def test_a_model_of_medium_size(tmp_path):
    """SmolLM2's shape: 30 layers of 576, a vocabulary of 49,152."""
    from slicefine.plan.workloads import workload

    made = workload(
        tiny(
            tmp_path,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            vocab_size=49152,
        ),
        torch.bfloat16,
    )
    for method in (methods.slices(16), methods.full()):
        found, full = (
            estimate(made, method, 4, 256, whole=whole) for whole in (False, True)
        )
        assert found.row() == full.row()


def test_stacks_that_differ_are_run_as_they_are():
    made = stacked("Gemma2Config", num_key_value_heads=2, head_dim=16)
    assert identical_layers(made.build()) is None
    found, full = (
        estimate(made, methods.floor(), 2, 32, whole=whole) for whole in (False, True)
    )
    assert found.row() == full.row()
