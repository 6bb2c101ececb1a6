"""`slicefine env`: which backends exist here, and why the others do not. Standard library only,
also in a broken install.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from typing import Any

PACKAGES = (
    "slicefine",
    "torch",
    "triton",
    "safetensors",
    "transformers",
    "accelerate",
    "peft",
    "typer",
)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def attempt(check: Callable[[], str]) -> str:
    """What a check says, or the error that stopped it."""
    try:
        return check()
    # a panic of an extension in Rust is no Exception
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"broken: {type(error).__name__}: {error}"


def _accelerator() -> str:
    # Here and below in the functions: a broken install must still come as far as saying so.
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return (
            "none (torch is built for"
            f" {'CUDA ' + torch.version.cuda if torch.version.cuda else 'ROCm ' + built if built else 'the CPU only'},"
            " no device found)"
        )
    return ", ".join(
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_capability(i)})"
        for i in range(torch.cuda.device_count())
    )


def _compiled() -> str:
    cpu: Any = importlib.import_module("slicefine.backends.cpu")
    if cpu.unavailable:
        return f"missing: {cpu.unavailable}"
    return (
        f"available ({cpu._C.current_isa()}; this CPU also runs"
        f" {', '.join(cpu._C.isas()[1:]) or 'nothing else'})"
    )


def _triton() -> str:
    select: Any = importlib.import_module("slicefine.backends.select")
    torch: Any = importlib.import_module("torch")
    _, reason = select.BACKENDS["triton"].load()
    if reason:
        return f"missing: {reason}"
    if torch.cuda.is_available():
        return "available"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "available through its interpreter (TRITON_INTERPRET=1), for tests"
    return "installed, but there is no GPU for it"


def _cuda() -> str:
    select: Any = importlib.import_module("slicefine.backends.select")
    torch: Any = importlib.import_module("torch")
    module, reason = select.BACKENDS["cuda"].load()
    if reason:
        return f"missing: {reason}"
    built = f"compiled for {module._CUDA.architectures}"
    return (
        f"available ({built})"
        if torch.cuda.is_available()
        else f"installed ({built}), but there is no GPU for it"
    )


def _chosen() -> str:
    select: Any = importlib.import_module("slicefine.backends.select")
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = select.backend_for(device, {torch.float32})
    name = next(n for n, b in select.BACKENDS.items() if b.load()[0] is module)
    return f"{name} on {device}" + (" (forced)" if select.forced() else "")


def report() -> dict[str, Any]:
    torch = attempt(lambda: importlib.import_module("torch").__version__)
    # a second import of a torch that failed halfway can crash the process
    check = (
        (lambda _: "needs torch, which does not import")
        if torch.startswith("broken")
        else attempt
    )
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "torch imports": torch,
        "accelerator": check(_accelerator),
        "compiler": (
            shutil.which(os.environ.get("CXX", "c++"))
            or "none (needed only to build the cpu backend)"
        ),
        "backends": {
            "reference": check(lambda: "available"),
            "cpu": check(_compiled),
            "triton": check(_triton),
            "cuda": check(_cuda),
        },
        "SLICEFINE_BACKEND": os.environ.get("SLICEFINE_BACKEND", "not set"),
        "in use": check(_chosen),
    }


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--json"]):
        print("usage: slicefine env [--json]", file=sys.stderr)
        return 2
    found = report()
    if arguments == ["--json"]:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                print(f"  {name:<14}{entry}")
        else:
            print(f"{key + ':':<20}{value}")
    print(
        "\nMore: slicefine --help"
        if version("typer") != "not installed"
        else "\nThe other commands need: pip install 'slicefine[cli,hf]'"
    )
    return 0
