"""Whole trainings of small models through `fine_tune`, the room behind `slicefine train`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

from safetensors.torch import load_file

from slicefine import Delta
from slicefine.model import slice_layers
from slicefine.training import run as room
from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe
from slicefine.training.run import fine_tune
from slicefine.training.trainer import LengthWindows, SliceTraining

ROOT = Path(__file__).parents[2]
pytestmark = [
    # Hugging Face's own progress bars leave a lock to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def chats(count=24):
    """Sums, with answers of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i % 7} plus {i % 5}?"},
                {
                    "role": "assistant",
                    "content": "It is " + "so " * (i % 4) + f"{i % 7 + i % 5}.",
                },
            ]
        }
        for i in range(count)
    ]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chat(tmp_path):
    return lines(tmp_path / "chat.jsonl", chats())


@pytest.fixture
def reviews(tmp_path):
    rows = [
        {
            "text": ("a fine film " if i % 2 else "a poor mess ") * (1 + i % 3) + str(i),
            "label": "good" if i % 2 else "bad",
        }
        for i in range(32)
    ]
    return lines(tmp_path / "reviews.jsonl", rows)


def language(model, data, output, **more):
    values = {
        "model": str(model),
        "task": "causal-lm",
        "data": data,
        "output": str(output),
        "epochs": 2,
        "batch_size": 8,
        "lr": 1e-2,
        "eval_share": 0.0,
        "bf16": False,
        "samples": 0,
        "device": "cpu",
        "slices": {"r": 4, "switch_interval": 2},
    }
    return Recipe.from_dict({**values, **more})


def classifier(model, data, output, **more):
    return language(model, data, output, **{"task": "text-classification", **more})


def quiet(recipe, resume=False):
    said = []
    code = fine_tune(recipe, resume, said.append)
    return code, "\n".join(said)


def new_values(folder):
    delta = Delta.load(Path(folder) / "delta")
    values = {
        f"{k}/{i}": p.new for k, w in delta.weights.items() for i, p in enumerate(w.patches)
    }
    return {**values, **{k: entry.new for k, entry in delta.whole.items()}}


def same(one, other, within=0.0):
    a, b = new_values(one), new_values(other)
    assert a.keys() == b.keys() and a
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=within, rtol=0, msg=key)


# Weights, losses, evaluation


def test_chat_data_end_to_end(tiny_lm, chat, tmp_path):
    out = tmp_path / "out"
    recipe = language(
        tiny_lm, chat, out, epochs=12, lr=2e-2, eval_share=0.25, samples=2, max_length=128
    )
    code, said = quiet(recipe)
    assert code == 0 and "rows: messages, weights in float32" in said
    written = json.loads((out / "training.json").read_text())
    losses = [entry["loss"] for entry in written["log"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    assert written["metrics"]["perplexity"] < 300
    asked = json.loads((out / "samples.json").read_text())
    assert len(asked) == 2 and asked[0]["before"] != asked[0]["after"]
    assert (
        asked[0]["prompt"].endswith("<|im_start|>assistant\n")
        and "What is" in asked[0]["prompt"]
    )
    assert Recipe.load(out / "recipe.yaml") == recipe
    # the model file, and the delta on the base, are the same model
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm)
    Delta.load(out / "delta").apply_to(base)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.state_dict().items())
    assert model.config.use_cache and not (out / "run.json").exists()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_lean_training_is_the_same(tiny_lm, chat, tmp_path, accumulate):
    shared = {"max_length": 64, "accumulate": accumulate, "batch_size": 8 // accumulate}
    shared["training"] = {"logging_steps": 1}
    logs = []
    for lean in (False, True):
        out = tmp_path / str(lean)
        code, said = quiet(
            language(tiny_lm, chat, out, lean=lean, eval_share=0.25, **shared)
        )
        assert code == 0 and ("lean: the loss in chunks" in said) == lean
        written = json.loads((out / "training.json").read_text())
        logs.append([entry["loss"] for entry in written["log"] if "loss" in entry])
        logs[-1].append(written["metrics"]["perplexity"])
    assert logs[1] == pytest.approx(logs[0], rel=1e-3) and len(logs[0]) > 1
    # what is left behind is an ordinary model
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm)
    Delta.load(tmp_path / "True" / "delta").apply_to(base)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.state_dict().items())


