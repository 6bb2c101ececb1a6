"""The delta store: the log, its lock, kills and tampering; signatures; every verb of `slicefine
delta` on a small model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slicefine import DeltaError
from slicefine.deltas.delta import Delta, SliceValues, WeightDelta
from slicefine.deltas.difference import difference
from slicefine.deltas.store import Store, StoreError

ROOT = Path(__file__).parents[2]


def small(value: float, columns=(1, 2), base="b" * 64, **info) -> Delta:
    old = torch.arange(8.0).view(4, 2)
    patch = SliceValues(
        None, torch.tensor(columns), old[:, : len(columns)], old[:, : len(columns)] + value
    )
    return Delta(
        {"lin.weight": WeightDelta((4, 6), False, "c" * 64, [patch])},
        base={"sha256": base, "model": "m"},
        info=info,
    )


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# The log


def test_versions_stages_and_references(store, tmp_path):
    first = store.save("reviews", small(1.0), note="a first try")
    small(2.0).save(tmp_path / "folder")
    second = store.save("reviews", tmp_path / "folder")
    other = store.save("news", small(3.0), parents=["reviews:1"])
    assert [e.label for e in store.entries()] == ["reviews:1", "reviews:2", "news:1"]
    assert (
        store.find("reviews") == second
        and store.find("reviews:1") == first
        and other.parents == [first.sha256]
    )
    assert (
        store.find(first.sha256[:8]) == first
        and first.note == "a first try"
        and first.nbytes == 64
    )
    store.promote("reviews:1", "production")
    assert store.find("reviews@production").label == "reviews:1"
    store.promote("reviews", "production")
    assert (
        store.find("reviews@production").label == "reviews:2"
        and store.find("reviews:1").stages == []
    )
    store.revoke("reviews:2", "leaked test rows")
    with pytest.raises(
        StoreError, match=r"no delta 'reviews@production'.*reviews:1, reviews:2, news:1"
    ):
        store.find("reviews@production")
    with pytest.raises(StoreError, match="reviews:2 is revoked: leaked test rows"):
        store.promote("reviews", "production")
    assert torch.equal(
        store.load(second).weights["lin.weight"].patches[0].new,
        small(2.0).weights["lin.weight"].patches[0].new,
    )
    assert (tmp_path / "store" / "blobs" / f"{second.sha256}.safetensors").read_bytes() == (
        tmp_path / "folder" / "adapter_model.safetensors"
    ).read_bytes()
    assert store.verify() == []


@pytest.mark.parametrize(
    "name", ["", "../up", "a b", "a@b", "a:1", "deadbeef01", ".hidden"]
)
def test_names_that_would_be_something_else_are_refused(store, name):
    with pytest.raises(StoreError, match="expected letters, digits"):
        store.save(name, small(1.0))
    assert not store.path.exists()


def filled(store) -> list[bytes]:
    for i in range(3):
        store.save("a", small(i))
    store.promote("a:1", "production")
    store.revoke("a:2", "why not")
    return (store.path / "index.jsonl").read_bytes().splitlines(keepends=True)


def test_every_changed_byte_of_the_log_is_found(store):
    """Also in the last line, which no other line is chained to; and what is before stays named."""
    lines = filled(store)
    content = b"".join(lines)
    generator = torch.Generator().manual_seed(0)
    places = set(torch.randint(len(content), (150,), generator=generator).tolist()) | set(
        range(len(content) - 60, len(content))
    )
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        (store.path / "index.jsonl").write_bytes(flipped)
        if place == len(content) - 1:  # the last line break: a truncated line
            assert ["is truncated" in p for p in store.verify()] == [True]
            continue
        with pytest.raises(
            StoreError, match=r"index.jsonl, line \d+ is not as it was written"
        ):
            store.log()
        with pytest.raises(StoreError, match="line"):
            store.save("b", small(9))  # nothing is built on a log that does not hold


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_removed_moved_or_inserted_line_is_found(store, lost):
    lines = filled(store)
    index = store.path / "index.jsonl"
    index.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
    assert f"line {lost + 1} is not" in store.verify()[0]
    index.write_bytes(
        b"".join([*lines[:lost], lines[lost + 1], lines[lost], *lines[lost + 2 :]])
    )
    assert f"line {lost + 1} is not" in store.verify()[0]
    index.write_bytes(b"".join([*lines[: lost + 1], *lines[lost:]]))
    assert f"line {lost + 2} is not" in store.verify()[0]
    index.write_bytes(b"".join(lines))
    assert store.verify() == []


def test_lines_cut_off_the_end_are_found_by_a_noted_head(store):
    lines = filled(store)
    head = store.log().head
    (store.path / "index.jsonl").write_bytes(b"".join(lines[:-1]))  # un-revoked
    assert store.verify() == []  # a chain has no end; that is why a head is noted
    assert "has been cut or replaced" in store.verify(head)[0]
    (store.path / "index.jsonl").write_bytes(
        b"".join(lines[:2])
    )  # a save is gone, its file is there
    assert "named by no event" in store.verify()[0]
    (store.path / "index.jsonl").unlink()
    with pytest.raises(StoreError, match=r"index.jsonl is missing, but there are deltas"):
        store.log()


def test_a_damaged_swapped_or_missing_file_is_found(store):
    one, two = store.save("a", small(1.0)), store.save("b", small(2.0))
    path, content = store.blob(one), store.blob(one).read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    assert (
        "a:1" in store.verify()[0]
        and "the values of lin.weight are not those that were saved" in store.verify()[0]
    )
    path.write_bytes(store.blob(two).read_bytes())
    assert "holds another delta" in store.verify()[0]
    with pytest.raises(StoreError, match="holds another delta"):
        store.load(one)
    path.unlink()
    assert "is missing" in store.verify()[0]
    store.save("a", small(1.0))  # the same delta again: its file is back
    assert store.verify() == []


def test_a_truncated_last_line_is_named_and_mended_by_the_next_write(store):
    lines = filled(store)
    for cut in (1, 40, len(lines[-1]) - 1):
        (store.path / "index.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        assert f"the last line is truncated ({cut} bytes of event 5)" in store.verify()[0]
        assert [e.revoked for e in store.entries()] == [
            None
        ] * 3  # the event that tore did not happen
        store.revoke("a:3", "again")
        assert (
            store.verify() == []
            and store.find("a:3").revoked == "again"
            and store.find("a:2").revoked is None
        )


WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from tests.deltas.test_store import small
from slicefine.deltas.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
for i in range(int(sys.argv[2]), int(sys.argv[2]) + 1000):
    print(store.save("a", small(i)).sha256, flush=True)
"""


