"""Compile every shipped kernel for GPUs that are not here: registers, spills and shared memory,
without running anything.

python -m benchmarks.aot [--json FILE] [--targets sm_90 ...]

Triton's kernels in every shipped configuration, dtype and slice type, and csrc's CUDA kernels where
a toolkit is found. Rows: {"kernel", "config", "target", "registers", "spill_bytes",
"shared_bytes"}. Exit status 1 if anything spills or wants more shared memory than the target has.
Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from slicefine_kernels import tuned
from slicefine_kernels.configs import (
    GradConfig,
    adamw_config,
    default_config,
    gate_config,
    grad_config,
    norm_config,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# the package exports functions of the modules' names
adamw, adamw_8bit, grad, fused, writes, norm, gated = (
    importlib.import_module(f"slicefine_kernels.{op}")
    for op in (
        "slice_adamw",
        "slice_adamw_8bit",
        "slice_grad",
        "slice_grad_adamw",
        "write_slices",
        "rms_norm",
        "gated_activation",
    )
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KIB = 1024
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# (R, K): every class of configuration, both operands wide, and a block
SHAPES = {
    "column r=1": (4096, 1),
    "column r=16": (4096, 16),
    "column r=32": (4096, 32),
    "column r=64": (4096, 64),
    "column r=256": (4096, 256),
    "row r=16": (16, 4096),
    "row r=32": (32, 4096),
    "row r=256": (256, 4096),
    "block 64": (64, 64),
}


@dataclass(frozen=True)
class Variant:
    """One kernel as the launcher would compile it: argument types, constants, which arguments
    divide by 16.
    """

    kernel: str
    config: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    pointers_aligned: bool = True
    maxnreg: int | None = None

    def compile(self, target: str) -> Any:
        fn = self.function
        signature = {
            n: "constexpr" if n in self.constants else self.types[n] for n in fn.arg_names
        }
        divisible = [
            i
            for i, n in enumerate(fn.arg_names)
            if (signature[n].startswith("*") and self.pointers_aligned) or n in self.aligned
        ]
        source = ASTSource(
            fn,
            signature,
            self.constants,
            {(i,): [["tt.divisibility", 16]] for i in divisible},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if target.startswith("sm_"):
            options["maxnreg"] = self.maxnreg
        return triton.compile(source, target=TARGETS[target], options=options)


def resources(kernel: Any, target: str) -> dict[str, int]:
    """Registers, spilled bytes and shared memory; for AMD the compiler's own metadata."""
    shared = kernel.metadata.shared
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        find = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        return {
            "registers": find("vgpr_count"),
            "spill_bytes": 4 * find("vgpr_spill_count"),
            "shared_bytes": shared,
        }
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found is not None, text
    return {
        "registers": int(found[1]),
        "spill_bytes": int(found[2]) + int(found[3]),
        "shared_bytes": shared,
    }


