"""The delta store: a folder with an append-only log of events and the deltas that they speak of,
named by their SHA-256.

``index.jsonl`` holds one JSON object a line, each with its own SHA-256 and that of the line before
it, so a changed, removed or inserted line is found. ``blobs/<sha256>.safetensors`` are delta files.
Writers take a lock; a crash leaves at most a truncated last line (reported) and unreferenced files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slicefine import atomic
from slicefine.deltas.delta import FILE, Delta, DeltaError

INDEX, BLOBS, LOCK = "index.jsonl", "blobs", "lock"
# what the first line is chained to
_NOTHING = "0" * 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HEX = re.compile(r"[0-9a-f]{8,64}")


class StoreError(DeltaError):
    """A store that has been tampered with, or a name that it does not hold."""


@dataclass
class Entry:
    """One saved delta as the log tells it. stages: those it is the current one of. revoked: why, if
    it is.
    """

    name: str
    version: int
    sha256: str
    time: str
    base: str | None
    base_sha256: str | None
    nbytes: int
    parents: list[str] = field(default_factory=list)
    note: str | None = None
    stages: list[str] = field(default_factory=list)
    revoked: str | None = None
    signed_by: list[str] = field(default_factory=list)
    audits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Log:
    """events: all whole lines. torn: a truncated last line, as a crash left it. head: SHA-256 of
    the last whole line.
    """

    events: list[dict[str, Any]]
    torn: bytes
    head: str


class Store:
    """path: the folder; `save` makes it. A reference to a delta is ``name`` (its newest version),
    ``name:2``, ``name@stage`` or
    the first 8 or more digits of its SHA-256."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    # Reading

    def log(self) -> Log:
        """Read the events and check their chain. Raises StoreError naming the first line that is
        not as it was written.
        """
        self._require_folder()
        try:
            content = (self.path / INDEX).read_bytes()
        # a store without a delta yet has no log
        except FileNotFoundError:
            # Else a store whose log was deleted would look like a new one.
            if self.path.is_dir() and any((self.path / BLOBS).glob("*.safetensors")):
                raise StoreError(
                    f"{self.path / INDEX} is missing, but there are deltas in {self.path / BLOBS}"
                ) from None
            content = b""
        # A whole line ends in a newline: behind the last one there is nothing, or a truncated line.
        *lines, torn = content.split(b"\n")
        events, head = [], _NOTHING
        for number, line in enumerate(lines, 1):
            event = _intact(line, number, head)
            if event is None:
                raise StoreError(
                    f"{self.path / INDEX}, line {number} is not as it was written (its hash, or the"
                    " chain of hashes, does not hold). Take a copy of the store that verifies."
                )
            events.append(event)
            head = event["sha256"]
        return Log(events, torn, head)

    def entries(self) -> list[Entry]:
        """All saved deltas, the oldest first."""
        return _replay(self.log().events)

    def find(self, reference: str) -> Entry:
        """The entry that a reference names. Raises StoreError listing what there is."""
        return _find(self.entries(), reference, self.path)

    def blob(self, entry: Entry) -> Path:
        return self.path / BLOBS / f"{entry.sha256}.safetensors"

    def load(self, entry: Entry) -> Delta:
        """Read and check a delta. Raises StoreError if its file is gone, damaged, or another
        delta's.
        """
        path = self.blob(entry)
        if not path.is_file():
            raise StoreError(f"{entry.label}: its file {path} is missing")
        delta = Delta.load(path)
        # A file put there in the place of another is whole, too: its own hash says nothing of that.
        if delta.sha256 != entry.sha256:
            raise StoreError(
                f"{path} holds another delta ({delta.sha256}), not {entry.label}"
            )
        return delta

    def verify(self, head: str | None = None) -> list[str]:
        """Check the log and every file; returns what is wrong, in words, or nothing.

        head: SHA-256 of a line of the log that was noted outside of the store: whole lines cut off
            behind it are found too.
        """
        try:
            log = self.log()
        except StoreError as error:
            return [str(error)]
        problems = []
        if log.torn:
            # somebody may just have been writing; a store that is only read has no lock to take
            with contextlib.suppress(OSError), self._locked() as settled:
                log = settled
        # Nobody else writes while the lock is held, so the rest of the line will never come.
        if log.torn:
            problems.append(_torn_line(self.path, log))
        # the hash of every line: each one is the `previous` of the next
        heads = [event["previous"] for event in log.events] + [log.head]
        if head is not None and head not in heads:
            problems.append(
                f"{self.path / INDEX}: the line with SHA-256 {head} is gone; the log has been cut"
                " or replaced"
            )
        for entry in {entry.sha256: entry for entry in _replay(log.events)}.values():
            try:
                self.load(entry)
            except DeltaError as error:
                problems.append(
                    f"{entry.label}: {error}"
                    if entry.label not in str(error)
                    else str(error)
                )
        named = {entry.sha256 for entry in _replay(log.events)}
        for path in sorted((self.path / BLOBS).glob("*.safetensors")):
            if path.stem not in named:
                problems.append(
                    f"{path} is named by no event: a save that was interrupted, or a log that"
                    " was cut"
                )
        return problems

    # Writing

    def save(
        self,
        name: str,
        delta: Delta | str | os.PathLike[str],
        *,
        parents: list[str] | None = None,
        note: str | None = None,
    ) -> Entry:
        """Add a delta (or the file or folder of one) under a name; saving a name again makes its
        next version.

        parents: references to deltas that this one was made of, beside those that its file names.
            note: free text.
        Raises StoreError for a name with other signs than letters, digits, ``.``, ``_`` and ``-``;
        DeltaError for a damaged file.
        """
        # 8 hex digits or more could mean a name or a hash
        if not _NAME.fullmatch(name) or _HEX.fullmatch(name):
            raise StoreError(
                f"name {name!r}: expected letters, digits, '.', '_' and '-', starting with a letter"
                " or digit, and not a hash"
            )
        source = None if isinstance(delta, Delta) else Path(delta)
        content = delta if isinstance(delta, Delta) else Delta.load(delta)
        (self.path / BLOBS).mkdir(parents=True, exist_ok=True)
        with self._locked() as log:
            earlier = _replay(log.events)
            # Before the file is copied: a reference that is wrong leaves nothing behind.
            ancestors = [
                _find(earlier, parent, self.path).sha256 for parent in parents or ()
            ]
            self._clear_leftovers()
            sha256 = self._put(content, source)
            version = 1 + max((e.version for e in earlier if e.name == name), default=0)
            ancestors += [sha for sha in parents_of(content) if sha not in ancestors]
            self._append(
                log,
                "save",
                sha256,
                name=name,
                version=version,
                nbytes=content.nbytes,
                base=content.base.get("model"),
                base_sha256=content.base.get("sha256"),
                parents=ancestors,
                note=note,
            )
        return self.find(f"{name}:{version}")

    def record(self, event: str, entry: Entry, **details: Any) -> None:
        """Append an event about a delta."""
        with self._locked() as log:
            self._append(log, event, entry.sha256, label=entry.label, **details)

    def writable(self) -> bool:
        """Whether events can be recorded here; others may share a store that only they write to."""
        try:
            with open(self.path / LOCK, "a+b"), open(self.path / INDEX, "ab"):
                return True
        except OSError:
            return False

    def promote(self, reference: str, stage: str) -> Entry:
        """Make a delta the current one of a stage, such as ``production``, among the versions of
        its name.
        """
        entry = self.find(reference)
        if not _NAME.fullmatch(stage):
            raise StoreError(f"stage {stage!r}: expected letters, digits, '.', '_' and '-'")
        self.require_usable(entry)
        self.record("promote", entry, name=entry.name, version=entry.version, stage=stage)
        return self.find(entry.label)

    def revoke(self, reference: str, reason: str) -> Entry:
        """Mark a delta, under all its names, as not to be used; its file stays, so models that hold
        it can be reverted.
        """
        entry = self.find(reference)
        if entry.revoked is None:
            self.record("revoke", entry, reason=reason)
        return self.find(entry.label)

    def require_usable(self, entry: Entry) -> None:
        """Raise StoreError for a revoked delta."""
        if entry.revoked is not None:
            raise StoreError(
                f"{entry.label} is revoked: {entry.revoked}. --force uses it all the same"
            )

    # Inside

    def _put(self, delta: Delta, source: Path | None) -> str:
        """Copy or write a delta's file to the blobs, atomically; a file that is there already and
        whole stays.
        """
        temporary = self.path / BLOBS / ".incoming.safetensors"
        if source is None:
            delta.save(temporary)
        else:
            shutil.copyfile(
                source if source.suffix == ".safetensors" else source / FILE, temporary
            )
        try:
            # what is in the store now, not what was read before the copy
            stored = Delta.load(temporary).sha256
            assert stored is not None
            target = self.path / BLOBS / f"{stored}.safetensors"
            # replacing() syncs the file and its folder: the log must never name what a power cut
            # lost
            with atomic.replacing(target) as fresh:
                os.replace(temporary, fresh)
            return stored
        finally:
            temporary.unlink(missing_ok=True)

    def _clear_leftovers(self) -> None:
        """Half-written files of writers that died, safetensors' own among them; the lock is held,
        so nobody is writing them.
        """
        for path in (self.path / BLOBS).glob(".*"):
            path.unlink(missing_ok=True)

    def _append(self, log: Log, event: str, sha256: str, **details: Any) -> None:
        number, previous = len(log.events) + 1, log.head
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        body = {
            "number": number,
            "time": now,
            "event": event,
            "delta": sha256,
            **details,
            "previous": previous,
        }
        line = (
            _line({key: value for key, value in body.items() if value is not None}) + b"\n"
        )
        path = self.path / INDEX
        # O_BINARY: Windows would write \r\n, and the line would not be as it was hashed
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if log.torn:
                os.ftruncate(handle, os.path.getsize(path) - len(log.torn))
            end = os.lseek(handle, 0, os.SEEK_END)
            # one call: a kill leaves all of it or nothing; a power cut may tear it
            written = os.write(handle, line)
            if written < len(line):
                os.ftruncate(handle, end)
                raise OSError(
                    f"{path}: no room for the event {event!r}; nothing was recorded"
                )
            os.fsync(handle)
        finally:
            os.close(handle)

    @contextmanager
    def _locked(self) -> Iterator[Log]:
        """The log, while nobody else can write. The system lets go of the lock when its holder
        dies.
        """
        self._require_folder()
        with open(self.path / LOCK, "a+b") as file, _exclusive(file.fileno()):
            yield self.log()

    def _require_folder(self) -> None:
        if not self.path.is_dir():
            raise StoreError(f"no delta store at {self.path}; save a delta to make one")


