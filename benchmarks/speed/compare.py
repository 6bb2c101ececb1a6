"""Two commits on the same benchmarks: `python -m benchmarks.bench --base REV`.

REV goes into a temporary git worktree whose benchmarks/ is replaced by this checkout's, so both run
the same suite. The trees run in turns, each run a process of its own: base, here, base, here, ...,
base. A run's figure for a method is its ratio to the case's first method (the floor; plain torch),
which no commit of ours changes, so the machine's drift cancels. here / base is the ratio of a run
here to the mean of the base runs before and after it; base / base, of neighboring base runs in
either order, says what no difference looks like.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import quantiles
from benchmarks.speed.run import ROOT, entries_in, run_suite

# "case/method" -> ratio to the case's first method
Figures = dict[str, float]
BUILD_INPUTS = ("csrc", "setup.py")


def git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=check, capture_output=True, text=True
    )


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A worktree of the revision with this checkout's suite in it and a compiled module; removed
    afterwards.
    """
    found = git("rev-parse", "--verify", f"{revision}^{{commit}}", check=False)
    if found.returncode != 0:
        raise SystemExit(f"--base {revision}: {found.stderr.strip()}")
    with tempfile.TemporaryDirectory(prefix="slicefine-base-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), found.stdout.strip())
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            left_out = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=left_out)
            provide_compiled_module(found.stdout.strip(), tree)
            shutil.copy(ROOT / "pyproject.toml", tree / "pyproject.toml")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def provide_compiled_module(revision: str, tree: Path) -> None:
    """This checkout's modules where nothing that they are built from differs; else a build of the
    worktree's own.
    """
    if git("diff", "--quiet", revision, "--", *BUILD_INPUTS, check=False).returncode == 0:
        for module in (ROOT / "slicefine").glob("_C*.so"):
            shutil.copy(module, tree / "slicefine")
        return
    print("csrc differs: building the other commit's module", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tree / "dist"),
        str(tree),
    ]
    environment = (
        os.environ if torch.cuda.is_available() else {**os.environ, "SLICEFINE_CUDA": "0"}
    )
    subprocess.run(command, check=True, env=environment)
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("slicefine/_C") and name.endswith((".so", ".pyd")):
                archive.extract(name, tree)


def figures_of(tree: Path, arguments: list[str]) -> Figures:
    """One run of the suite in a tree. A case that the tree cannot run is left out, and said."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        status, printed = run_suite(tree, arguments, output)
        entries = entries_in(output)
    if not entries:
        raise SystemExit(f"nothing could be measured in {tree}:\n{printed[-4000:]}")
    if status != 0:
        print(f"{tree}: some cases failed:\n{printed[-2000:]}", flush=True)
    strays = {Path(entry["package"]).resolve() for entry in entries} - {
        (tree / "slicefine").resolve()
    }
    assert not strays, f"the run in {tree} imported slicefine from {strays}"
    rows = [entry["row"] for entry in entries]
    clock = (
        "cpu_ratio_to_base"
        if rows[0].get("cpu_ratio_to_base") is not None
        else "ratio_to_base"
    )
    return {
        f"{row['case']}/{row['method']}": row[clock]
        for row in rows
        if row["method"] != row["base"]
    }


def judge(base: list[Figures], here: list[Figures]) -> list[dict[str, Any]]:
    """base: n + 1 runs, here: n, in the order base, here, base, ...; a row per method that all runs
    have.
    """
    rows = []
    for name in base[0]:
        if not all(name in run for run in base + here):
            continue
        neighbors = [(a[name], b[name]) for a, b in itertools.pairwise(base)]
        same = quantiles([ratio for a, b in neighbors for ratio in (a / b, b / a)])
        found = quantiles(
            [2 * run[name] / (a + b) for run, (a, b) in zip(here, neighbors, strict=True)]
        )
        rows.append(
            {
                "name": name,
                "p20": found[0],
                "ratio": found[1],
                "p80": found[2],
                "same_p20": same[0],
                "same_p80": same[2],
                "verdict": verdict(found, same),
            }
        )
    return rows


def verdict(found: list[float], same: list[float]) -> str:
    """A difference lies outside what base against base shows, at the median and at the quantile
    nearer to 1.
    """
    if found[1] < same[0] and found[2] < 1.0:
        return "faster"
    if found[1] > same[2] and found[0] > 1.0:
        return "slower"
    return "no difference"


def main(
    revision: str,
    pairs: int,
    arguments: list[str],
    run: Callable[[Path, list[str]], Figures] = figures_of,
) -> int:
    """Print a row per method: here / base with its spread, what base / base shows, the verdict."""
    if pairs < 1:
        raise SystemExit(f"--pairs is {pairs}; expected at least 1")
    with checkout(revision) as tree:
        base, here = [run(tree, arguments)], []
        for i in range(pairs):
            here.append(run(ROOT, arguments))
            base.append(run(tree, arguments))
            print(f"pair {i + 1} of {pairs} done", flush=True)
    rows = judge(base, here)
    width = max((len(row["name"]) for row in rows), default=4)
    print(f"{'':<{width}}  this checkout / {revision}     {revision} / itself    verdict")
    for row in rows:
        print(
            f"{row['name']:<{width}}  {row['ratio']:.3f} ({row['p20']:.3f}-{row['p80']:.3f})     "
            f" {row['same_p20']:.3f}-{row['same_p80']:.3f}       {row['verdict']}"
        )
    for what in ("faster", "slower", "no difference"):
        print(f"{what}: {sum(row['verdict'] == what for row in rows)}")
    return 0