_SCALARS = dict.fromkeys(
    ("lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "sign"),
    "fp32",
)
_SIZES = (
    "stride_dyt",
    "stride_dyr",
    "stride_xt",
    "stride_xk",
    "stride_wr",
    "stride_wc",
    "T",
    "R",
    "K",
    "tokens_per_split",
    "splits",
)
_FLOATS = ("p_ptr", "m_ptr", "v_ptr", "step_ptr", "out_ptr", "partials_ptr")


def gradient_variants(
    dtype: str, shape: str, config: GradConfig, aligned: bool
) -> Iterator[Variant]:
    """slice_grad and slice_grad_adamw. Not aligned: a view at an odd offset, whose rows no vector
    load may cross.
    """
    R, K = SHAPES[shape]
    types = {
        **dict.fromkeys(("dy_ptr", "x_ptr", "w_ptr"), f"*{dtype}"),
        **dict.fromkeys(_FLOATS, "*fp32"),
        **dict.fromkeys(("rows_ptr", "cols_ptr"), "*i64"),
        "tickets_ptr": "*i32",
        **dict.fromkeys(_SIZES, "i32"),
        **_SCALARS,
        "seed": "i64",
    }
    blocks = {k: v for k, v in asdict(config).items() if k.startswith("BLOCK")}
    constants = {
        **blocks,
        "HAS_ROWS": not shape.startswith("column"),
        "SPLIT": True,
        "INPUT_PRECISION": "ieee",
        "UPCAST": False,
        "stride_dyr": 1,
        "stride_xk": 1,
    }
    update = {
        "HAS_COLS": not shape.startswith("row"),
        "STOCHASTIC": dtype == "bf16",
        "stride_wc": 1,
    }
    divisible = [
        "T",
        "tokens_per_split",
        *(n for n, size in (("R", R), ("K", K)) if size % 16 == 0),
    ]
    if aligned:
        divisible += ["stride_dyt", "stride_wr", *(("stride_xt",) if K % 16 == 0 else ())]
    what = f"{shape}, {dtype}{'' if aligned else ', unaligned'}, {'x'.join(map(str, blocks.values()))}"
    rest = (config.num_warps, config.num_stages, tuple(divisible), aligned, config.maxnreg)
    yield Variant("slice_grad", what, grad._slice_grad_kernel, types, constants, *rest)
    yield Variant(
        "slice_grad_adamw",
        what,
        fused._slice_grad_adamw_kernel,
        types,
        {**constants, **update},
        *rest,
    )


# features of a norm: a program's block is narrower, as wide, and wider than all of them
NORM_WIDTHS = (64, 2048, 8192)


def lean_variants(dtype: str) -> Iterator[Variant]:
    """The norms and gated products of lean models."""
    pointers = ("x_ptr", "w_ptr", "y_ptr", "dy_ptr", "dx_ptr", "gate_ptr", "up_ptr")
    types = {
        **dict.fromkeys((*pointers, "dgate_ptr", "dup_ptr"), f"*{dtype}"),
        "rstd_ptr": "*fp32",
        **dict.fromkeys(("stride_xn", "stride_dyn", "stride_gn", "stride_un"), "i32"),
        **dict.fromkeys(("D", "M"), "i32"),
        **dict.fromkeys(("eps", "offset"), "fp32"),
    }
    aligned = ("stride_xn", "stride_dyn", "stride_gn", "stride_un", "D", "M")
    for width in NORM_WIDTHS:
        config = norm_config(width)
        constants: dict[str, Any] = {"BLOCK": config.BLOCK}
        what, rest = f"{dtype}, {width}", (config.num_warps, 3, aligned)
        back = norm._rms_norm_bwd_kernel
        yield Variant("rms_norm_backward", what, back, types, constants, *rest)
        for late in (False, True):
            forward = norm._rms_norm_fwd_kernel
            more = {**constants, "LATE_CAST": late}
            yield Variant("rms_norm", f"{what}, {late}", forward, types, more, *rest)
    config = gate_config()
    for kind, number in gated._KINDS.items():
        constants = {"BLOCK": config.BLOCK, "KIND": number}
        for name, kernel in (
            ("gated_activation", gated._gated_activation_fwd_kernel),
            ("gated_activation_backward", gated._gated_activation_bwd_kernel),
        ):
            rest = (config.num_warps, 3, aligned)
            yield Variant(name, f"{dtype}, {kind}", kernel, types, constants, *rest)


def variants(target: str) -> Iterator[Variant]:
    """Every kernel that can be launched on the target: tuned configurations where there are any,
    defaults else.
    """
    for dtype, size in TYPES.items():
        for shape, (R, K) in SHAPES.items():
            yield from gradient_variants(
                dtype, shape, grad_config(R, K, size, target), True
            )
        yield from gradient_variants(
            dtype, "column r=16", default_config(4096, 16, size), False
        )
        yield from lean_variants(dtype)
        types = {"table_ptr": "*i64", "book_ptr": "*fp32", "seed": "i64", **_SCALARS}
        weight = adamw._TRITON_DTYPE[
            {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        ]
        config = adamw_config()
        constants = {
            "STOCHASTIC": dtype == "bf16",
            "WEIGHT_DTYPE": weight,
            "BLOCK": config.BLOCK,
        }
        yield Variant(
            "slice_adamw",
            dtype,
            adamw._slice_adamw_kernel,
            types,
            constants,
            config.num_warps,
        )
        eight = {**constants, "BLOCKS": adamw_8bit._BLOCKS}
        del eight["BLOCK"]
        plain = {"WEIGHT_DTYPE": weight, "BLOCK": config.BLOCK}
        kernel = writes._write_slices_kernel
        table = {"table_ptr": "*i64"}
        yield Variant("write_slices", dtype, kernel, table, plain, config.num_warps)
        yield Variant(
            "slice_adamw_8bit", dtype, adamw_8bit._slice_adamw_8bit_kernel, types, eight, 8
        )
    for (architecture, *_), chosen in tuned.GRAD.items():
        if architecture == target:
            yield from gradient_variants("bf16", "block 64", GradConfig(*chosen), True)


def rows(targets: list[str]) -> Iterator[dict[str, Any]]:
    for target in targets:
        for variant in variants(target):
            found = resources(variant.compile(target), target)
            yield {
                "kernel": f"triton {variant.kernel}",
                "config": variant.config,
                "target": target,
                **found,
            }


def cuda_rows(targets: list[str]) -> list[dict[str, Any]]:
    """The same of csrc's CUDA kernels; none without a CUDA toolkit."""
    from benchmarks import cuda_resources

    return cuda_resources.rows([target for target in targets if target.startswith("sm_")])


def faults(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row
        for row in found
        if row["spill_bytes"] or row["shared_bytes"] > SHARED_LIMIT[row["target"]]
    ]


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['target']:<8}{row['kernel']:<26}{row['config']:<46}{row['registers']:>4} registers"
        f"{row['spill_bytes']:>6} B spilled{row['shared_bytes']:>8} B shared"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", choices=("triton", "cuda"))
    options = parser.parse_args()
    found = []
    for source in (
        rows if options.only != "cuda" else None,
        cuda_rows if options.only != "triton" else None,
    ):
        for row in source(options.targets) if source else ():
            found.append(row)
            print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in faults(found):
        print("FAULT", line(row))
    return 1 if faults(found) else 0


if __name__ == "__main__":
    sys.exit(main())