def test_an_audit_repeats_the_evaluation_of_a_language_model(tiny_lm, chat, tmp_path):
    from slicefine.training.evaluation import repeat

    recipe = language(
        tiny_lm, chat, tmp_path / "out", epochs=1, eval_share=0.25, max_length=128
    )
    quiet(recipe)
    delta = Delta.load(tmp_path / "out" / "delta")
    recorded, value = repeat(delta, None, None, torch.device("cpu"))
    assert value == recorded.value and recorded.form == "messages"
    # evaluations written before these fields existed
    for key in ("dtype", "form", "answers_only", "chat_template"):
        delta.info["evaluation"].pop(key)
    assert repeat(delta, None, None, torch.device("cpu"))[1] == value


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_stay_in_the_dtype_of_the_checkpoint(
    tiny_lm, chat, tmp_path, stored, monkeypatch
):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=stored)
    base.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "base")
    trained = []
    real = room.new_trainer
    monkeypatch.setattr(
        room,
        "new_trainer",
        lambda model, *a, **k: trained.append(model) or real(model, *a, **k),
    )
    out = tmp_path / "out"
    quiet(language(tmp_path / "base", chat, out, epochs=1, bf16=True, eval_share=0.2))
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {
        stored
    }
    masters = {layer.slice_weight.dtype for layer in slice_layers(trained[0])}
    assert masters == {torch.float32}
    quiet(language(tmp_path / "base", chat, tmp_path / "full", epochs=1, dtype="float32"))
    stored_in = load_file(tmp_path / "full" / "model.safetensors")
    assert {value.dtype for value in stored_in.values()} == {torch.float32}


@pytest.mark.parametrize("kind", [language, classifier])
def test_four_batches_of_two_are_one_of_eight(
    tiny_lm, encoder, chat, reviews, tmp_path, kind, monkeypatch
):
    """Rows of different lengths, weighted by what is learned of them."""
    model, data = (tiny_lm, chat) if kind is language else (encoder, reviews)
    # an incomplete last step as well
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    data = lines(tmp_path / "cut.jsonl", rows[:21])
    for name, size, count in (("one", 8, 1), ("four", 2, 4)):
        recipe = kind(
            model, data, tmp_path / name, epochs=1, batch_size=size, accumulate=count
        )
        quiet(recipe)
    same(tmp_path / "one", tmp_path / "four", within=2e-5)


def test_packed_conversations_do_not_see_each_other(tiny_lm, chat, tmp_path):
    """One packed row of all conversations gives the gradient of one batch of them."""
    rows = lines(tmp_path / "four.jsonl", chats(4))
    options = {"epochs": 1, "lr": 1e-3, "warmup": 0.0, "max_length": 256}
    quiet(language(tiny_lm, rows, tmp_path / "apart", batch_size=4, **options))
    quiet(
        language(tiny_lm, rows, tmp_path / "packed", batch_size=1, packing=True, **options)
    )
    written = json.loads((tmp_path / "packed" / "training.json").read_text())
    assert written["metrics"]["steps"] == 1
    same(tmp_path / "apart", tmp_path / "packed", within=1e-5)


# Trainer's own things


def test_evaluation_while_training_early_stopping_and_the_best_checkpoint(
    encoder, reviews, tmp_path
):
    out = tmp_path / "out"
    options = {
        "lr": 0.0,
        "head_lr": 0.0,
        "epochs": 9,
        "early_stopping": 2,
        "eval_share": 0.25,
    }
    code, _ = quiet(classifier(encoder, reviews, out, **options))
    log = json.loads((out / "training.json").read_text())["log"]
    evaluations = [entry for entry in log if "eval_accuracy" in entry]
    # nothing is learned: the first is the best, and two more are as good
    assert code == 0 and len(evaluations) == 3
    with pytest.raises(UserError, match="--early-stopping needs rows to evaluate on"):
        options["eval_share"] = 0.0
        quiet(classifier(encoder, reviews, tmp_path / "none", **options))


