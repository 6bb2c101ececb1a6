"""Shared fixtures. One thread: with the second core busy two threads collapse on small machines."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # chosen when Triton is imported: kernels run on CPU tensors

import pytest
import torch

from slicefine import use_backend
from slicefine.backends.select import BACKENDS

torch.set_num_threads(1)


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
