"""Hostile deltas by the thousand: a program, so that its memory can be measured.

``python -m tests.deltas.hostile FOLDER CASES`` prints as JSON how many were refused, how many did no
harm, and by how much the process grew; ``... FOLDER files`` what loading each of a few files does.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicefine import Delta, DeltaError, SliceAdamW, SliceConfig, get_slice_model
from slicefine.deltas.container import _header
from slicefine.deltas.format import _BLANK, read_file

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**13,
    1 << 70,
    1.5,
    float("nan"),
    "",
    "x",
    "AutoModel",
    "é\U0001f600",
    [],
    {},
    [[]],
    [0],
    [[0, 10**12]],
    [[3, 1], [0, 2]],
    {"a": 1},
    [[0, 1]] * 500,
]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def good_delta() -> tuple[Delta, dict[str, torch.Tensor]]:
    """(a delta with columns, rows, a bias, statistics and a head, the model that it makes)."""
    model: Any = base()
    options = {"slice_type": "row_column", "switch_interval": 1, "bias": "all"}
    get_slice_model(model, SliceConfig(r=2, modules_to_save=["2"], **options))
    optimizer = SliceAdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    delta = model.delta(info={"evaluation": {"metric": "loss", "value": 0.5, "rows": 3}})
    return delta, {key: value.clone() for key, value in model.state_dict().items()}


def sealed(manifest: Any, header: dict[str, Any], values: bytes) -> bytes:
    """A file whose hash is right, whatever it says."""
    import hashlib

    text = json.dumps({**manifest, "file_sha256": _BLANK}, sort_keys=True)
    content = {"__metadata__": {"slicefine": text}, **header}
    head = json.dumps(content, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    start = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(start + values).hexdigest()
    mark = b'\\"file_sha256\\": \\"'
    return start.replace(mark + _BLANK.encode(), mark + digest.encode()) + values


def damaged(rng: random.Random, good: bytes) -> bytes:
    """Bytes flipped, replaced, cut off, put in, moved, or another header length."""
    data = bytearray(good)
    where, kind = rng.randrange(len(data)), rng.randrange(7)
    if kind == 0:
        data[where] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[where] = rng.randrange(256)
    elif kind == 2:
        del data[where:]
    elif kind == 3:
        data[where:where] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 4:
        other = rng.randrange(len(data))
        data[where], data[other] = data[other], data[where]
    elif kind == 5:
        data[:8] = rng.choice(
            [0, 1, len(data), 1 << 31, 1 << 63, rng.randrange(5000)]
        ).to_bytes(8, "little")
    else:
        data += rng.randbytes(rng.randrange(1, 64))
    return bytes(data)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested dicts and lists."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        found.append((content, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def mutate(rng: random.Random, content: Any) -> None:
    """Change one place of nested JSON: another value, another type, gone, or under another key."""
    inside, key = rng.choice(places(content))
    kind = rng.randrange(4)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(["weights", "0.weight", "a/0", "__class__", ""])] = inside.pop(
            key
        )
    elif kind == 2 and isinstance(inside[key], int):
        inside[key] += rng.choice([-1, 1, 7, 10**9])
    else:
        inside[key] = json.loads(json.dumps(rng.choice(VALUES)))


def cases(folder: Path, count: int) -> dict[str, Any]:
    """Load every case, and apply what loads: a DeltaError, or the very model of the good delta."""
    rng = random.Random(0)
    delta, after = good_delta()
    path = folder / "case.safetensors"
    delta.save(path)
    good = path.read_bytes()
    manifest, tensors = read_file(path)
    length = int.from_bytes(good[:8], "little")
    names = list(json.loads(good[8 : 8 + length]))[1:]
    header = json.loads(_header(names, tensors, {}))
    del header["__metadata__"]
    values = good[8 + length :]
    assert sealed(manifest, header, values) == good
    model = base()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    makers: list[Callable[[], bytes]] = [
        lambda: damaged(rng, good),
        lambda: sealed(changed(manifest), header, values),
        lambda: sealed(manifest, changed(header), values),
    ]

    def changed(content: Any) -> Any:
        content = copy.deepcopy(content)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            if content:
                mutate(rng, content)
        return content

    said: Counter[str] = Counter()
    start = peak()
    for number in range(count):
        kind = number % len(makers)
        content = makers[kind]()
        path.write_bytes(content)
        try:
            loaded = Delta.load(path)
            assert kind or content == good, f"case {number} was changed, and loads"
            loaded.apply_to(model)
        except DeltaError:
            said["refused"] += 1
            same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            assert same, f"case {number} was refused, and changed the model"
            continue
        said["harmless"] += 1
        state = model.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in state.items()), (
            f"case {number} applied"
        )
        model.load_state_dict(before)
    return {**said, "grew": peak() - start}


def bombs() -> dict[str, bytes]:
    """Small files that say that they are large, and files of nothing but header."""
    one = torch.zeros(1, 1)
    values = bytes(8)
    header = json.loads(
        _header(["w/0/new", "w/0/old"], {"w/0/new": one, "w/0/old": one}, {})
    )
    del header["__metadata__"]
    record = {"base": {}, "config": {}, "info": {}, "whole": {}, "tensors": {}}
    record |= {"format": "slicefine-delta", "version": 1}

    def delta(shape: list[int], rows: Any, cols: Any, **more: Any) -> bytes:
        weight = {"shape": shape, "transposed": False, "base_sha256": ""}
        weight["patches"] = [{"rows": rows, "cols": cols}]
        return sealed({**record, "weights": {"w": weight}, **more}, header, values)

    n = 300_000_000
    huge = {name: {**entry, "shape": [1 << 40, 1]} for name, entry in header.items()}
    return {
        "columns": delta([1, n], None, [[0, n]]),
        "rows": delta([n, 1], [[0, n]], None),
        "both": delta([n, n], [[0, n]], [[0, n]]),
        "many runs": delta([1, n], None, [[i, 1] for i in range(0, 4_000_000, 2)]),
        "shape": sealed({**record, "weights": {}}, huge, values),
        "lists": delta([1, 1], None, [[0, 1]], info={"a": [[]] * 5_000_000}),
        "deep": (100_017).to_bytes(8, "little") + b'{"__metadata__": ' + b"[" * 100_000,
        "wide characters": delta(
            [1, 1], None, [[0, 1]], info={"a": "\U0001f600" + "a" * 20_000_000}
        ),
        "header": (1 << 60).to_bytes(8, "little") + b"{}" * 50,
    }


def large(folder: Path) -> None:
    """Writes a whole delta of 64 MiB."""
    from slicefine.deltas.delta import SliceValues, WeightDelta

    old = torch.zeros(4096, 2048)
    values = SliceValues(None, torch.arange(2048), old, old + 1)
    path = folder / "large.safetensors"
    Delta({"w": WeightDelta((4096, 4096), False, "", [values])}).save(path)


def measured(path: Path) -> dict[str, Any]:
    size, start = path.stat().st_size, peak()
    try:
        Delta.load(path)
        said = "loaded"
    except DeltaError as error:
        said = str(error)[-120:]
    return {"size": size, "grew": peak() - start, "said": said}


def each(folder: Path) -> dict[str, Any]:
    """What loading each file does to the memory of a process of its own."""
    warm = folder / "rows.safetensors"

    def after_another(path: Path) -> dict[str, Any]:
        # a forked process has none of the libraries' pages yet, which are no memory of a file's
        measured(warm)
        return measured(path)

    return {path.stem: alone(after_another, path) for path in folder.glob("*.safetensors")}


def alone(function: Callable[[Path], Any], path: Path) -> Any:
    """The result of a function in a forked process, whose peak starts at what it holds already."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as file:
            json.dump(function(path), file)
        # no cleanup of what belongs to the parent
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        told = file.read()
    assert os.waitpid(child, 0)[1] == 0, path
    return json.loads(told)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    where, what = Path(sys.argv[1]), sys.argv[2]
    if what.isdigit():
        print(json.dumps(cases(where, int(what))))
    else:
        for name, content in bombs().items():
            (where / f"{name}.safetensors").write_bytes(content)
        alone(large, where)
        print(json.dumps(each(where)))