def test_an_optimizer_of_the_trainers_own_resumes_bit_for_bit(encoder, reviews, tmp_path):
    training = {"optim": "adamw_torch_fused", "save_strategy": "steps", "save_steps": 2}
    training["save_total_limit"] = 9
    quiet(classifier(encoder, reviews, tmp_path / "once", training=training))
    out = tmp_path / "stopped"
    with interrupted_at(3):
        assert quiet(classifier(encoder, reviews, out, training=training))[0] == 130
    assert (out / "checkpoint-4" / "slices.pt").is_file()
    assert quiet(classifier(encoder, reviews, out, training=training), resume=True)[0] == 0
    same(tmp_path / "once", out)


# Stopping and going on


@contextlib.contextmanager
def interrupted_at(step, number=signal.SIGINT):
    real = SliceTraining.training_step

    def patched(trainer, *inputs, **more):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), number)
        return real(trainer, *inputs, **more)

    SliceTraining.training_step = patched
    try:
        yield
    finally:
        SliceTraining.training_step = real


@pytest.mark.parametrize("packing", [False, True])
def test_a_chat_training_goes_on_where_it_stopped(tiny_lm, chat, tmp_path, packing):
    options = {"eval_share": 0.25, "samples": 1, "packing": packing, "batch_size": 2}
    quiet(language(tiny_lm, chat, tmp_path / "once", **options))
    out = tmp_path / "stopped"
    # a shell that starts tests in the background ignores it
    handler = signal.getsignal(signal.SIGINT)
    with interrupted_at(3, signal.SIGTERM):
        code, said = quiet(language(tiny_lm, chat, out, **options))
    assert code == 130 and "stopped at step 4" in said
    transformers.AutoModelForCausalLM.from_pretrained(out)
    before = json.loads((out / "samples.json").read_text())[0]["before"]
    code, said = quiet(language(tiny_lm, chat, out, **options), resume=True)
    assert code == 0 and "resumed at step 4" in said
    same(tmp_path / "once", out)
    assert json.loads((out / "samples.json").read_text())[0]["before"] == before
    assert not list(out.glob("checkpoint-*"))
    # signals are what they were
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_run_is_not_gone_on_with(encoder, reviews, tmp_path):
    out = tmp_path / "out"
    with interrupted_at(1):
        quiet(classifier(encoder, reviews, out))
    # what only says what is seen of the run may change
    training = {"logging_steps": 1}
    rows = Path(reviews).read_text()
    for change, message in (
        ({"lr": 1.0}, r"lr \(saved 0.01, given 1.0\)"),
        ({"slices": {"r": 8, "switch_interval": 2}}, r"slices.r \(saved 4, given 8\)"),
        ({"training": {"weight_decay": 0.1}}, "training.weight_decay"),
    ):
        with pytest.raises(UserError, match=f"another run: .*{message}"):
            quiet(classifier(encoder, reviews, out, **change), resume=True)
    Path(reviews).write_text(rows.replace("fine", "good"))
    with pytest.raises(UserError, match="the training rows are others"):
        quiet(classifier(encoder, reviews, out), resume=True)
    Path(reviews).write_text(rows)
    assert quiet(classifier(encoder, reviews, out, training=training), resume=True)[0] == 0
    with pytest.raises(UserError, match="is finished"):
        quiet(classifier(encoder, reviews, out), resume=True)


def test_the_order_of_rows_is_a_function_of_seed_and_epoch():
    lengths = [(7 * i) % 50 for i in range(107)]
    order = LengthWindows(lengths, 4, 3)
    first = list(order)
    assert sorted(first) == list(range(107)) and list(order) == first
    spread = [max(s) - min(s) for s in steps_of(first, lengths)]
    assert sum(spread) / len(spread) < 4
    order.set_epoch(1)
    assert list(order) != first
    assert list(LengthWindows(lengths, 4, 4)) != first


def steps_of(order, lengths):
    return [[lengths[i] for i in order[k : k + 4]] for k in range(0, 104, 4)]


