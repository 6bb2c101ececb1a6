"""Registers, spills and shared memory of the CUDA kernels, compiled for GPUs that need not be here.

python -m benchmarks.cuda_resources [sm_80 ...] prints a table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CSRC = Path(__file__).parent.parent / "csrc"
UNITS = ("slice_grad", "slice_adamw", "slice_adamw_8bit", "slice_grad_adamw")
# what one block may have
SHARED_KB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}
ARITHMETIC = {
    "Fp32Fma": "fp32",
    "Tf32Mma": "tf32 mma",
    "4bf16": "bf16 mma",
    "4fp16": "fp16 mma",
}


def find_nvcc() -> Path | None:
    """The compiler in a toolkit's own folder; nvcc on PATH may be a script that only calls it."""
    if named := os.environ.get("CUDACXX"):
        return Path(named)
    for variable in ("CUDAToolkit_ROOT", "CUDA_HOME", "CUDA_PATH"):
        if (folder := os.environ.get(variable)) and (
            Path(folder) / "bin" / "nvcc"
        ).exists():
            return Path(folder) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        said = subprocess.run(
            [found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        return Path(top[1]).resolve() / "bin" / "nvcc" if top else Path(found)
    return next(
        (p for p in sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)), None
    )


def find_cuobjdump(nvcc: Path) -> Path:
    """The toolkit's own, or the one that ships inside Triton."""
    if (beside := nvcc.parent / "cuobjdump").exists():
        return beside
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def describe(symbol: str, unit: str) -> tuple[str, str]:
    """(kernel, config) of a mangled name."""
    if "gradient_kernel" not in symbol:
        return unit, "all dtypes"
    arithmetic = next(text for key, text in ARITHMETIC.items() if key in symbol)
    thin = re.search(r"Li(\d+)E", symbol)
    assert thin is not None, symbol
    return unit, f"{arithmetic}, 128x{thin[1]}"


def rows(targets: list[str]) -> list[dict[str, Any]]:
    """One row per kernel and target: kernel, config, target, registers, spill_bytes (stack and
    local memory), shared_bytes.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(
            "no nvcc: looked at CUDACXX, CUDAToolkit_ROOT, CUDA_HOME, CUDA_PATH, PATH and"
            " /usr/local/cuda*"
        )
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for unit in UNITS:
            for target in targets:
                cubin = Path(folder) / f"{unit}.{target}.cubin"
                subprocess.run(
                    [
                        str(nvcc),
                        "-std=c++17",
                        "-O3",
                        f"-arch={target}",
                        "-cubin",
                        "-o",
                        str(cubin),
                        str(CSRC / f"{unit}.cu"),
                    ],
                    check=True,
                )
                text = subprocess.run(
                    [str(find_cuobjdump(nvcc)), "--dump-resource-usage", str(cubin)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
                for symbol, registers, stack, shared, local in re.findall(
                    r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
                    text,
                ):
                    kernel, config = describe(symbol, unit)
                    result.append(
                        {
                            "kernel": kernel,
                            "config": config,
                            "target": target,
                            "registers": int(registers),
                            "spill_bytes": int(stack) + int(local),
                            "shared_bytes": int(shared),
                        }
                    )
    return result


def table(found: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{r['target']:<8}{r['kernel']:<18}{r['config']:<20}{r['registers']:>4} registers"
        f"{r['spill_bytes']:>4} B spilled{r['shared_bytes']:>8} B shared"
        for r in sorted(found, key=lambda r: (r["kernel"], r["config"], r["target"]))
    )


if __name__ == "__main__":
    print(table(rows(sys.argv[1:] or list(SHARED_KB))))
