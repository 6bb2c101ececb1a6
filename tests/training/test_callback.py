"""SliceCallback restores the slices from the checkpoint that is resumed from, wherever it lies."""

from __future__ import annotations

import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from slicefine import SliceConfig, get_slice_model
from slicefine.integrations.transformers import SliceCallback
from slicefine.model import slice_layers


def trainer(folder, callback, **more):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    get_slice_model(
        model, SliceConfig(r=4, switch_interval=2, modules_to_save=["classifier"])
    )
    data = [{"input_ids": [i % 16, 3, 5], "labels": i % 2} for i in range(32)]
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "save_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }
    callbacks = [callback] if callback else []
    args = transformers.TrainingArguments(**values)
    return transformers.Trainer(model, args, train_dataset=data, callbacks=callbacks)


def state(model):
    places = [(m.schedule.position, m.schedule.steps) for m in slice_layers(model)]
    return places, {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def straight(tmp_path):
    once = trainer(tmp_path / "once", SliceCallback())
    once.train()
    shutil.move(tmp_path / "once" / "checkpoint-4", tmp_path / "moved")
    return state(once.model)


def equal(a, b):
    assert a[0] == b[0]
    assert all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def test_from_a_folder_that_was_moved(straight, tmp_path):
    again = trainer(tmp_path / "new", SliceCallback(tmp_path / "moved"))
    again.train(resume_from_checkpoint=str(tmp_path / "moved"))
    equal(straight, state(again.model))
    # the arguments say it too
    named = trainer(
        tmp_path / "newer", SliceCallback(), resume_from_checkpoint=str(tmp_path / "moved")
    )
    named.train(resume_from_checkpoint=str(tmp_path / "moved"))
    equal(straight, state(named.model))


def test_a_checkpoint_of_another_run_in_the_output_folder_is_not_taken(straight, tmp_path):
    other = trainer(tmp_path / "other", SliceCallback(), seed=1)
    other.train()
    again = trainer(tmp_path / "other", SliceCallback(tmp_path / "moved"))
    again.train(resume_from_checkpoint=str(tmp_path / "moved"))
    equal(straight, state(again.model))


def test_without_the_slices_it_does_not_start(straight, tmp_path):
    lost = trainer(tmp_path / "new", SliceCallback())
    with pytest.raises(
        ValueError, match=r"goes on at step 4, and .*checkpoint-4 has no slices\.pt"
    ):
        lost.train(resume_from_checkpoint=str(tmp_path / "moved"))
    (tmp_path / "moved" / "slices.pt").unlink()
    bare = trainer(tmp_path / "newer", SliceCallback(tmp_path / "moved"))
    with pytest.raises(
        ValueError, match=r"moved has no slices\.pt.*resumed with SliceAdamW only"
    ):
        bare.train(resume_from_checkpoint=str(tmp_path / "moved"))
