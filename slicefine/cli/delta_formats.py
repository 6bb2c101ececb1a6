"""`slicefine delta export`, `import` and `scale`: a delta in the formats of others, and part of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.cli import tables
from slicefine.cli.delta_target import STORE, AsJson, Model, StorePath, Target, usable

_FORMATS = ("lora", "paca", "shira", "gguf", "gguf-merged")


def export(
    target: str,
    output: Annotated[
        Path, typer.Option(help="folder for the adapter; gguf: a file that ends in .gguf")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="lora, paca, shira (adapters of PEFT), gguf (a LoRA) or gguf-merged (a model)"
        ),
    ] = "lora",
    server: Annotated[
        str, typer.Option(help="peft: a rank per weight; vllm: one legal rank, no heads")
    ] = "peft",
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="truncate beyond it; vllm: 512 at most")
    ] = None,
    leave_out: Annotated[
        bool,
        typer.Option(
            "--leave-out", help="drop heads, biases, norms that the server cannot hold"
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="gguf: folder of the base model")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            envvar="LLAMA_CPP", help="gguf: a checkout of llama.cpp, whose converter runs"
        ),
    ] = None,
    outtype: Annotated[
        str, typer.Option(help="gguf: f32, f16, bf16, q8_0 or auto")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="export a revoked delta too")
    ] = False,
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Write a delta as an adapter that others load: LoRA of equal outputs without loss (unless a
    rank is truncated, and then says the error), PaCA, SHiRA, or a GGUF file.
    """
    from slicefine.deltas import peft_formats
    from slicefine.deltas.lora import to_lora

    if format not in _FORMATS:
        raise typer.BadParameter(
            f"{format!r} is not one of {', '.join(_FORMATS)}", param_hint="--format"
        )
    if server not in ("peft", "vllm"):
        raise typer.BadParameter(
            f"{server!r} is not one of peft, vllm", param_hint="--server"
        )
    found = usable(store, target, force)
    options: dict[str, Any] = {"max_rank": max_rank, "leave_out": leave_out}
    if format == "lora":
        adapter = to_lora(found.delta, server=server, **options)
        adapter.save(output)
        found.record("export", output=str(output), server=server, error=adapter.error)
        return tables.adapter(adapter, output, as_json)
    if format in ("paca", "shira"):
        write = peft_formats.to_paca if format == "paca" else peft_formats.to_shira
        sparse = write(found.delta)
        sparse.save(output)
        error = sparse.error
    else:
        error = _to_gguf(found, format, model, output, llama_cpp, outtype, options)
    found.record("export", output=str(output), format=format, error=error)
    tables.show(
        {
            "delta": found.delta.sha256,
            "output": str(output),
            "format": format,
            "error": error,
        },
        as_json,
        f"{format} of {found.label}: {output}, "
        + (f"error {error:.2e}" if error else "exact"),
    )


def _to_gguf(
    found: Target,
    format: str,
    model: str | None,
    output: Path,
    llama_cpp: Path | None,
    outtype: str,
    options: dict[str, Any],
) -> float:
    """The largest relative error of truncated ranks, before the file's own number format."""
    from slicefine.cli import folders
    from slicefine.deltas import gguf
    from slicefine.deltas.lora import to_lora

    if model is None or not Path(model).is_dir():
        raise typer.BadParameter(
            f"{model}: expected the folder of the base model", param_hint="--model"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "converted"
        if format == "gguf":
            # one rank: llama.cpp scales all weights by one alpha
            adapter = to_lora(found.delta, server="vllm", **options)
            adapter.save(folder)
            gguf.lora_to_gguf(folder, model, output, llama_cpp, outtype)
            return adapter.error
        # before the model is loaded, which takes its time
        gguf.find_converter(gguf.MODEL, llama_cpp)
        with tables.quiet():
            loaded = folders.load_for(found.delta, model)
            found.delta.apply_to(loaded)
            folders.write(loaded, model, folder)
        gguf.model_to_gguf(folder, output, llama_cpp, outtype)
    return 0.0


def import_(
    adapter: Annotated[Path, typer.Argument(help="folder of a PaCA or SHiRA adapter")],
    model: Model,
    output: Annotated[Path, typer.Option(help="folder for the delta")],
    dtype: Annotated[
        str, typer.Option(help="of the base that the adapter was trained on")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Turn a PaCA or SHiRA adapter of PEFT into a delta: it can be reverted, signed and stored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from slicefine.deltas.folder import save_folder
    from slicefine.deltas.peft_formats import read_adapter, read_config
    from slicefine.training.loading import pretrained

    precise = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in precise:
        raise typer.BadParameter(
            f"{dtype!r} is not one of {', '.join(precise)}", param_hint="--dtype"
        )
    classifies = read_config(adapter).get("task_type") == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    with tables.quiet():
        delta = read_adapter(adapter, pretrained(kind, model, precise[dtype]))
    save_folder(delta, output, str(adapter))
    tables.show(
        {"delta": delta.sha256, "from": str(adapter), "output": str(output)},
        as_json,
        f"{adapter} as a delta: {output}, SHA-256 {delta.sha256}",
    )


def scale(
    target: str,
    alpha: Annotated[float, typer.Argument(help="0 is the base, 1 the delta itself")],
    output: Annotated[Path, typer.Option(help="folder for the scaled delta")],
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Write a delta part of the way between the base and a fine-tune."""
    from slicefine.deltas.folder import save_folder

    found = Target(store, target)
    try:
        scaled = found.delta.scaled(alpha)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="ALPHA") from error
    save_folder(scaled, output, f"{found.label}, {alpha:g} of it")
    tables.show(
        {
            "delta": scaled.sha256,
            "of": found.delta.sha256,
            "alpha": alpha,
            "output": str(output),
        },
        as_json,
        f"{alpha:g} of {found.label}: {output}, SHA-256 {scaled.sha256}",
    )
