"""Parts of the GPU suite that a test has a worker run.

A module of their own: a part's time includes the import of the module that it is in.
"""

from __future__ import annotations

import os
import time

from benchmarks.gpu.job import bar


def part_that_works(job):
    job.row(value=1.5)
    job.bars.append(bar("a ratio", 1.2, 1.05, most=True))


def part_that_raises(job):
    job.row(value=2.5)
    raise ValueError("deliberate")


def part_that_crashes(job):
    job.row(value=3.5)
    os._exit(11)


def part_that_hangs(job):
    time.sleep(600)
