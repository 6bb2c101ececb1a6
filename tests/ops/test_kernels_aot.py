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


LIMITS = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


# Two groups for two processes; importing Triton and torch takes as long as a quarter of a target.
@pytest.mark.slow
@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(targets, id=targets, marks=pytest.mark.xdist_group(targets))
        for targets in ("sm_80 sm_90 gfx942", "sm_100 sm_120")
    ],
)
def test_no_configuration_spills(targets, tmp_path):
    file = tmp_path / "rows.json"
    result = compiled(
        "--only", "triton", "--targets", *targets.split(), "--json", str(file)
    )
    print("\n" + result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    keys = {"kernel", "config", "target", "registers", "spill_bytes", "shared_bytes"}
    assert keys == set(found[0])
    for target in targets.split():
        rows = [row for row in found if row["target"] == target]
        for dtype in ("bf16", "fp16", "fp32"):
            mine = [row for row in rows if dtype in row["config"]]
            # (9 shapes + 1 unaligned) x 2 gradient kernels + slice_adamw
            assert len(mine) >= 21
        limit = 1024 * LIMITS[target]
        assert [r for r in rows if r["spill_bytes"] or r["shared_bytes"] > limit] == []


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
