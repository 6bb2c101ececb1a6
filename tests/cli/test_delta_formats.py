"""`slicefine delta export --format ...` and `import`. llama.cpp is not installed here: a stand-in
takes its converters' arguments and writes down what it was given.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file
from typer.testing import CliRunner

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.cli.app import app

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

CONVERTER = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("--outfile", "--outtype", "--base"):
    parser.add_argument(name)
parser.add_argument("folder")
args = parser.parse_args()
folder = Path(args.folder)
if Path(args.base or folder, "broken").exists():
    sys.exit("Model Broken is not supported")
names = sorted(file.name for file in folder.iterdir())
config = json.loads((folder / "adapter_config.json").read_text()) if args.base else {}
said = {"type": args.outtype, "files": names, "config": config}
said["weights"] = (folder / names[-1]).stat().st_size if args.base else None
Path(args.outfile).write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``base``, a small decoder; ``delta``, what 3 steps have changed; ``llama.cpp``, a stand-in."""
    folder = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.save_pretrained(folder / "base")
    config = SliceConfig(r=4, switch_interval=None, contiguous=False, bias="none")
    get_slice_model(model, config)
    trained = [p for n, p in model.named_parameters() if n.endswith("slice_weight")]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    optimizer = SliceAdamW(trained, lr=1e-2)
    ids = torch.randint(0, 64, (4, 8))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "delta")
    (folder / "llama.cpp").mkdir()
    for name in ("convert_lora_to_gguf.py", "convert_hf_to_gguf.py"):
        (folder / "llama.cpp" / name).write_text(CONVERTER)
    merged = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return folder, merged


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    for name in ("base", "delta", "llama.cpp"):
        (tmp_path / name).symlink_to(place[0] / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    return tmp_path


def delta(line, code=0):
    result = CliRunner().invoke(app, ["delta", *line.split()])
    assert result.exit_code == code, f"{line}\n{result.output}{result.exception!r}"
    return result.output


def base():
    return transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)


def test_shira_goes_to_peft_and_comes_back(here, place):
    merged = place[1]
    said = json.loads(delta("export delta --format shira --output shira --json"))
    served = peft.PeftModel.from_pretrained(base(), "shira").merge_and_unload()
    for key, value in served.state_dict().items():
        assert (value - merged[key]).abs().max().item() <= said["error"], key
    delta("import shira --model base --output back")
    delta("apply back --model base --output again")
    for key, value in load_file("again/model.safetensors").items():
        assert torch.equal(value, served.state_dict()[key]), key


def test_paca_comes_back_too(here, place):
    said = json.loads(delta("export delta --format paca --output paca --json"))
    config = json.loads(Path("paca/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("PACA", 4)
    delta("import paca --model base --output back")
    delta("apply back --model base --output again")
    again = load_file("again/model.safetensors")
    worst = max((again[key] - place[1][key]).abs().max().item() for key in again)
    assert worst == said["error"]


def test_gguf_by_llama_cpps_own_converters(here, monkeypatch):
    more = "--model base --llama-cpp llama.cpp"
    delta(f"export delta --format gguf --output a.gguf --outtype f16 {more}")
    said = json.loads(Path("a.gguf").read_text())
    assert said["type"] == "f16" and said["weights"] > 0
    # one rank for all: llama.cpp has one alpha
    assert (
        said["config"]["r"] == said["config"]["lora_alpha"]
        and not said["config"]["rank_pattern"]
    )
    monkeypatch.setenv("LLAMA_CPP", "llama.cpp")
    delta("export delta --format gguf-merged --output m.gguf --model base")
    said = json.loads(Path("m.gguf").read_text())
    assert {"config.json", "model.safetensors"} <= set(said["files"])
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "--format gguf --output a.gguf --model base",
            "git clone https://github.com/ggml-org",
        ),
        ("--format gguf --output a.gguf", "expected the folder of the base model"),
        (
            "--format gguf-merged --output a.gguf --model base --llama-cpp delta",
            "delta has no",
        ),
        (
            "--format gguf --output a.bin --model base --llama-cpp llama.cpp",
            "ends in .gguf",
        ),
        (
            "--format gguf --output a.gguf --model broken --llama-cpp llama.cpp",
            "not supported",
        ),
        ("--format onnx --output a", "is not one of lora, paca"),
        (
            "--format gguf --output a.gguf --model base --llama-cpp llama.cpp --outtype q9",
            "expected one of f32",
        ),
    ],
)
def test_what_is_missing_is_said(here, line, words):
    Path("broken").mkdir()
    Path("broken", "broken").touch()
    printed = delta(f"export delta {line}", code=2)
    assert words in " ".join(printed.replace("│", " ").split()), printed
    assert not Path("a.gguf").exists()