# What is refused, and by which name


def test_the_base_is_never_overwritten(encoder, reviews, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(encoder, base)
    weights = (base / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(base)
    for output in (base, tmp_path / "link", tmp_path / "base" / ".." / "base"):
        with pytest.raises(UserError, match="is the folder of --model"):
            quiet(classifier(base, reviews, output))
    assert (base / "model.safetensors").read_bytes() == weights
    quiet(classifier(encoder, reviews, tmp_path / "out", epochs=1))
    with pytest.raises(UserError, match="holds a model already"):
        quiet(classifier(encoder, reviews, tmp_path / "out", epochs=1))


def test_a_trained_head_goes_on_meaning_what_it_meant(encoder, reviews, tmp_path):
    good = tmp_path / "good"
    quiet(classifier(encoder, reviews, good, epochs=10, head_lr=2e-2))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(good)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    model.config.id2label = {0: "good", 1: "bad"}
    model.config.label2id = {"good": 0, "bad": 1}
    model.save_pretrained(tmp_path / "flipped")
    transformers.AutoTokenizer.from_pretrained(good).save_pretrained(tmp_path / "flipped")
    accuracies = []
    for name in ("good", "flipped"):
        out = tmp_path / f"from_{name}"
        options = {"lr": 0.0, "head_lr": 0.0, "epochs": 1, "eval_data": reviews}
        quiet(classifier(tmp_path / name, reviews, out, **options))
        accuracies.append(
            json.loads((out / "training.json").read_text())["metrics"]["accuracy"]
        )
    assert accuracies[0] == accuracies[1] > 0.9
    config = json.loads((tmp_path / "from_flipped" / "config.json").read_text())
    assert config["id2label"] == {"0": "good", "1": "bad"}


def test_a_sliced_head_is_refused_by_name(tiny_lm, chat, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm)
    untied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(
            {**model.config.to_dict(), "tie_word_embeddings": False}
        )
    )
    untied.save_pretrained(tmp_path / "untied")
    transformers.AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "untied")
    slices = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(UserError, match="lm_head has slices, and SFTTrainer"):
        quiet(language(tmp_path / "untied", chat, tmp_path / "out", slices=slices))
    lean = language(tmp_path / "untied", chat, tmp_path / "out", slices=slices, lean=True)
    with pytest.raises(UserError, match="lm_head is sliced, and lean's loss reads"):
        quiet(lean)


