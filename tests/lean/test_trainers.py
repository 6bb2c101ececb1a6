"""Lean models under transformers' Trainer and TRL's SFTTrainer: the run without lean is the oracle."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import slicefine
from slicefine import SliceConfig, get_slice_model
from slicefine.integrations.transformers import SliceCallback
from slicefine.lean.loss import LazyLogits
from slicefine.model import slice_layers

VOCABULARY = 97


def sliced(lean: bool, slice_type: str = "row_column", **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    slices = SliceConfig(r=4, slice_type=slice_type, switch_interval=2)
    get_slice_model(model, slices)
    return slicefine.lean(model, verbose=False, **options) if lean else model


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    """Texts of different lengths, whose first tokens are not learned."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (6 + index % 7,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (index % 4) + ids[index % 4 :]})
    return made


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)
    padded = lambda key, fill: torch.tensor(
        [row[key] + [fill] * (width - len(row[key])) for row in batch]
    )
    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": ids.ne(0)}


COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}


def trainer(folder, lean: bool, **options):
    args = transformers.TrainingArguments(output_dir=str(folder), **{**COMMON, **options})
    return transformers.Trainer(
        sliced(lean),
        args,
        train_dataset=rows(),
        eval_dataset=rows(5),
        data_collator=collate,
        callbacks=[SliceCallback()],
    )


def losses(run) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in run.state.log_history if "loss" in row])


def assert_same_run(stock, lean, tolerance: float) -> None:
    wanted, found = losses(stock), losses(lean)
    assert len(wanted) == 4 and (found - wanted).abs().max() <= tolerance * wanted.max()
    for one, other in zip(slice_layers(stock.model), slice_layers(lean.model), strict=True):
        assert one.schedule.steps == other.schedule.steps == 4
        # Adam moves an element whose gradient is nothing but rounding by a full step
        off = (one.weight - other.weight).abs() > tolerance
        assert off.float().mean() <= 0.02


@pytest.fixture
def made(monkeypatch):
    """How often the logits of a lean step were made after all."""
    calls = []
    values = LazyLogits.values
    monkeypatch.setattr(LazyLogits, "values", lambda s: calls.append(s) or values(s))
    return calls


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-4),
        ({"gradient_accumulation_steps": 3}, 1e-4),
        ({"activation_checkpointing": True}, 1e-4),
        ({"bf16": True}, 3e-2),
    ],
    ids=["plain", "accumulation", "checkpointing", "autocast"],
)
def test_trainer_trains_a_lean_model_as_the_stock_one(tmp_path, made, options, tolerance):
    runs = [trainer(tmp_path, lean, **options) for lean in (False, True)]
    for run in runs:
        run.train()
    assert_same_run(*runs, tolerance)
    assert not made and losses(runs[0])[-1] < losses(runs[0])[0]


def test_label_smoothing_makes_the_logits_and_trains_the_same(tmp_path, made):
    """Trainer smooths by itself, with the logits; so they are made."""
    runs = [trainer(tmp_path, lean, label_smoothing_factor=0.1) for lean in (False, True)]
    for run in runs:
        run.train()
    assert_same_run(*runs, 1e-4)
    assert made


def test_an_evaluation_gets_logits(tmp_path):
    stock, lean = (trainer(tmp_path, on) for on in (False, True))
    wanted, found = (run.predict(rows(5)) for run in (stock, lean))
    assert found.predictions.shape == wanted.predictions.shape
    assert found.predictions.shape[-1] == VOCABULARY
    assert abs(found.predictions - wanted.predictions).max() <= 1e-4
    assert lean.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"])


def test_the_whole_loop_in_a_checkpoint_of_lean_itself(tmp_path):
    """checkpoint= of lean and Trainer's flag are the same switch: given twice it is on once."""
    stock = trainer(tmp_path, False)
    lean = trainer(tmp_path, False, activation_checkpointing=True)
    slicefine.lean(lean.model, checkpoint="full", verbose=False)
    for run in (stock, lean):
        run.train()
    assert_same_run(stock, lean, 1e-4)


def test_trainers_compile_is_refused_by_name(tmp_path):
    run = trainer(
        tmp_path, True, torch_compile=True, torch_compile_backend="aot_eager", max_steps=1
    )
    torch._dynamo.reset()
    with pytest.raises(Exception, match="torch.compile does not take the loss of a lean"):
        run.train()
    torch._dynamo.reset()


@pytest.mark.parametrize("loss_type", ["default", "nll"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_a_lean_model_as_the_stock_one(tmp_path, loss_type, checkpointing):
    """TRL computes its loss without logits too; the norms and MLPs are what lean adds."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    runs = []
    for lean in (False, True):
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            **COMMON,
            bf16=False,
            gradient_accumulation_steps=2,
            activation_checkpointing=checkpointing,
            max_length=16,
            **({} if loss_type == "default" else {"loss_type": loss_type}),
        )
        texts = [{"input_ids": row["input_ids"]} for row in rows()]
        runs.append(
            trl.SFTTrainer(
                sliced(lean),
                args,
                train_dataset=datasets.Dataset.from_list(texts),
                eval_dataset=datasets.Dataset.from_list(texts[:5]),
                processing_class=Tokenizer(),
                callbacks=[SliceCallback()],
            )
        )
    for run in runs:
        run.train()
    assert_same_run(*runs, 1e-4)
    wanted, found = (run.evaluate()["eval_loss"] for run in runs)
    assert found == pytest.approx(wanted, rel=1e-2)


class Tokenizer(transformers.PreTrainedTokenizerFast):
    """Numbers as words, so that no file is read."""

    def __init__(self, **kwargs):
        from tokenizers import Tokenizer as Words
        from tokenizers.models import WordLevel

        kwargs.pop("tokenizer_object", None)
        words = {str(i): i for i in range(VOCABULARY)}
        named = {"unk_token": "3", "pad_token": "0", "eos_token": "2", **kwargs}
        super().__init__(tokenizer_object=Words(WordLevel(words, unk_token="3")), **named)