def _line(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}).encode()


def _intact(line: bytes, number: int, previous: str) -> dict[str, Any] | None:
    """The event of a line, or None if it is not the ``number``-th line as written behind the line
    with hash ``previous``.
    """
    try:
        event = json.loads(line)
        body = {key: value for key, value in event.items() if key != "sha256"}
        # The line is made again from what it says, so even another space in it is found.
        whole = _line(body) == line and (event["number"], event["previous"]) == (
            number,
            previous,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return event if whole else None


def parents_of(delta: Delta) -> list[str]:
    """SHA-256 of the deltas that a delta's own file names: those it was trained on top of, and
    those it was merged from.
    """
    # what a file says may be of any form
    lists = [delta.info.get(key) for key in ("parents", "combined")]
    named = [entry for listed in lists if isinstance(listed, list) for entry in listed]
    # unsaved deltas have no hash: they are parents that nobody can look up
    hashes = [entry.get("sha256") for entry in named if isinstance(entry, dict)]
    return [sha256 for sha256 in hashes if isinstance(sha256, str) and sha256]


def _torn_line(path: Path, log: Log) -> str:
    return (
        f"{path / INDEX}: the last line is truncated ({len(log.torn)} bytes of event"
        f" {len(log.events) + 1}): a writer died. The {len(log.events)} events before it are whole;"
        " the next write removes it."
    )


def _replay(events: list[dict[str, Any]]) -> list[Entry]:
    """What the events say, put together."""
    entries: list[Entry] = []
    by_hash: dict[str, list[Entry]] = {}
    stages: dict[tuple[str, str], Entry] = {}
    by_version: dict[tuple[str, int], list[Entry]] = {}
    for event in events:
        kind, same = event["event"], by_hash.setdefault(event["delta"], [])
        if kind == "save":
            entry = _saved(event)
            # the same delta under another name: it shares the two lists
            if same:
                first = same[0]
                entry.revoked, entry.signed_by, entry.audits = (
                    first.revoked,
                    first.signed_by,
                    first.audits,
                )
            entries.append(entry)
            same.append(entry)
            # so that a promotion finds its entry without a look at all of them
            by_version.setdefault((entry.name, entry.version), []).append(entry)
        elif kind == "revoke":
            for entry in same:
                # nobody who asks for name@stage may still get it
                entry.revoked, entry.stages = event["reason"], []
        elif kind == "sign" and same and event["key"] not in same[0].signed_by:
            same[0].signed_by.append(event["key"])
        elif kind == "audit" and same:
            keys = ("time", "metric", "recorded", "measured", "passed")
            same[0].audits.append({key: event[key] for key in keys})
        elif kind == "promote":
            name, stage = event["name"], event["stage"]
            before = stages.get((name, stage))
            if before is not None and stage in before.stages:
                before.stages.remove(stage)
            for entry in by_version.get((name, event["version"]), ()):
                entry.stages.append(stage)
                stages[name, stage] = entry
    return entries


def _saved(event: dict[str, Any]) -> Entry:
    return Entry(
        event["name"],
        event["version"],
        event["delta"],
        event["time"],
        event.get("base"),
        event.get("base_sha256"),
        event["nbytes"],
        event.get("parents", []),
        event.get("note"),
    )


def _find(entries: list[Entry], reference: str, path: Path) -> Entry:
    name, at, stage = reference.partition("@")
    if at:
        found = [e for e in entries if e.name == name and stage in e.stages]
    elif ":" in reference:
        name, _, version = reference.partition(":")
        found = [e for e in entries if e.name == name and str(e.version) == version]
    else:
        found = [e for e in entries if e.name == reference]
        if not found and _HEX.fullmatch(reference):
            found = [e for e in entries if e.sha256.startswith(reference)]
            if len({e.sha256 for e in found}) > 1:
                raise StoreError(
                    f"{reference} is the start of several hashes in {path}; give more digits"
                )
    if not found:
        there = ", ".join(
            e.label + "".join(f" (@{s})" for s in e.stages) for e in entries[-20:]
        )
        raise StoreError(f"no delta {reference!r} in {path}; it holds {there or 'none'}")
    # the log is in the order of time: the newest version
    return found[-1]


@contextmanager
def _exclusive(handle: int) -> Iterator[None]:
    if os.name == "nt":
        import msvcrt

        lock: Any = msvcrt
        while True:
            try:
                # gives up after ten seconds
                lock.locking(handle, lock.LK_LOCK, 1)
                break
            except OSError:
                continue
        try:
            yield
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
            lock.locking(handle, lock.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
