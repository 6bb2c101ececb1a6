"""Every shipped launch configuration, compiled for GPUs that are not here: no spill, shared memory within the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def compiled(*arguments: str, code: str | None = None) -> str:
    """Run tests/aot.py (or code) in a process of its own: here Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent / "kernels")])
    command = [sys.executable, "-c", code] if code else [sys.executable, str(HERE / "aot.py"), *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_configuration_spills(target):
    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    rows = [json.loads(line) for line in compiled(target).splitlines()]
    assert len(rows) == 45  # 3 dtypes x (7 shapes x 2 gradient kernels + slice_adamw)
    print(
        "\n"
        + "\n".join(
            f"{r['target']:<8}{r['op']:<18}{r['what']:<22}{r['registers']:>4} registers{r['shared']:>8} B shared"
            for r in rows
        )
    )
    assert [r for r in rows if r["spilled"]] == []
    assert [r for r in rows if r["shared"] > 1024 * limits[target]] == []


@pytest.mark.slow
def test_the_gate_would_notice_a_spill():
    """A 256 x 256 tile of float32 accumulators cannot fit the registers of four warps."""
    code = (
        "import aot, json\n"
        "op, what, fn, types, constants, *_ = next(v for v in aot.variants() if v[0] == 'slice_grad')\n"
        "kernel = aot.compile_one(fn, types, {**constants, 'BLOCK_R': 256, 'BLOCK_K': 256}, 'sm_80', 4)\n"
        "print(json.dumps(aot.resources(kernel, 'sm_80')))\n"
    )
    assert json.loads(compiled(code=code))["spilled"] > 0
