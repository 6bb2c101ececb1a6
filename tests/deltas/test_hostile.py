"""Deltas are data: whatever a file says, it is refused or harmless, and takes no more memory than it
is large.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from slicefine import Delta, DeltaError, SliceAdamW, SliceConfig, get_slice_model
from slicefine.deltas import container
from slicefine.deltas.delta import FullDelta, SliceValues, WeightDelta
from tests.deltas import hostile

ROOT = Path(__file__).parents[2]
OLD = Path(__file__).parent / "data" / "written_by_3805d7a.safetensors"


def run(folder: Path, what: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.deltas.hostile", str(folder), what],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_ten_thousand_hostile_deltas_do_no_harm(tmp_path):
    """Damaged bytes never load; manifests and headers that were changed and sealed again are refused
    or make the very model of the good delta.
    """
    told = run(tmp_path, "10000")
    assert told["refused"] + told["harmless"] == 10_000 and told["refused"] > 8000
    # the files are of 5 KB
    assert told["grew"] < 8 << 20


@pytest.mark.slow
def test_no_file_takes_more_memory_than_twice_its_size(tmp_path):
    files = run(tmp_path, "files")
    assert len(files) == 10 and files["large"]["said"] == "loaded"
    # the file itself is read into memory: less would mean that nothing was measured
    assert files["large"]["size"] < files["large"]["grew"] < 2 * files["large"]["size"]
    for name, told in files.items():
        # what Python's own allocator rounds up to, for small files
        assert told["grew"] < 2 * told["size"] + (4 << 20), (name, told)
        assert (told["said"] == "loaded") == (name == "large"), (name, told)


def old_base() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.copy_(
                torch.arange(p.numel()).reshape(p.shape).remainder(11).sub(5 + n).div(16)
            )
    return model


def test_a_delta_of_an_earlier_version_loads(tmp_path):
    """Written by commit 3805d7a: columns and rows of one weight, statistics, a head."""
    delta = Delta.load(OLD)
    assert (
        delta.sha256 == "0cbe81dcffbc100539dffb308fc78ebe8fb7629d11f5efce2013cb37441daec3"
    )
    assert [p.rows is None for p in delta.weights["0.weight"].patches] == [True, False]
    assert delta.info["evaluation"] == {"metric": "loss", "value": 0.5}
    model = old_base()
    before = copy.deepcopy(model.state_dict())
    delta.apply_to(model)
    with safe_open(OLD, "pt") as file:
        assert torch.equal(model[3].bias, file.get_tensor("3.bias/new"))
        columns = file.get_tensor("0.weight/0/new")
    assert (
        torch.equal(model[0].weight[:, :4], columns)
        and int(model[1].num_batches_tracked) == 3
    )
    delta.revert_from(model)
    state = model.state_dict()
    # a head was not there before
    assert all(
        torch.equal(state[k], v) for k, v in before.items() if not k.startswith("3.")
    )
    # written again it is the same file, byte for byte
    assert delta.save(tmp_path / "again.safetensors") == delta.sha256
    assert (tmp_path / "again.safetensors").read_bytes() == OLD.read_bytes()


def test_files_are_those_of_the_safetensors_library(tmp_path):
    """Byte for byte, for every dtype, and names that are no ASCII."""
    tensors = {}
    for name, dtype in container._DTYPES.items():
        if dtype != torch.complex64:  # the library's writer for torch has none
            for n in range(3):
                tensors[f"{name}/é\n{n}"] = torch.ones(n, 2, 3).to(dtype)
    save_file(tensors, tmp_path / "a.safetensors", {"k": 'v"\\\u20ac\U0001f600\x01'})
    container.write(tmp_path / "b.safetensors", tensors, {"k": 'v"\\\u20ac\U0001f600\x01'})
    assert (tmp_path / "a.safetensors").read_bytes() == (
        tmp_path / "b.safetensors"
    ).read_bytes()
    read = container.read(tmp_path / "a.safetensors").tensors
    assert read.keys() == tensors.keys()
    assert all(
        read[k].dtype == t.dtype and torch.equal(read[k], t) for k, t in tensors.items()
    )


def test_what_was_loaded_does_not_change_with_the_file(tmp_path):
    """`cp` over a file, or a truncation, must not reach values that were verified."""
    delta, _ = hostile.good_delta()
    path = tmp_path / "d.safetensors"
    delta.save(path)
    loaded = Delta.load(path)
    before = loaded.weights["0.weight"].patches[0].new.clone()
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))
    os.truncate(path, len(content) // 2)
    assert torch.equal(loaded.weights["0.weight"].patches[0].new, before)
    assert loaded.save(tmp_path / "again.safetensors") == delta.sha256


def test_without_hashes_of_the_base_biases_and_buffers_are_compared_too():
    base = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    model = copy.deepcopy(base)
    get_slice_model(model, SliceConfig(r=4, bias="all"))
    model(torch.randn(4, 32)).square().sum().backward()
    SliceAdamW(model.parameters(), lr=0.1).step()
    delta = model.delta()  # pyright: ignore[reportCallIssue]
    for tensor in (lambda m: m[0].bias, lambda m: m[1].running_mean):
        other = copy.deepcopy(base)
        with torch.no_grad():
            tensor(other).add_(7.0)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(
            DeltaError, match="made for another base model: 1 tensors differ"
        ):
            delta.apply_to(other, verify=False)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_a_cast_model_writes_a_delta_that_loads(tmp_path, cast):
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    base = copy.deepcopy(model)
    get_slice_model(model, SliceConfig(r=4, bias="all", modules_to_save=["2"]))
    model(torch.randn(4, 32)).sum().backward()
    SliceAdamW(model.parameters(), lr=0.1).step()
    model.to(cast)
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    plain = base.to(cast)
    Delta.load(tmp_path).apply_to(plain)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())


def one(**changes) -> Delta:
    values = SliceValues(None, torch.arange(2), torch.zeros(3, 2), torch.ones(3, 2))
    weights = {"a": WeightDelta((3, 4), False, "", [values])}
    return Delta(**{"weights": weights, "base": {"sha256": "x"}, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"info": {"loss": float("nan")}},
            r"info\['loss'\] is nan, which JSON cannot hold",
        ),
        ({"info": {"a": [float("inf")]}}, r"info\['a'\]\[0\] is inf"),
        ({"base": {"on": 3}}, "base.on is no list"),
        ({"base": {"on": [{"name": "up", "sha256": None}]}}, "'up', which was never saved"),
        ({"base": {"class": 3}}, "base.class is no string"),
        (
            {"whole": {"a/0": FullDelta(torch.zeros(1), torch.ones(1), True)}},
            "the same values",
        ),
        (
            {"whole": {"a": FullDelta(torch.zeros(1), torch.ones(1), True)}},
            "the same values",
        ),
    ],
)
def test_a_writer_refuses_what_its_reader_would(tmp_path, changes, problem):
    with pytest.raises(ValueError, match=problem):
        one(**changes).save(tmp_path)
    assert not any(tmp_path.iterdir())


def test_nan_that_an_earlier_version_wrote_is_read_as_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("slicefine.deltas.format._check_json", lambda *_: None)
    one(info={"loss": float("nan")}).save(tmp_path)
    assert Delta.load(tmp_path).info == {"loss": "NaN"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_an_error_of_the_system():
    """No SafetensorError, which no caller expects."""
    with pytest.raises(OSError), open("/dev/full", "wb") as file:
        container._write_values(torch.zeros(1 << 20), file, hashlib.sha256())