def writer(store, start):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path), str(start), str(ROOT)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_two_writers_and_kill_9_lose_nothing(store):
    """Two processes save as fast as they can and are killed in the middle: what they were told is
    saved is there, whole.
    """
    processes = [writer(store, start) for start in (0, 5000)]
    told = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        # on a busy machine one of them may wait long for its turn
        told.append([process.stdout.readline().strip() for _ in range(4)])
    deadline = time.monotonic() + 20
    while (
        sum(1 for _ in store.path.glob("blobs/*.safetensors")) < 40
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process, lines in zip(processes, told, strict=True):
        lines += process.communicate()[0].split()
    assert all(len(lines) > 3 for lines in told)
    entries = store.entries()
    assert {sha for lines in told for sha in lines} <= {e.sha256 for e in entries}
    assert [e.version for e in entries] == list(
        range(1, len(entries) + 1)
    )  # no version twice
    problems = [
        p
        for p in store.verify()
        if "named by no event" not in p and "is truncated" not in p
    ]
    assert problems == []
    store.save("a", small(-1.0))  # goes on, and clears what the dead have left
    assert not list(store.path.glob("blobs/.*")) and not store.log().torn


KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[2])
from tests.deltas.test_store import small
from slicefine.deltas.store import Store
store = Store(sys.argv[1])
for home, name in ((shutil, "copyfile"), (os, "replace"), (os, "fsync"), (os, "write")):
    call, left = getattr(home, name), 0
    while True:  # dies before the first call of that name, before the second, ... until a save lives through
        source = store.path.parent / "incoming.safetensors"
        small(100.0 + left).save(source)
        child = os.fork()
        if child == 0:
            seen = 0
            def dying(*arguments, **options):
                global seen
                if seen == left:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                return call(*arguments, **options)
            setattr(home, name, dying)
            store.save("a", source if name == "copyfile" else small(200.0 + left))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        problems = [p for p in store.verify() if "named by no event" not in p]
        print(name, left, "killed" if os.WIFSIGNALED(status) else "saved", len(store.entries()), problems, flush=True)
        if os.WIFEXITED(status):
            break
        left += 1
