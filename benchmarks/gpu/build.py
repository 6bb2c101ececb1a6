"""Build csrc on the machine that has the GPU, in a folder of its own, and run compute-sanitizer on
the CUDA ops.

The rest of this run imports what is built; the checkout stays as it is. What is missing for either
is recorded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.job import Job

ROOT = Path(__file__).parents[2]


def find_tool(name: str) -> str | None:
    """In the pip package of that name, beside this Python, on PATH, or in a CUDA toolkit: the
    system's CMake may be too old.
    """
    packaged, toolkit = [], []
    for module, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        if module == name and importlib.util.find_spec(module):
            packaged.append(Path(getattr(importlib.import_module(module), attribute)))
    packaged.append(Path(sys.executable).parent)
    for home in (
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
    ):
        if home:
            toolkit += [Path(home) / "bin", Path(home) / "compute-sanitizer"]
    on_path = [Path(folder) for folder in os.get_exec_path()]
    candidates = [folder / name for folder in (*packaged, *on_path, *toolkit)]
    return next(
        (str(path) for path in candidates if path.is_file() and os.access(path, os.X_OK)),
        None,
    )


def run(
    command: Sequence[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """(exit status, output); status None where it ran out of time and was ended with all that it
    had started.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def configuration(folder: Path, target: Path, tools: dict[str, str]) -> list[str]:
    """CMake's command line: what scikit-build-core would give it."""
    import pybind11

    import slicefine

    return [
        tools["cmake"],
        "-S",
        str(ROOT / "csrc"),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        f"-DCMAKE_INSTALL_PREFIX={target}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DSKBUILD_PROJECT_VERSION={slicefine.__version__}",
    ]


def architecture(device: str) -> str:
    """As CMake names the GPU that is here."""
    if device != "cuda":
        return ""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def build(job: Job) -> None:
    """slicefine._C and, where there is nvcc and source for it, slicefine._CUDA, for the GPU that is
    here.
    """
    tools = {name: find_tool(name) for name in ("cmake", "ninja", "nvcc")}
    lacking = [name for name in ("cmake", "ninja") if tools[name] is None]
    lacking += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    for name, path in tools.items():
        job.row(what=name, found=path or "missing")
    job.row(what="pybind11", found="missing" if "pybind11" in lacking else "yes")
    if lacking:
        job.missing = f"{', '.join(lacking)}; nothing built"
        return
    environment = {
        "SLICEFINE_CUDA_ARCHS": architecture(job.device),
        "SLICEFINE_CUDA": "auto",
    }
    with tempfile.TemporaryDirectory() as name:
        usable = {tool: path for tool, path in tools.items() if path}
        steps = {
            "configure": configuration(Path(name), job.modules, usable),
            "compile": [usable["cmake"], "--build", name],
            "install": [usable["cmake"], "--install", name],
        }
        for step, command in steps.items():
            start = time.perf_counter()
            status, output = run(command, job.left() - 2, environment)
            job.row(
                what=step, seconds=round(time.perf_counter() - start, 1), ok=status == 0
            )
            if step == "configure":
                job.notes += re.findall(r"-- (slicefine: [^\n]*)", output)
            if status != 0:
                raise RuntimeError(
                    f"{step}"
                    f" {'ran out of time' if status is None else f'ended with status {status}'}:\n{output[-6000:]}"
                )
    for module in ("_C", "_CUDA"):
        files = sorted((job.modules / "slicefine").glob(f"{module}.*"))
        if not files:
            job.row(
                what=f"slicefine.{module}",
                absent="not built: see the notes, or this commit has no source for it",
            )
            continue
        imported = importlib.import_module(f"slicefine.{module}")
        job.row(
            what=f"slicefine.{module}",
            found=f"{files[0].stat().st_size >> 10} KiB",
            ok=Path(imported.__file__ or "") == files[0],
        )


def sanitizer(job: Job) -> None:
    """memcheck, then racecheck, on a short run of the CUDA ops (benchmarks/gpu/sanitized.py)."""
    from slicefine.backends.select import BACKENDS

    tool = find_tool("compute-sanitizer")
    if tool is None:
        job.missing = "compute-sanitizer is neither on PATH nor in a CUDA toolkit"
        return
    backend = BACKENDS.get("cuda")
    reason = (
        backend.refusal("cuda", set(backend.dtypes))
        if backend
        else "this commit has no cuda backend"
    )
    if reason is not None:
        job.missing = f"the cuda backend does not run here: {reason}"
        return
    # every tensor an allocation of its own, so that a write past its end is one past an
    # allocation's end
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # torch asks the driver for entry points that older ones lack, and handles the error; memory
    # faults are what is looked for
    quiet = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
    for i, check in enumerate(("memcheck", "racecheck")):
        command = [
            tool,
            "--tool",
            check,
            *quiet[check],
            "--error-exitcode",
            "86",
            sys.executable,
            "-m",
            "benchmarks.gpu.sanitized",
            str(job.modules),
        ]
        start = time.perf_counter()
        status, output = run(command, job.left() * (0.6 if i == 0 else 0.95), environment)
        row = {"tool": check, "seconds": round(time.perf_counter() - start, 1)}
        found = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: [^\n]*)", output)
        if status is None:
            job.row(**row, absent="ran out of time")
        elif "Device not supported" in output:
            job.row(**row, absent="compute-sanitizer says: Device not supported")
        else:
            ok = status == 0 and bool(found)
            job.row(
                **row,
                summary="; ".join(found) or output[-1500:],
                ok=ok,
                **({} if ok else {"output": output[-6000:]}),
            )
