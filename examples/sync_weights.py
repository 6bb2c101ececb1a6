"""Keep a second process up to date while training: it gets what has changed, not the whole model.

The second process stands for an engine that samples or serves. vLLM takes the same changes
(``CheckpointWeightPatch(*change)``); that was not run here.

python -m examples.sync_weights
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.deltas.changes import apply_changes, pack_changes, unpack_changes


def main(arguments: list[str] | None = None) -> list[int]:
    """Bytes of every message."""
    args = options().parse_args(arguments)
    model: Any = build()
    config = SliceConfig(r=args.r, switch_interval=args.switch_interval)
    get_slice_model(model, config)
    optimizer = SliceAdamW(model.parameters(), lr=1e-3)

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    engine = context.Process(target=serve, args=(there,), daemon=True)
    engine.start()
    sizes, sent = [], 0
    for step in range(1, args.steps + 1):
        ids = torch.randint(0, model.config.vocab_size, (4, 32))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % args.every == 0 or step == args.steps:
            message = pack_changes(model.changed_since(sent))
            here.send_bytes(message)
            if here.recv() != fingerprint(model):
                raise SystemExit(f"step {step}: the engine holds other weights")
            sizes.append(len(message))
            sent = step
    here.send_bytes(b"")
    engine.join(timeout=60)
    whole = sum(value.nbytes for value in model.state_dict().values())
    print(f"{len(sizes)} messages of {max(sizes):,} bytes at most; the model has {whole:,}")
    return sizes


def serve(pipe: Connection) -> None:
    """The engine: a plain model that takes changes until an empty message."""
    torch.set_num_threads(1)
    model = build()
    while message := pipe.recv_bytes():
        apply_changes(model, unpack_changes(message))
        pipe.send(fingerprint(model))


def build() -> LlamaForCausalLM:
    """Both processes start from the same checkpoint; here, from the same seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between two messages")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--switch-interval", type=int, default=25)
    return parser


if __name__ == "__main__":
    main()