def test_everything_is_looked_at_before_the_model_is_loaded(
    tiny_lm, encoder, tmp_path, monkeypatch
):
    for kind in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(
            getattr(transformers, kind),
            "from_pretrained",
            lambda *a, **k: pytest.fail("loaded"),
        )
    long = [{"messages": [{"role": "user", "content": "a"}]}]
    with pytest.raises(UserError, match="row 1: .*no message of the assistant"):
        quiet(language(tiny_lm, lines(tmp_path / "a.jsonl", long), tmp_path / "out"))
    mixed = [{"text": "a", "label": "x"}, {"text": 5, "label": "y"}]
    with pytest.raises(UserError, match="row 2: column 'text' holds int 5"):
        quiet(classifier(encoder, lines(tmp_path / "b.jsonl", mixed), tmp_path / "out"))
    held = lines(tmp_path / "held.jsonl", [{"text": "a", "label": "z"}])
    two = lines(tmp_path / "two.jsonl", [{"text": "a", "label": x} for x in "xy"])
    with pytest.raises(UserError, match="label 'z' does not occur"):
        quiet(classifier(encoder, two, tmp_path / "out", eval_data=held))
    with pytest.raises(UserError, match="did you mean 'logging_steps'"):
        quiet(classifier(encoder, two, tmp_path / "out", training={"loging_steps": 1}))
    with pytest.raises(UserError, match="--dtype int8"):
        quiet(classifier(encoder, two, tmp_path / "out", dtype="int8"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == []


# Several processes


# `slicefine train` for one recipe after the other: starting two processes takes longer than training.
LAUNCHED = """
import sys
from slicefine.cli.app import app
for recipe in sys.argv[1:]:
    app(["train", recipe], standalone_mode=False)
"""


@pytest.mark.slow
def test_two_processes_are_one_within_rounding(tiny_lm, encoder, chat, reviews, tmp_path):
    """`accelerate launch --multi_gpu`, two gloo processes on the CPU, both trainers."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    kinds = {"chat": (language, tiny_lm, chat), "text": (classifier, encoder, reviews)}
    recipes = []
    for name, (kind, model, data) in kinds.items():
        quiet(kind(model, data, tmp_path / f"one-{name}", batch_size=8, lr=1e-3))
        made = kind(model, data, tmp_path / f"two-{name}", batch_size=4, lr=1e-3)
        recipes.append(tmp_path / f"{name}.yaml")
        recipes[-1].write_text(made.to_yaml())
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", str(script), *map(str, recipes)]
    done = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # the main process speaks, once for each recipe
    assert done.stdout.count("trainable ") == 2
    for name in kinds:
        same(tmp_path / f"one-{name}", tmp_path / f"two-{name}", within=2e-5)
        one, two = (
            json.loads((tmp_path / f"{count}-{name}" / "training.json").read_text())
            for count in ("one", "two")
        )
        assert one["metrics"]["steps"] == two["metrics"]["steps"]
        assert one["metrics"]["loss"] == pytest.approx(two["metrics"]["loss"], rel=1e-3)


# The real small decoder


@pytest.mark.slow
@pytest.mark.real
def test_chat_data_on_the_real_small_decoder(decoder, chat, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(chats()).to_parquet(str(tmp_path / "chat.parquet"))
    data = str(tmp_path / "chat.parquet")
    recipe = language(decoder, data, tmp_path / "out", epochs=4, samples=1, max_length=128)
    recipe.training["logging_steps"] = 1
    code, said = quiet(recipe)
    assert code == 0 and "weights in bfloat16" in said
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    losses = [entry["loss"] for entry in written["log"] if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0] and (tmp_path / "out" / "samples.json").exists()


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantized_base_leaves_a_delta_and_the_same_as_lora(
    decoder, chat, tmp_path, base
):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    peft = pytest.importorskip("peft")
    from slicefine.model import SliceModel

    recipe = Recipe(
        model=str(decoder),
        task="causal-lm",
        data=chat,
        output=str(tmp_path / "out"),
        base=base,
        batch_size=4,
        max_length=48,
        device="cpu",
        bf16=False,
        training={"max_steps": 4},
        slices={"r": 4, "pool": 16, "switch_interval": 2},
    )
    said: list[str] = []
    assert fine_tune(recipe, say=said.append) == 0
    out = tmp_path / "out"
    assert any(line.startswith("LoRA") for line in "\n".join(said).splitlines())
    assert not (out / "model.safetensors").exists()

    def load():
        from slicefine.training.loading import packing

        return transformers.AutoModelForCausalLM.from_pretrained(
            decoder, **packing(base, torch.bfloat16, "cpu", str(decoder))
        ).train()

    ids = {"input_ids": torch.arange(20)[None]}
    plain = load()(**ids).logits
    trained = SliceModel.from_pretrained(load(), out / "delta").train()(**ids).logits
    lora = peft.PeftModel.from_pretrained(load(), out / "lora").train()(**ids).logits
    moved = (trained - plain).abs().max()
    assert moved > 0 and (lora - trained).abs().max() < 0.1 * moved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "int3"}, "base is 'int3'; expected nf4 or int8"),
        ({"base": "nf4", "task": "text-classification"}, "is for language models"),
        ({"base": "nf4", "slices": {"keep_originals": False}}, "needs the originals"),
    ],
)
def test_a_base_that_cannot_be_trained_on_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Recipe(**{"model": "m", "task": "causal-lm", "data": "d", **changes})


def test_a_gguf_file_is_not_packed_again(chat, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from slicefine.training.loading import packing

    with pytest.raises(UserError, match="holds packed weights of another kind"):
        packing("nf4", "auto", "cpu", "model.gguf")
