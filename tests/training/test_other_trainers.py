"""The files that docs/training.md gives for axolotl and LLaMA-Factory, run against stand-ins.

The stand-ins call what those frameworks call, in their order; the frameworks are not installed here.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers

from slicefine import SliceAdamW, SliceModel
from slicefine.integrations.transformers import SliceCallback

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def block(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found = [text for text in blocks if containing in text]
    assert len(found) == 1
    return found[0]


def module(monkeypatch, name: str, **content: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def small_model(*_, **__):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


ROWS = [
    {"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)
]


def trainer(model, folder, optimizer=None, callbacks=()):
    return transformers.Trainer(
        model,
        args=transformers.TrainingArguments(
            str(folder), max_steps=3, report_to="none", disable_tqdm=True, use_cpu=True
        ),
        train_dataset=ROWS,  # pyright: ignore[reportArgumentType]
        optimizers=(optimizer, None),
        callbacks=[*callbacks],
    )


def changed(model) -> bool:
    return any(
        bool((patch.new != patch.old).any())
        for weight in model.delta().weights.values()
        for patch in weight.patches
    )


def test_the_plugin_of_axolotl(monkeypatch, tmp_path):
    package = module(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    module(monkeypatch, "axolotl.integrations", base=package)
    module(monkeypatch, "axolotl")
    names: dict = {}
    exec(compile(block("SlicePlugin"), str(PAGE), "exec"), names)
    plugin = names["SlicePlugin"]()
    cfg = types.SimpleNamespace(resume_from_checkpoint=None, output_dir=str(tmp_path))
    model = small_model()
    plugin.post_model_load(cfg, model)
    probe = trainer(model, tmp_path)
    optimizer = plugin.create_optimizer(cfg, probe)
    assert isinstance(optimizer, SliceAdamW)
    callbacks = plugin.add_callbacks_post_trainer(cfg, probe)
    trainer(model, tmp_path, optimizer, callbacks).train()
    plugin.post_train(cfg, model)
    assert changed(model)
    restored = SliceModel.from_pretrained(small_model(), tmp_path / "delta")
    for key, value in model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key])


def test_the_script_of_llama_factory(monkeypatch, tmp_path):
    pytest.importorskip("yaml")
    seen = {}
    workflow = module(
        monkeypatch, "llamafactory.train.sft.workflow", load_model=small_model
    )
    module(monkeypatch, "llamafactory.train.sft", workflow=workflow)

    def run_exp(args, callbacks):
        seen["args"], seen["callbacks"] = args, callbacks
        seen["model"] = model = workflow.load_model("tokenizer", "arguments")
        trainer(model, tmp_path / "out", callbacks=callbacks).train()

    tuner = module(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    module(monkeypatch, "llamafactory.train", tuner=tuner)
    module(monkeypatch, "llamafactory")
    (tmp_path / "recipe.yaml").write_text("finetuning_type: full\n")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "recipe.yaml")])
    exec(compile(block("llamafactory"), str(PAGE), "exec"), {})
    assert seen["args"] == {"finetuning_type": "full"}
    assert isinstance(seen["callbacks"][0], SliceCallback)
    assert changed(seen["model"])
