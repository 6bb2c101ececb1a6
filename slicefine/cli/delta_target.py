"""What the verbs of `slicefine delta` share: their options, and the delta that TARGET names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.deltas.delta import FILE, Delta, DeltaError
from slicefine.deltas.store import Entry, Store
from slicefine.training.data import UserError

StorePath = Annotated[
    Path,
    typer.Option("--store", envvar="SLICEFINE_STORE", help="folder of the delta store"),
]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON")]
Model = Annotated[
    str,
    typer.Option("--model", help="folder, .gguf file or hub id of a Hugging Face model"),
]
Password = Annotated[
    str | None,
    typer.Option(
        envvar="SLICEFINE_KEY_PASSWORD",
        help="of the private key; better in the environment",
    ),
]
STORE = Path("slicefine-store")


class Target:
    """A delta from a path or the store. path: its file; entry: what the store knows of it."""

    def __init__(self, store: Path, target: str) -> None:
        self.store, self.entry = Store(store), None
        # What looks like a path is one; any other name is the store's, or else a folder's here.
        path = Path(target)
        if (
            path.suffix == ".safetensors"
            or "/" in target
            or "\\" in target
            or target.startswith(".")
        ):
            path = local(target)
            self.path = path / FILE if path.is_dir() else path
            self.delta = Delta.load(self.path)
            return
        try:
            self.entry = self.store.find(target)
        except DeltaError:
            if not (path / FILE).is_file():
                raise
            self.path = path / FILE
            self.delta = Delta.load(self.path)
        else:
            self.path, self.delta = self.store.blob(self.entry), self.store.load(self.entry)

    @property
    def label(self) -> str:
        return self.entry.label if self.entry else str(self.path)

    def record(self, event: str, **details: Any) -> None:
        if self.entry is None:
            return
        if self.store.writable():
            return self.store.record(event, self.entry, **details)
        typer.echo(
            f"not recorded: {self.store.path} may only be read here ({event} of {self.label})",
            err=True,
        )


def usable(store: Path, target: str, force: bool) -> Target:
    """A delta that is not revoked. A file outside of the store is looked up in it by its hash."""
    found = Target(store, target)
    entries: list[Entry] = [found.entry] if found.entry else []
    if not entries and found.store.path.is_dir():
        entries = [
            entry for entry in found.store.entries() if entry.sha256 == found.delta.sha256
        ]
    for entry in entries:
        if not force:
            found.store.require_usable(entry)
    return found


def local(target: str) -> Path:
    """A path here, or where a delta of the hub has been downloaded to."""
    from slicefine.deltas.adapters import local_path

    try:
        return local_path(target)
    except OSError as error:
        raise UserError(f"no delta at {target}: {error}") from error


def output_of(output: Path | None, model: str) -> Path:
    if output is not None:
        return output
    if not Path(model).is_dir():
        raise UserError(
            f"--model {model} is no folder here that could be replaced; give --output"
        )
    return Path(model)
