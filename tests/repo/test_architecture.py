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

ROOT = Path(__file__).parents[2]
# A module imports only from layers below its own, or within its own layer's folder. Folders are one entry.
LAYERS = [
    {"slices", "atomic", "registry", "sharding"},
    {"config", "heads", "past", "checkpointing", "beside"},
    {"agreement", "originals", "backends", "state", "matching"},
    {"ops"},
    {"scores", "function"},
    {"layer"},
    {"guard", "fused", "kept"},
    {"moves"},
    {"linear"},
    {"modules"},
    {"obstacles"},
    {"optim", "groups", "targets", "plan.tracker", "deltas"},
    {"swapping", "dry_run"},
    {"notes"},
    {"model"},
    {"lean"},
    {"plan"},
    {"integrations"},
    {"training"},
    {"diagnose"},
    {"capacity"},
    {"continual"},
    {"compare"},
    {"cli"},
    {"__main__", "__init__"},
]
CORE = {name for layer in LAYERS[: LAYERS.index({"model"}) + 1] for name in layer}


def imports_of(path: Path) -> set[str]:
    """Top-level names and slicefine modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def name_of(path: Path) -> str:
    """A module's entry in LAYERS: its own dotted name, or that of the folder it is in."""
    return entry(".".join(path.relative_to(ROOT / "slicefine").with_suffix("").parts))


def entry(dotted: str) -> str:
    return dotted if any(dotted in layer for layer in LAYERS) else dotted.split(".")[0]


