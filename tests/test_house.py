"""The house: which floor may import which, what is public, what an import needs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import slicefine

ROOT = Path(__file__).parent.parent
# A module imports only from floors below its own, or within its folder for a command.
FLOORS = [
    {"slices", "reference", "sharding"},
    {"_native", "_native_cuda", "config", "files", "ledger"},
    {"ops"},
    {"scores", "moves", "function"},
    {"linear"},
    {"parameters"},
    {"attention", "experts"},
    {"optim", "targets", "memory", "deltas"},
    {"model"},
    {"plan"},
    {"integrations"},
    {"diagnose"},
    {"studies"},
    {"cli", "__main__", "__init__"},
]
FOLDERS = {"deltas"}  # rooms of the core that are folders
CORE = {name for floor in FLOORS[:-4] for name in floor} - FOLDERS


def imports_of(path: Path) -> set[str]:
    """Top-level names and slicefine modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def floor_of(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


def test_every_core_module_has_a_floor():
    assert {p.stem for p in (ROOT / "slicefine").glob("*.py")} == CORE | {"__init__", "__main__"}


def test_no_arrow_points_up():
    for path in (ROOT / "slicefine").rglob("*.py"):
        parts = path.relative_to(ROOT / "slicefine").parts
        here = parts[0].removesuffix(".py")
        for name in imports_of(path):
            if not name.startswith("slicefine.") or here in ("__init__",):
                continue
            if (here, name.split(".")[1]) in (("moves", "linear"), ("sharding", "linear")):
                continue  # for type checkers only
            there = name.split(".")[1]
            if not any(there in floor for floor in FLOORS):
                continue  # a public name of the package
            allowed = (
                floor_of(there) < floor_of(here) or there == here or (here in ("cli", "__main__") and there == "cli")
            )
            # swapping a Conv1D back needs transformers' own class, asked for by the model that holds one
            allowed |= (here, there) == ("model", "integrations")
            # the hub, asked for by the call that pushes or pulls
            allowed |= (here, there) == ("deltas", "integrations")
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_core_needs_torch_and_nothing_else():
    files = [ROOT / "slicefine" / f"{name}.py" for name in CORE]
    files += [path for folder in FOLDERS for path in (ROOT / "slicefine" / folder).glob("*.py")]
    for path in files:
        outside = {i.split(".")[0] for i in imports_of(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "safetensors", "slicefine"}, f"{path.relative_to(ROOT)} imports {outside}"


def test_diagnose_needs_nothing_but_matplotlib_and_numpy_and_those_when_drawing():
    for path in (ROOT / "slicefine" / "diagnose").glob("*.py"):
        outside = {i.split(".")[0] for i in imports_of(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "slicefine", "matplotlib", "numpy"}, f"{path.name} imports {outside}"
    code = "import sys, slicefine.diagnose.survey, slicefine.diagnose.report; print('matplotlib' in sys.modules)"
    assert run_without("matplotlib", code).stdout.strip() == "False"


def test_kernels_know_nothing_of_slicefine():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(i.split(".")[0] == "slicefine" for i in imports_of(path)), path
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's `kernels`


def test_csrc_knows_nothing_of_torch():
    for path in (ROOT / "csrc").iterdir():
        assert not any(
            "torch/" in line or "ATen" in line for line in path.read_text().splitlines() if line.startswith("#include")
        ), path


def test_one_op_one_name_in_every_place():
    from slicefine import _native, _native_cuda, reference

    for op in ("slice_grad", "slice_adamw", "slice_adamw_8bit", "slice_grad_adamw"):
        assert (ROOT / "csrc" / f"{op}.cpp").exists() and (ROOT / "csrc" / f"{op}.cu").exists()
        assert (ROOT / "kernels" / "slicefine_kernels" / f"{op}.py").exists()
        assert all(callable(getattr(module, op)) for module in (reference, _native, _native_cuda))
        assert f"`{op}`" in (ROOT / "kernels" / "README.md").read_text()


def test_the_public_names():
    assert set(slicefine.__all__) == {
        "__version__", "Delta", "DeltaError", "SliceAdamW", "SliceConfig", "SliceLinear", "SliceModel", "capacity", "continual",
        "get_slice_model", "list_targets", "load_slice_state_dict", "slice_state_dict", "track_memory", "use_backend",
    }  # fmt: skip
    assert set(slicefine.__all__) == {"__version__", *slicefine._HOME, *slicefine._MODULES}
    assert all(getattr(slicefine, name) is not None for name in slicefine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'SliceAdam'; public names: SliceConfig"):
        slicefine.SliceAdam  # noqa: B018


def run_without(blocked: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which a module is not installed."""
    script = f"""
        import sys
        class Without:  # finds what another finder finds, but for the blocked module
            def __init__(self, finder):
                self.finder = finder
            def find_spec(self, name, path=None, target=None):
                if name == {blocked!r} or name.startswith({blocked + "."!r}):
                    return None
                return self.finder.find_spec(name, path, target)
        sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
        """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


TRAIN = """
    import torch, slicefine
    model = slicefine.get_slice_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), slicefine.SliceConfig(r=2))
    optimizer = slicefine.SliceAdamW(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    print("trained")
    """


@pytest.mark.parametrize("missing", ["triton", "slicefine._C", "slicefine._CUDA", "numpy", "transformers", "typer"])
def test_it_trains_without(missing):
    result = run_without(missing, TRAIN)
    assert result.stdout.strip() == "trained", result.stderr


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_a_bare_slice_linear_trains_and_moves_under_torchs_optimizers(how):
    """In a fresh process that asks for SliceLinear alone: the hook comes with it."""
    code = f"""
        import torch
        from slicefine import SliceConfig, SliceLinear
        layer = SliceLinear(8, 8, config=SliceConfig(r=2, switch_interval=2))
        before = layer.weight.clone()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, {how}=True)
        for _ in range(5):
            layer(torch.randn(3, 8)).square().sum().backward()
            optimizer.step()
        print((layer.weight != before).any(0).tolist(), layer.schedule.moves)
        """
    result = run_without("nothing", code)
    assert result.stdout.strip() == f"{[True] * 6 + [False] * 2} 2", result.stdout + result.stderr


def test_a_missing_compiled_module_says_why():
    result = run_without(
        "slicefine._C",
        TRAIN.replace(
            "import torch, slicefine", "import torch, slicefine, os; os.environ['SLICEFINE_BACKEND'] = 'cpu'"
        ),
    )
    assert "install a C++17 compiler and reinstall slicefine" in result.stderr


ENV = "import sys, runpy; sys.argv = ['slicefine', 'env']; runpy.run_module('slicefine', run_name='__main__')"


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("torch", "torch imports:      broken: ModuleNotFoundError"),
        ("slicefine._C", "missing: the compiled module slicefine._C does"),
        ("slicefine._CUDA", "missing: the compiled module slicefine._CUDA does"),
        ("triton", "missing: triton does not import"),
        ("typer", "in use:"),
    ],
)
def test_env_reports_in_a_broken_install(missing, said):
    result = run_without(missing, ENV)
    assert result.returncode == 0 and said in result.stdout, result.stdout + result.stderr


def test_the_largest_files_and_functions(capsys):
    """The size budget is shown, and a file or function that outgrows it fails."""
    files, functions = [], []
    for path in [
        *(file for folder in ("slicefine", "kernels", "benchmarks") for file in (ROOT / folder).rglob("*.py")),
        *(ROOT / "csrc").iterdir(),
    ]:
        text = path.read_text(encoding="utf-8")
        files.append((len(text.splitlines()), str(path.relative_to(ROOT))))
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    functions.append(
                        ((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}")
                    )
    with capsys.disabled():
        for title, rows in (("files", files), ("functions", functions)):
            print(
                f"\nlargest {title}: " + ", ".join(f"{name} {size}" for size, name in sorted(rows, reverse=True)[:10]),
                end="",
            )
    assert max(files)[0] <= 500 and max(functions)[0] <= 100


def test_the_readme_lists_the_backends_as_they_are():
    """The support matrix: names, devices and dtypes of `slicefine.ops.BACKENDS`; nothing claims a GPU that has not run."""
    from slicefine import ops

    rows = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`") and cells[4].startswith(("tested", "not")):
            rows[cells[0].strip("`")] = cells
    assert rows.keys() == ops.BACKENDS.keys()
    for name, backend in ops.BACKENDS.items():
        device = backend.devices()[0] if backend.devices() else "any"
        assert rows[name][2] == device
        assert rows[name][3] == ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes)
    reports = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    on_gpu = [r for r in reports if isinstance(r, dict) and r.get("where", {}).get("device_type") == "cuda"]
    assert ("not run on a GPU yet" in rows["triton"][4]) == (not on_gpu)
    # what a GPU has seen of the precompiled kernels is in rows of their own
    ran = any('"backend": "cuda"' in json.dumps(report) for report in on_gpu)
    assert ("not run on a GPU yet" in rows["cuda"][4]) == (not ran)
