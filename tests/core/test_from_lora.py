"""docs/from-lora.md is run as it stands, beside peft itself."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import slicefine
from tests.configs import slices_alone

PAGE = Path(__file__).parents[2] / "docs" / "from-lora.md"


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=60,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def test_the_page_runs_as_it_stands(tmp_path, capsys):
    first, second = re.findall(
        r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    base = bert()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    expected = base(**batch).logits
    names = {"model": copy.deepcopy(base)}
    exec(first, names)
    names["model"](**batch, labels=torch.tensor([0, 1])).loss.backward()
    names["optimizer"].step()
    trained = names["model"](**batch).logits
    names["model"].save_pretrained(tmp_path / "other")
    names.update(
        base_model=base,
        folder=tmp_path / "one",
        other_folder=tmp_path / "other",
        batch=batch,
    )
    exec(second, names)
    assert "trainable params: " in capsys.readouterr().out
    assert torch.equal(names["reference"], expected) and not torch.equal(trained, expected)
    assert torch.equal(names["model"](**batch).logits, trained)
    assert type(names["model"]) is transformers.BertForSequenceClassification


def test_every_name_of_pefts_in_the_table_is_pefts_and_ours():
    table = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    names = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {"disable_adapter", "set_adapter", "merge_and_unload", "unload"} <= names
    wrapped = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    ours = slicefine.get_slice_model(
        bert(), slicefine.SliceConfig(r=2, target_modules=["query"])
    )
    for name in names - {"get_peft_model"}:
        assert hasattr(wrapped, name), f"peft has no {name}"
        assert hasattr(ours, name), f"slicefine has no {name}"


def test_trainable_parameters_are_counted_as_peft_counts_them():
    """A head that is fully trained counts once; peft keeps a second copy of it, which it counts in
    the total.
    """
    model = slicefine.get_slice_model(
        bert(),
        slices_alone(r=4, target_modules=["query"], modules_to_save=["classifier"]),
    )
    trainable, total = model.get_nb_trainable_parameters()  # pyright: ignore[reportCallIssue]
    assert trainable == 2 * 4 * 32 + (32 * 3 + 3)
    assert total == sum(p.numel() for p in bert().parameters())
    wrapped = peft.get_peft_model(
        bert(),
        peft.LoraConfig(
            r=2,
            target_modules=["query"],
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
        ),
    )
    theirs, _ = wrapped.get_nb_trainable_parameters()
    assert theirs == 2 * 2 * (32 + 32) + (
        32 * 3 + 3
    )  # rank 2 of two factors: as many as a slice of 4 columns


def test_unload_gives_the_base_back():
    model = bert()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    slicefine.get_slice_model(
        model,
        slices_alone(r=4, target_modules=["query"], modules_to_save=["classifier"]),
    )
    optimizer = slicefine.SliceAdamW(model.parameters())
    model(torch.arange(6).view(1, 6), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    model.unload()
    assert (
        type(model) is transformers.BertForSequenceClassification
        and "_slicefine" not in model.__dict__
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
