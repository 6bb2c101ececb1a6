"""Ahead-of-time compilation of the Triton kernels for GPUs that are not here, in a process without the interpreter.

python tests/aot.py prints one JSON line per kernel, configuration and target: registers, bytes spilled, shared memory.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from slicefine_kernels.configs import adamw_config, grad_config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# the package exports functions of the modules' names
adamw, grad, fused = (
    importlib.import_module(f"slicefine_kernels.{op}") for op in ("slice_adamw", "slice_grad", "slice_grad_adamw")
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# (R, K): columns r = 1, 16, 64, 256 of a 4096-high weight; rows; a block
SHAPES = {
    "column r=1": (4096, 1),
    "column r=16": (4096, 16),
    "column r=64": (4096, 64),
    "column r=256": (4096, 256),
    "row r=16": (16, 4096),
    "row r=256": (256, 4096),
    "block 64": (64, 64),
}


def compile_one(
    fn,
    types: dict[str, str],
    constants: dict[str, object],
    target: str,
    num_warps: int,
    num_stages: int = 3,
    aligned: tuple[str, ...] = (),
):
    """Compile as the launcher would: pointers, and the strides named, divisible by 16."""
    signature = {name: "constexpr" if name in constants else types[name] for name in fn.arg_names}
    divisible = [i for i, name in enumerate(fn.arg_names) if signature[name].startswith("*") or name in aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    source = ASTSource(fn, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, "num_stages": num_stages})


def resources(kernel, target: str) -> dict[str, int]:
    """Registers, spilled bytes and shared memory; for AMD the compiler's own metadata."""
    shared = kernel.metadata.shared
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        find = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        return {"registers": find("vgpr_count"), "spilled": 4 * find("vgpr_spill_count"), "shared": shared}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3]), "shared": shared}


def variants():
    """(op, what, fn, types, constants, num_warps, num_stages, aligned)"""
    for dtype, size in TYPES.items():
        for shape, (R, K) in SHAPES.items():
            config = grad_config(R, K, size)
            rows = not shape.startswith("column")
            operands = {
                "dy_ptr": f"*{dtype}",
                "x_ptr": f"*{dtype}",
                "rows_ptr": "*i64",
                **dict.fromkeys(
                    ("stride_dyt", "stride_dyr", "stride_xt", "stride_xk", "T", "R", "K", "tokens_per_split"), "i32"
                ),
            }
            tile = {
                "HAS_ROWS": rows,
                "BLOCK_R": config.BLOCK_R,
                "BLOCK_K": config.BLOCK_K,
                "BLOCK_T": config.BLOCK_T,
                "INPUT_PRECISION": "ieee",
                "UPCAST": False,
                "stride_dyr": 1,
                "stride_xk": 1,
            }
            aligned = (
                "stride_dyt",
                "T",
                "tokens_per_split",
                *(("stride_xt", "K") if K % 16 == 0 else ()),
                *(("R",) if R % 16 == 0 else ()),
            )
            yield (
                "slice_grad",
                f"{shape}, {dtype}",
                grad._slice_grad_kernel,
                {**operands, "out_ptr": "*fp32"},
                tile,
                config.num_warps,
                config.num_stages,
                aligned,
            )
            scalars = dict.fromkeys(
                ("lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "sign"), "fp32"
            )
            more = {
                **operands,
                **dict.fromkeys(("p_ptr", "m_ptr", "v_ptr", "step_ptr"), "*fp32"),
                "w_ptr": f"*{dtype}",
                "cols_ptr": "*i64",
                "stride_wr": "i32",
                "seed": "i64",
                **scalars,
            }
            flags = {"HAS_COLS": "row" not in shape, "STOCHASTIC": dtype == "bf16", "stride_wc": 1}
            yield (
                "slice_grad_adamw",
                f"{shape}, {dtype}",
                fused._slice_grad_adamw_kernel,
                more,
                {**tile, **flags},
                config.num_warps,
                config.num_stages,
                (*aligned, "stride_wr"),
            )
        config = adamw_config()
        types = {
            "table_ptr": "*i64",
            "blocks_ptr": "*i64",
            "seed": "i64",
            **dict.fromkeys(("lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "sign"), "fp32"),
        }
        constants = {
            "STOCHASTIC": dtype == "bf16",
            "WEIGHT_DTYPE": adamw._TRITON_DTYPE[
                {"bf16": adamw.torch.bfloat16, "fp16": adamw.torch.float16, "fp32": adamw.torch.float32}[dtype]
            ],
            "BLOCK": config.BLOCK,
        }
        yield "slice_adamw", f"all, {dtype}", adamw._slice_adamw_kernel, types, constants, config.num_warps, 3, ()


def main(targets: list[str]) -> None:
    for op, what, fn, types, constants, warps, stages, aligned in variants():
        for target in targets:
            kernel = compile_one(fn, types, constants, target, warps, stages, aligned)
            print(json.dumps({"op": op, "what": what, "target": target, **resources(kernel, target)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