def layer_of(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def test_every_module_has_a_layer():
    for path in (ROOT / "slicefine").rglob("*.py"):
        assert any(name_of(path) in layer for layer in LAYERS), path


def test_imports_point_down():
    for path in (ROOT / "slicefine").rglob("*.py"):
        here = name_of(path)
        for name in imports_of(path):
            there = entry(name.removeprefix("slicefine."))
            if not name.startswith("slicefine.") or here == "__init__":
                continue
            if not any(there in layer for layer in LAYERS):
                continue  # a public name of the package
            allowed = (
                layer_of(there) < layer_of(here)
                or there.split(".")[0] == here.split(".")[0]
            )
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_core_needs_torch_and_nothing_else():
    files = [p for p in (ROOT / "slicefine").rglob("*.py") if name_of(p) in CORE]
    # imported only by whoever signs, pushes or pulls a delta, or asks for a model of PEFT
    optional = {
        "deltas/signing.py": {"cryptography"},
        "deltas/hub.py": {"huggingface_hub"},
        "deltas/unpacking.py": {"peft"},
    }
    for path in files:
        outside = {i.split(".")[0] for i in imports_of(path)} - set(sys.stdlib_module_names)
        extra = optional.get(path.relative_to(ROOT / "slicefine").as_posix(), set())
        assert outside <= {"torch", "safetensors", "slicefine"} | extra, (
            f"{path} imports {outside}"
        )


def test_diagnose_needs_nothing_but_matplotlib_and_numpy_and_those_when_drawing():
    for path in (ROOT / "slicefine" / "diagnose").glob("*.py"):
        outside = {i.split(".")[0] for i in imports_of(path)} - set(sys.stdlib_module_names)
        assert outside <= {
            "torch",
            "slicefine",
            "matplotlib",
            "numpy",
        }, f"{path.name} imports {outside}"
    code = (
        "import sys, slicefine.diagnose.survey, slicefine.diagnose.report; print('matplotlib' in"
        " sys.modules)"
    )
    assert run_without("matplotlib", code).stdout.strip() == "False"


def test_kernels_know_nothing_of_slicefine():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(i.split(".")[0] == "slicefine" for i in imports_of(path)), path
    assert not (
        ROOT / "kernels" / "__init__.py"
    ).exists()  # it would shadow Hugging Face's `kernels`


def test_csrc_knows_nothing_of_torch():
    for path in (ROOT / "csrc").iterdir():
        assert not any(
            "torch/" in line or "ATen" in line
            for line in path.read_text().splitlines()
            if line.startswith("#include")
        ), path


def test_one_op_one_name_in_every_place():
    from slicefine.backends import cpu, cuda, reference

    for op in ("slice_grad", "slice_adamw", "slice_adamw_8bit", "slice_grad_adamw"):
        assert (ROOT / "csrc" / f"{op}.cpp").exists() and (
            ROOT / "csrc" / f"{op}.cu"
        ).exists()
        assert (ROOT / "kernels" / "slicefine_kernels" / f"{op}.py").exists()
        assert all(callable(getattr(module, op)) for module in (reference, cpu, cuda))
        assert f"`{op}`" in (ROOT / "kernels" / "README.md").read_text()
    # on a GPU without a compiler the reference writes
    assert (ROOT / "csrc" / "write_slices.cpp").exists()
    assert (ROOT / "kernels" / "slicefine_kernels" / "write_slices.py").exists()
    assert all(callable(module.write_slices) for module in (reference, cpu))
    assert "`write_slices`" in (ROOT / "kernels" / "README.md").read_text()


def test_the_public_names():
    assert set(slicefine.__all__) == {
        "__version__",
        "available_backends",
        "Delta",
        "DeltaError",
        "SliceAdamW",
        "SliceConfig",
        "SliceLayer",
        "SliceLinear",
        "SliceModel",
        "get_slice_model",
        "lean",
        "list_targets",
        "load_slice_state_dict",
        "parameter_groups",
        "slice_state_dict",
        "track_memory",
        "use_backend",
    }
    assert set(slicefine.__all__) == {"__version__", "lean", *slicefine._HOME}
    assert all(getattr(slicefine, name) is not None for name in slicefine.__all__)
    with pytest.raises(
        AttributeError, match="no attribute 'SliceAdam'; public names: SliceConfig"
    ):
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


@pytest.mark.parametrize(
    "missing",
    ["triton", "slicefine._C", "slicefine._CUDA", "numpy", "transformers", "typer"],
)
def test_it_trains_without(missing):
    result = run_without(missing, TRAIN)
    assert result.stdout.strip() == "trained", result.stderr


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_a_bare_slice_linear_trains_and_moves_under_torchs_optimizers(how):
    """In a fresh process that asks for SliceLinear alone: the hook comes with it."""
    code = f"""
        import torch
        from slicefine import SliceConfig, SliceLinear
        layer = SliceLinear(8, 8, config=SliceConfig(r=2, switch_interval=2, contiguous=True))
        before = layer.weight.clone()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, {how}=True)
        for _ in range(5):
            layer(torch.randn(3, 8)).square().sum().backward()
            optimizer.step()
        print((layer.weight != before).any(0).tolist(), layer.schedule.moves)
        """
    result = run_without("nothing", code)
    assert result.stdout.strip() == f"{[True] * 6 + [False] * 2} 2", (
        result.stdout + result.stderr
    )


def test_a_missing_compiled_module_says_why():
    result = run_without(
        "slicefine._C",
        TRAIN.replace(
            "import torch, slicefine",
            "import torch, slicefine, os; os.environ['SLICEFINE_BACKEND'] = 'cpu'",
        ),
    )
    assert "install a C++17 compiler and reinstall slicefine" in result.stderr


ENV = (
    "import sys, runpy; sys.argv = ['slicefine', 'env']; runpy.run_module('slicefine',"
    " run_name='__main__')"
)


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


def test_the_support_matrix_lists_the_backends_as_they_are():
    """docs/support.md: names, devices and dtypes of `backends.select.BACKENDS`; nothing claims a
    GPU that has not run.
    """
    from slicefine.backends.select import BACKENDS

    rows = {}
    for line in (ROOT / "docs" / "support.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (
            len(cells) == 5
            and cells[0].startswith("`")
            and cells[4].startswith(("tested", "not"))
        ):
            rows[cells[0].strip("`")] = cells
    assert rows.keys() == BACKENDS.keys()
    for name, backend in BACKENDS.items():
        device = backend.devices()[0] if backend.devices() else "any"
        assert rows[name][2] == device
        assert rows[name][3] == ", ".join(
            str(d).removeprefix("torch.") for d in backend.dtypes
        )
    reports = [
        json.loads(path.read_text())
        for path in (ROOT / "benchmarks" / "results").glob("*.json")
    ]
    on_gpu = [
        r
        for r in reports
        if isinstance(r, dict) and r.get("where", {}).get("device_type") == "cuda"
    ]
    assert ("not run on a GPU yet" in rows["triton"][4]) == (not on_gpu)
    # what a GPU has seen of the precompiled kernels is in rows of their own
    ran = any('"backend": "cuda"' in json.dumps(report) for report in on_gpu)
    assert ("not run on a GPU yet" in rows["cuda"][4]) == (not ran)
