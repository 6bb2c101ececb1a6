"""Which module is the output head, and what a config makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slicefine import SliceLinear, get_slice_model, list_targets
from slicefine.heads import find_heads
from tests.configs import slices_alone

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IMAGE = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {
    "image_size": 16,
    "patch_size": 8,
}
DECODER = TEXT | {
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
OF_TRANSFORMERS = [
    ("BertForSequenceClassification", "BertConfig", TEXT, ["classifier"]),
    ("BertForTokenClassification", "BertConfig", TEXT, ["classifier"]),
    ("BertForQuestionAnswering", "BertConfig", TEXT, ["qa_outputs"]),
    ("BertModel", "BertConfig", TEXT, []),
    ("RobertaForSequenceClassification", "RobertaConfig", TEXT, ["classifier"]),
    ("ElectraForSequenceClassification", "ElectraConfig", TEXT, ["classifier"]),
    ("LlamaForSequenceClassification", "LlamaConfig", DECODER, ["score"]),
    ("ViTForImageClassification", "ViTConfig", IMAGE, ["classifier"]),
    (
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        IMAGE,
        ["cls_classifier", "distillation_classifier"],
    ),
]


@pytest.mark.parametrize(
    ("kind", "config", "sizes", "names"), OF_TRANSFORMERS, ids=lambda v: str(v)[:30]
)
def test_heads_of_transformers_train_whole_and_have_no_slices(kind, config, sizes, names):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    assert list(find_heads(model).task) == names
    check(model, names)


@pytest.mark.parametrize(
    ("name", "sizes", "head"),
    [
        (
            "vit_tiny_patch16_224",
            {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
            "head",
        ),
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, "head.fc"),
    ],
)
def test_heads_of_timm(name, sizes, head):
    timm = pytest.importorskip("timm")
    check(timm.create_model(name, num_classes=5, **sizes), [head])
    assert find_heads(timm.create_model(name, num_classes=0, **sizes)).task == {}


def test_heads_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    sizes = {
        "image_size": 16,
        "patch_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 24,
    }
    check(torchvision.models.VisionTransformer(**sizes, num_classes=5), ["heads.head"])
    # most of this model is its "classifier": only the last layer of it is new
    assert list(find_heads(torchvision.models.alexnet(num_classes=5)).task) == [
        "classifier.6"
    ]


def check(model: nn.Module, names: list[str]) -> None:
    """The default config trains the heads whole, says so once, and makes slices of the rest."""
    if names:
        with pytest.warns(
            UserWarning, match="fully trained, as a new output head needs"
        ) as warned:
            get_slice_model(model, slices_alone(r=2))
        assert len(warned) == 1
    else:
        get_slice_model(model, slices_alone(r=2))
    for name in names:
        head = model.get_submodule(name)
        assert not any(isinstance(m, SliceLinear) for m in head.modules())
        assert all(p.requires_grad for p in head.parameters())
    inside = tuple(f"{name}." for name in names)
    whole = {
        n
        for n, p in model.named_parameters()
        if p.requires_grad and "slice_weight" not in n
    }
    assert all(n.startswith(inside) for n in whole)
    assert any(isinstance(m, SliceLinear) for m in model.modules())


def test_the_head_of_a_language_model_is_not_new():
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    heads = find_heads(model)
    assert heads.language is model.lm_head and heads.task == {}
    get_slice_model(model, slices_alone(r=2))
    assert type(model.lm_head) is nn.Linear and not model.lm_head.weight.requires_grad
    # named, it becomes a slice
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    get_slice_model(model, slices_alone(r=2, target_modules=["lm_head"]))
    assert isinstance(model.lm_head, SliceLinear)


def test_a_head_inside_a_wrapper_is_found():
    transformers = pytest.importorskip("transformers")

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.loss = model, nn.CrossEntropyLoss()

    config = transformers.BertConfig(**TEXT)
    wrapped = Wrapper(transformers.BertForSequenceClassification(config))
    check(wrapped, ["model.classifier"])
    llama = Wrapper(transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)))
    assert find_heads(llama).language is llama.model.lm_head


def test_a_model_of_which_only_the_head_could_be_sliced_is_refused():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Conv2d(3, 64, 3), nn.Linear(8, 8)

    with pytest.raises(
        ValueError, match=r"leaves no layer of Convolutions but its output head \(cl"
    ):
        get_slice_model(Convolutions(), slices_alone())
    config = slices_alone(r=2, target_modules=["classifier"])
    assert [row.name for row in list_targets(Convolutions(), config)] == ["classifier"]


def test_a_head_that_is_excluded_is_left_alone():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))
    get_slice_model(model, slices_alone(r=2, exclude_modules=["classifier"]))
    assert type(model.classifier) is nn.Linear and not model.classifier.weight.requires_grad
