"""One test per case and method; see conftest.py for the measuring and registry.py for what there
is.
"""

from __future__ import annotations

from pathlib import Path

import slicefine
from benchmarks.speed.conftest import REPLAY


def test_speed(method, measured, machine, benchmark):
    # a fixture before `benchmark`: a red check leaves nothing behind
    rows, times = measured
    REPLAY.load([ms / 1e3 for ms in times[0][method.name]])
    benchmark.extra_info.update(
        row=rows[method.name],
        roofs=machine[2],
        package=str(Path(slicefine.__file__).parent),
    )
    benchmark.pedantic(REPLAY.play, rounds=len(REPLAY.pending))
