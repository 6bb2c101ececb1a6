"""Models that transformers loads quantized: Trainer, TRL, checkpoints, lean, PEFT on the same base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slicefine
from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.deltas.lora import to_lora
from slicefine.model import SliceModel
from slicefine.modules.quantized import QuantizedLinear

transformers: Any = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CONFIG = SliceConfig(r=4, pool=16, switch_interval=2, contiguous=False)
TOKENS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=TOKENS,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str = "nf4") -> Any:
    how = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(**how),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    ).train()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TOKENS, (4, 12), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(model: Any, steps: int = 5) -> list[float]:
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for seed in range(steps):
        loss = model(**batch(seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **more,
    }


ROWS = [{k: v[0].tolist() for k, v in batch(seed).items()} for seed in range(8)]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trainer_trains_saves_and_resumes(folder, tmp_path, kind):
    def run(resume: bool) -> tuple[Any, Any]:
        model = load(folder, kind)
        before = bits(model)
        get_slice_model(model, CONFIG)
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(**arguments(tmp_path)),
            train_dataset=ROWS,
            optimizer_cls_and_kwargs=(SliceAdamW, {"lr": 1e-2}),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, before

    model, before = run(resume=False)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    layer = model.model.layers[0].mlp.up_proj
    assert layer.overlay.weight.any()
    # from the checkpoint of step 2 to the same end
    import shutil

    shutil.rmtree(tmp_path / "checkpoint-4")
    again, _ = run(resume=True)
    ours = {k: v for k, v in model.state_dict().items() if "overlay" in k}
    assert ours and all(torch.equal(again.state_dict()[k], v) for k, v in ours.items())
    # what transformers has noted goes with the slices
    assert model._hf_peft_config_loaded
    with pytest.raises(ValueError, match="purely quantized models"):
        transformers.Trainer(
            model.unload(), transformers.TrainingArguments(**arguments(tmp_path))
        )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_trl_trains_and_its_cast_of_the_masters_is_undone(folder, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = load(folder)
    get_slice_model(model, CONFIG)
    layer = model.model.layers[0].mlp.up_proj.overlay
    rows = [{k: v for k, v in row.items() if k == "input_ids"} for row in ROWS]
    trainer = trl.SFTTrainer(
        model,
        # three: a step after the move
        trl.SFTConfig(**arguments(tmp_path, max_steps=3), max_length=12, packing=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
        optimizer_cls_and_kwargs=(SliceAdamW, {"lr": 1e-2}),
    )
    # TRL casts whatever trains on a quantized model
    assert layer.slice_weight.dtype is torch.bfloat16
    trainer.train()
    assert layer.slice_weight.dtype is torch.float32
    assert not torch.equal(layer.slice_weight, layer.slice_weight.bfloat16().float())
    assert layer.weight.any()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(TOKENS)}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        pad_token="t1",
        eos_token="t2",
        unk_token="t0",
    )
    fast.chat_template = "{{ messages }}"
    return fast


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_lean_train_the_same(folder, reentrant):
    plain = load(folder)
    get_slice_model(plain, CONFIG)
    losses = train(plain)
    lean = slicefine.lean(load(folder), verbose=False)
    get_slice_model(lean, CONFIG)
    # the name since transformers 5.23 and the one before
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(lean, name) for name in names if hasattr(lean, name))
    enable({"use_reentrant": reentrant})
    assert lean._lean_report.mlps and lean._lean_report.norms
    assert train(lean) == pytest.approx(losses, rel=2e-3)
    lean.unload()
    assert not any(isinstance(m, QuantizedLinear) for m in lean.modules())


def test_the_delta_as_lora_runs_in_peft_on_the_same_quantized_model(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(folder)
    get_slice_model(model, CONFIG)
    train(model)
    output = model(**batch()).logits
    to_lora(model.delta()).save(tmp_path)
    lora = peft.PeftModel.from_pretrained(load(folder), tmp_path).train()
    found = lora(**batch()).logits
    base = load(folder)(**batch()).logits
    # PEFT multiplies in float32, so the two round differently; far less than what was trained
    assert (found - output).abs().max() < 0.05 * (base - output).abs().max()


def test_folders_of_the_delta_and_of_the_model_unpacked(folder, tmp_path):
    model = load(folder)
    base = model(**batch()).logits
    get_slice_model(model, CONFIG)
    train(model)
    output = model(**batch()).logits
    model.save_pretrained(tmp_path / "delta")
    again = SliceModel.from_pretrained(load(folder), tmp_path / "delta")
    again.train()
    assert torch.equal(again(**batch()).logits, output)
    assert torch.equal(copy.deepcopy(again).unload().train()(**batch()).logits, base)
    merged = model.merge_and_unload(quantized="dequantize")
    merged.save_pretrained(tmp_path / "merged")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16
    )
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert not getattr(plain, "is_quantized", False)
    found = plain(**batch()).logits
    assert torch.equal(found, merged(**batch()).logits)
    assert (found - output).abs().max() < 0.2 * (base - output).abs().max()


def test_a_whole_model_is_saved_with_what_was_trained_beside_it(folder, tmp_path):
    model = load(folder)
    get_slice_model(model, CONFIG)
    train(model)
    model.save_pretrained(tmp_path, whole_model=True)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.layers.0.mlp.up_proj.overlay.weight" in keys
    assert "model.layers.0.mlp.up_proj.weight.absmax" in keys
    assert model._hf_peft_config_loaded


def test_a_master_of_a_float_weight_that_was_cast_is_cast_back():
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    get_slice_model(model, SliceConfig(r=2, contiguous=True))
    master, weight = model[0].slice_weight, model[0].weight.clone()
    master.data = master.data.bfloat16()
    model(torch.randn(3, 8))
    assert master.dtype is torch.float32 and model[0].slice_weight is master
    assert torch.equal(master, weight[:, :2]) and torch.equal(model[0].weight, weight)
