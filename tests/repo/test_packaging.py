"""What is shipped: the names in sdist and wheel, and the wheel at work in empty environments under
other torch releases.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("uv")

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OLDEST = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1] + ".0"
NEWEST = version("torch").split("+")[0]


def uv(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "uv", *arguments],
        check=True,
        capture_output=True,
        text=True,
        **options,
    )


def tracked(*folders: str) -> set[str]:
    """What a checkout holds: tracked and new files, no build products."""
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *folders,
    ]
    listed = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist in isolation."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to it is not known")
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked("."):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "build",
        "--installer",
        "uv",
        "--outdir",
        str(dist),
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    (wheel,) = dist.glob("*.whl")
    print(
        f"\n{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, sdist and wheel in"
        f" {time.perf_counter() - start:.0f} s"
    )
    return dist


def has_toolkit() -> bool:
    """Whether csrc/CMakeLists.txt builds the CUDA module here."""
    wanted = os.environ.get("SLICEFINE_CUDA", "auto")
    found = (
        shutil.which("nvcc")
        or os.environ.get("CUDA_HOME")
        or list(Path("/usr/local").glob("cuda*/bin/nvcc"))
    )
    return wanted != "0" and bool(found)


@pytest.mark.slow
def test_the_sdist_holds_the_sources_and_nothing_else(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {
            name.partition("/")[2]
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }
    made = {
        n
        for n in names
        if n == "PKG-INFO" or n == "setup.cfg" or n.startswith("slicefine.egg-info/")
    }
    own = {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "MANIFEST.in",
        "setup.py",
        "pyproject.toml",
    }
    assert names - made == tracked("csrc", "kernels", "slicefine") | own


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_compiled_modules(built):
    (path,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    python = {
        n.removeprefix("kernels/")
        for n in tracked("slicefine", "kernels/slicefine_kernels")
    }
    compiled = {n for n in names if n.endswith((".so", ".pyd"))}
    assert {re.match(r"slicefine/(\w+)\.", n)[1] for n in compiled} == {
        "_C",
        *(["_CUDA"] if has_toolkit() else []),
    }
    info = {n for n in names if ".dist-info/" in n}
    assert names - compiled - info == python
    assert any(n.endswith("licenses/LICENSE") for n in info)


@pytest.mark.slow
@pytest.mark.parametrize("torch", [OLDEST, NEWEST])
def test_the_wheel_trains_in_an_empty_environment(built, torch, tmp_path):
    (wheel,) = built.glob("*.whl")
    uv("venv", "--python", sys.executable, str(tmp_path / "venv"))
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    uv("pip", "install", "--python", str(python), f"torch=={torch}", str(wheel))
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "SLICEFINE_", "TRITON_"))
    }
    result = subprocess.run(
        [str(python), "-W", "ignore", str(ROOT / "tests" / "wheel_smoke.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"torch {torch}" in result.stdout and str(tmp_path) in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("config", ["pyproject.toml", "cibuildwheel-cuda.toml"])
def test_cibuildwheel_takes_the_configuration(config):
    """Its own parser: which wheels it would build. Building them needs its containers, which are
    not here.
    """
    result = uv(
        "tool",
        "run",
        "cibuildwheel==3.2.1",
        "--platform",
        "linux",
        "--archs",
        "x86_64",
        "--print-build-identifiers",
        "--config-file",
        str(ROOT / config),
        str(ROOT),
    )
    assert result.stdout.split() == [
        f"cp3{minor}-manylinux_x86_64" for minor in range(10, 15)
    ]
