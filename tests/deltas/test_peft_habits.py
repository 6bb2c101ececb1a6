"""What users of PEFT, transformers' adapters and sentence-transformers call on a model with slices."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from slicefine import DeltaError, SliceConfig, SliceModel, get_slice_model
from slicefine.deltas.delta import FILE
from tests.deltas.test_delta import base, same, state, trained

transformers = pytest.importorskip("transformers")


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=32, intermediate_size=64, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


def test_a_delta_and_a_model_do_not_spoil_each_others_folder(tmp_path):
    model = bert()
    get_slice_model(model, SliceConfig(r=8, modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path / "m", whole_model=True)
    with pytest.raises(DeltaError, match=r"holds a model \(config.json\)"):
        model.save_pretrained(tmp_path / "m")
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "d")
    with pytest.raises(DeltaError, match="holds an adapter .*type SLICEFINE"):
        model.save_pretrained(tmp_path / "d", whole_model=True)
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(DeltaError, match="holds an adapter of type LORA"):
        model.save_pretrained(tmp_path / "l")
    assert not (tmp_path / "l" / FILE).exists()
    (tmp_path / "d" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "d")
    assert (tmp_path / "d" / "README.md").read_text() == "mine"


def test_disable_and_enable_adapters():
    before, model = trained()
    after = state(model)
    for _ in range(2):
        model.disable_adapters()
        assert same(state(model), before)
    model.enable_adapters()
    assert same(state(model), after) and model.active_adapters == ["default"]
    model.enable_adapters()
    assert same(state(model), after)


def test_what_deltas_cannot_do_is_refused_by_name(tmp_path):
    _, model = trained()
    with pytest.raises(ValueError, match="one batch cannot mix several deltas"):
        model(torch.randn(2, 12), adapter_names=["a", "b"])
    with pytest.raises(DeltaError, match="get_slice_model"):
        model.add_adapter("x", SliceConfig())
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    sliced = get_slice_model(bert(), SliceConfig(r=8, modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match="one batch cannot mix several deltas"):
        sliced(**inputs, adapter_names=["a", "b"])
    assert sliced(**inputs).logits.shape == (2, 2)


def test_merge_adapter_and_unmerge_adapter_keep_the_outputs(tmp_path):
    _, model = trained()
    model.save_pretrained(tmp_path)
    loaded = SliceModel.from_pretrained(base(), tmp_path, "a")
    after = state(loaded)
    loaded.set_adapter([])
    loaded.merge_adapter(["a"], safe_merge=True)
    assert same(state(loaded), after)
    loaded.unmerge_adapter()
    assert same(state(loaded), after) and loaded.get_base_model() is loaded
    with torch.no_grad():
        loaded.classifier.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="safe_merge: classifier.weight"):
        loaded.merge_adapter(safe_merge=True)


def test_a_forward_compiles_as_before():
    model = get_slice_model(nn.Sequential(nn.Linear(8, 8)), SliceConfig(r=2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 8)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("inner", [False, True])
def test_sentence_transformers_checkpoints_are_whole_models(tmp_path, inner):
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    bert().base_model.save_pretrained(tmp_path / "b")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "b")
    word = modules.Transformer(str(tmp_path / "b"), max_seq_length=8)
    model = package.SentenceTransformer(modules=[word, modules.Pooling(32)], device="cpu")
    sliced = model[0].auto_model if inner else model
    get_slice_model(sliced, SliceConfig(r=8))
    with torch.no_grad():
        next(p for p in sliced.parameters() if p.dim() == 2).add_(0.5)
    # as its trainer does, without a state dict
    model.save_pretrained(str(tmp_path / "checkpoint-1"))
    again = package.SentenceTransformer(str(tmp_path / "checkpoint-1"), device="cpu")
    expected, found = (m.encode(["good film"]) for m in (model, again))
    assert (expected == found).all() and not list(tmp_path.glob("checkpoint-1/adapter_*"))
    sliced.save_pretrained(tmp_path / "delta", selected_adapters=["default"])
    assert (tmp_path / "delta" / FILE).is_file()
