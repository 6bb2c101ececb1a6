"""Deltas for llama.cpp: its own converters, called on a LoRA adapter or on a merged model.

The mapping of names and the order of rows that llama.cpp wants differ from one architecture to the
next and are its business, so nothing of it is repeated here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from slicefine import atomic
from slicefine.deltas.format import DeltaError

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
LORA, MODEL = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"


def lora_to_gguf(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    llama_cpp: str | os.PathLike[str] | None = None,
    outtype: str = "f32",
) -> None:
    """A folder with a LoRA adapter as a .gguf file for ``llama-cli --lora``.

    Args:
        adapter: as `slicefine.deltas.lora.to_lora` writes it, with one rank for all weights
            (``server="vllm"``): llama.cpp scales every weight by the same alpha.
        base: the base model's folder; its config.json is read.
        output: the file; it is replaced in one step.
        llama_cpp: a checkout of llama.cpp; None: the environment variable LLAMA_CPP.
        outtype: one of `OUTTYPES`.

    Raises:
        DeltaError: there is no converter, or it has failed; with its last lines.
    """
    _convert(LORA, llama_cpp, output, outtype, ["--base", str(base), str(adapter)])


def model_to_gguf(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    llama_cpp: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
) -> None:
    """A folder with a merged model and its tokenizer as a .gguf file; see `lora_to_gguf`."""
    _convert(MODEL, llama_cpp, output, outtype, [str(model)])


def find_converter(name: str, llama_cpp: str | os.PathLike[str] | None) -> Path:
    """The path of one of llama.cpp's scripts.

    Raises:
        DeltaError: it is not there; with where to get it.
    """
    folder = llama_cpp or os.environ.get("LLAMA_CPP")
    if not folder:
        raise DeltaError(
            f"GGUF files are written by llama.cpp's {name}: git clone"
            " https://github.com/ggml-org/llama.cpp, pip install gguf, and give its folder"
            " (--llama-cpp, llama_cpp=, or the environment variable LLAMA_CPP)"
        )
    script = Path(folder) / name
    if not script.is_file():
        raise DeltaError(f"{folder} has no {name}; expected a checkout of llama.cpp")
    return script


def _convert(
    name: str,
    llama_cpp: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    outtype: str,
    arguments: list[str],
) -> None:
    if outtype not in OUTTYPES:
        raise DeltaError(f"outtype is {outtype!r}; expected one of {', '.join(OUTTYPES)}")
    script, output = find_converter(name, llama_cpp), Path(output)
    if output.suffix != ".gguf":
        raise DeltaError(f"{output}: expected a file that ends in .gguf")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(output) as temporary:
        command = [sys.executable, str(script), "--outfile", str(temporary)]
        done = subprocess.run(
            [*command, "--outtype", outtype, *arguments], capture_output=True, text=True
        )
        if done.returncode or not temporary.stat().st_size:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            raise DeltaError(f"{name} has failed (exit code {done.returncode}):\n{said}")