"""


def test_a_kill_before_every_call_of_a_save_loses_nothing(store):
    store.save("a", small(1.0))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(store.path), str(ROOT)],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if "saved" in line] == [
        "copyfile",
        "replace",
        "fsync",
        "write",
    ], done.stderr
    assert sum("killed" in line for line in lines) >= 10 and all(
        line.endswith("[]") for line in lines
    ), done.stdout
    entries = store.entries()  # all that lived, and those that died after the event was written, before they could say so
    assert 5 <= len(entries) < 5 + len(lines) and [e.version for e in entries] == list(
        range(1, len(entries) + 1)
    )
    store.save("a", small(3.0))
    assert not list(store.path.glob("blobs/.*"))


# Differences


def test_differences_are_counted_by_entry():
    one, two = small(1.0, (1, 2)), small(1.0, (2, 4))
    (row,) = difference(one, two)
    dense = [torch.full((4, 6), torch.nan) for _ in range(2)]
    for full, delta in zip(dense, (one, two), strict=True):
        patch = delta.weights["lin.weight"].patches[0]
        full[:, patch.cols] = patch.new
    both = ~dense[0].isnan() & ~dense[1].isnan()
    gap = (dense[0] - dense[1])[both].abs()
    assert (
        (row.entries, row.other_entries, row.shared) == (8, 8, int(both.sum())) == (8, 8, 4)
    )
    assert (
        (row.conflicts, row.largest) == (int((gap > 0).sum()), float(gap.max())) == (4, 1.0)
    )
    assert difference(one, one)[0].conflicts == 0
    rows = small(0.0)
    rows.weights = {
        "lin.weight": WeightDelta(
            (4, 6),
            False,
            "",
            [SliceValues(torch.tensor([3]), None, torch.zeros(1, 6), torch.ones(1, 6))],
        )
    }
    assert difference(one, rows)[0].shared == 2  # a row crosses two columns
    only, _ = difference(one, Delta({"x": one.weights["lin.weight"]}))
    assert (only.entries, only.other_entries, only.shared) == (8, 0, 0)


# Signatures


def test_signatures(tmp_path):
    signing = pytest.importorskip("slicefine.deltas.signing")
    small(1.0).save(tmp_path / "d")
    mine, other = (
        signing.new_key(tmp_path / "mine.pem"),
        signing.new_key(tmp_path / "other.pem", "secret"),
    )
    assert (tmp_path / "mine.pem").stat().st_mode & 0o077 == 0
    with pytest.raises(signing.SignatureError, match="is not signed"):
        signing.verify(tmp_path / "d", mine)
    by = signing.sign(tmp_path / "d", tmp_path / "mine.pem")
    assert signing.verify(tmp_path / "d", mine) == by
    with pytest.raises(
        signing.SignatureError, match=rf"no signature .* claim to be of {by}"
    ):
        signing.verify(tmp_path / "d", other)
    with pytest.raises(signing.SignatureError, match="cannot be read as a private key"):
        signing.sign(tmp_path / "d", tmp_path / "other.pem", "wrong")
    signing.sign(tmp_path / "d", tmp_path / "other.pem", "secret")
    signing.sign(tmp_path / "d", tmp_path / "mine.pem")
    assert len(signing.read(tmp_path / "d")) == 2  # one each
    assert (
        signing.verify(tmp_path / "d", other) != signing.verify(tmp_path / "d", mine) == by
    )
    small(2.0).save(
        tmp_path / "d"
    )  # another delta in its place: the signature is of the first
    with pytest.raises(signing.SignatureError, match="no signature"):
        signing.verify(tmp_path / "d", mine)
    with pytest.raises(FileExistsError, match="never written over"):
        signing.new_key(tmp_path / "mine.pem")


def test_an_independent_reader_of_the_signature_agrees(tmp_path):
    """cryptography alone, by the words of docs/deltas.md; and a key in the signature file is no
    reason to trust it.
    """
    signing = pytest.importorskip("slicefine.deltas.signing")
    import base64
    import hashlib

    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    sha = small(1.0).save(tmp_path / "d")
    content = (tmp_path / "d" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(content.replace(sha.encode(), b"0" * 64, 1)).hexdigest() == sha
    public = signing.new_key(tmp_path / "k")
    signing.sign(tmp_path / "d", tmp_path / "k")
    path = tmp_path / "d" / "adapter_model.safetensors.sig"
    (entry,) = json.loads(path.read_text())["signatures"]
    load_pem_public_key(public.read_bytes()).verify(
        base64.b64decode(entry["signature"]),
        f"slicefine delta, version 1, SHA-256 {sha}\n".encode(),
    )
    signing.new_key(tmp_path / "attacker")
    path.unlink()
    signing.sign(tmp_path / "d", tmp_path / "attacker")
    forged = json.loads(path.read_text())
    forged["signatures"][0]["key_id"] = entry["key_id"]
    path.write_text(json.dumps(forged))
    with pytest.raises(signing.SignatureError, match="no signature"):
        signing.verify(tmp_path / "d", public)
    path.write_text("{")
    with pytest.raises(signing.SignatureError, match="is damaged"):
        signing.verify(tmp_path / "d", public)


# Folders


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    from slicefine import atomic

    target = tmp_path / "model"
    with atomic.replacing_folder(target) as fresh:
        (fresh / "a").write_text("1")
    with (
        pytest.raises(RuntimeError, match="half"),
        atomic.replacing_folder(target) as fresh,
    ):
        (fresh / "a").write_text("2")
        raise RuntimeError("half way")
    assert (target / "a").read_text() == "1"
    with atomic.replacing_folder(target) as fresh:
        (fresh / "b").write_text("3")
        assert (target / "a").read_text() == "1"
    assert [p.name for p in target.iterdir()] == ["b"] and [
        p.name for p in tmp_path.iterdir()
    ] == ["model"]
    (tmp_path / "link").symlink_to(target)
    with atomic.replacing_folder(tmp_path / "link") as fresh:
        (fresh / "c").write_text("4")
        (fresh / "c").chmod(0o444)
    assert (tmp_path / "link").is_symlink() and [p.name for p in target.iterdir()] == ["c"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]


def test_a_folder_is_replaced_where_nothing_can_be_exchanged(tmp_path, monkeypatch):
    from slicefine import atomic

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    test_a_folder_is_replaced_whole_or_not_at_all(tmp_path)


SWAPPED = """
import os, signal, sys
from pathlib import Path
from slicefine import atomic
target, exchange = Path(sys.argv[1]) / "model", atomic._exchange
with atomic.replacing_folder(target) as fresh:
    for name in "ab":
        (fresh / name).write_text("old")
for when in ("before", "after"):
    child = os.fork()
    if child == 0:
        def dying(one, other):
            assert when == "before" or exchange(one, other)
            os.kill(os.getpid(), signal.SIGKILL)
        atomic._exchange = dying
        with atomic.replacing_folder(target) as fresh:
            for name in "ab":
                (fresh / name).write_text("new")
    os.waitpid(child, 0)
    print(when, *sorted(p.name + "=" + p.read_text() for p in target.iterdir()))
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="folders are exchanged in one step on Linux"
)
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SWAPPED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.splitlines() == ["before a=old b=old", "after a=new b=new"], (
        done.stderr
    )


def test_a_store_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DeltaError, match="no delta store at .*nowhere"):
        Store(tmp_path / "nowhere").entries()
