"""Every shipped launch configuration, compiled for GPUs that are not here: no spill, shared memory
within the limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def compiled(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run benchmarks/aot.py (or code) in a process of its own: here Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [
        sys.executable,
        *(["-c", code] if code else ["-m", "benchmarks.aot", *arguments]),
    ]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_no_configuration_spills(target, tmp_path):
    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    result = compiled(
        "--only", "triton", "--targets", target, "--json", str(tmp_path / "rows.json")
    )
    print("\n" + result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {
        "kernel",
        "config",
        "target",
        "registers",
        "spill_bytes",
        "shared_bytes",
    } == set(rows[0])
    for dtype in ("bf16", "fp16", "fp32"):
        mine = [r for r in rows if f"{dtype}" in r["config"]]
        assert (
            len(mine) >= 21
        )  # (9 shapes + 1 unaligned) x 2 gradient kernels + slice_adamw
    assert [
        r for r in rows if r["spill_bytes"] or r["shared_bytes"] > 1024 * limits[target]
    ] == []


@pytest.mark.slow
def test_the_gate_would_notice_a_spill():
    """A 256 x 256 tile of float32 accumulators cannot fit the registers of four warps."""
    code = (
        "import json\nfrom benchmarks import aot\nfrom slicefine_kernels.configs import"
        " GradConfig\nvariant = next(aot.gradient_variants('bf16', 'column r=256', GradConfig(256,"
        " 256, 64, 4, 3), True))\nrow = {'target': 'sm_80',"
        " **aot.resources(variant.compile('sm_80'),"
        " 'sm_80')}\nprint(json.dumps([row['spill_bytes'], len(aot.faults([row]))]))\n"
    )
    spilled, faults = json.loads(compiled(code=code).stdout)
    assert spilled > 0 and faults == 1
