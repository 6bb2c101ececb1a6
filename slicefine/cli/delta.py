"""`slicefine delta`: keep, look at, apply, revert, sign and serve deltas, from a store or from
files.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slicefine.cli import tables
from slicefine.deltas.delta import FILE, Delta, DeltaError
from slicefine.deltas.store import Entry, Store
from slicefine.training.data import UserError


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # click's to end quietly
            raise
        except (DeltaError, UserError, OSError, ImportError) as error:
            typer.echo(f"slicefine delta: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help=(
        "Keep, look at, apply, revert, sign and serve deltas. TARGET is a name in the store (name,"
        " name:2, name@stage, the start of a SHA-256) or a path."
    ),
)
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
_STORE = Path("slicefine-store")


class _Target:
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
            path = _local(target)
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


# The store


@app.command()
def save(
    name: str,
    path: Annotated[
        str, typer.Argument(help="folder or .safetensors file of a delta, or a hub id")
    ],
    parent: Annotated[
        list[str] | None, typer.Option(help="a delta in the store that this one came of")
    ] = None,
    note: Annotated[str | None, typer.Option(help="free text")] = None,
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Add a delta to the store; saving a name again makes its next version."""
    entry = Store(store).save(name, _local(path), parents=parent, note=note)
    tables.show(asdict(entry), as_json, f"saved {entry.label}, SHA-256 {entry.sha256}")


@app.command("list")
def list_(store: StorePath = _STORE, as_json: AsJson = False) -> None:
    """All deltas of the store, the oldest first."""
    opened = Store(store)
    log, entries = opened.log(), opened.entries()
    if log.torn:
        typer.echo(
            f"{len(log.torn)} bytes of a truncated last line in the log: a writer died; what was"
            " before it is whole",
            err=True,
        )
    if as_json:
        return tables.print_json(
            {"head": log.head, "deltas": [asdict(entry) for entry in entries]}
        )
    tables.entries(entries, log.head)


@app.command()
def show(target: str, store: StorePath = _STORE, as_json: AsJson = False) -> None:
    """What a delta changes, of which base, and what is recorded of it."""
    found = _Target(store, target)
    tables.delta(found.delta, found.entry, found.label, as_json)


@app.command()
def diff(
    target: str, other: str, store: StorePath = _STORE, as_json: AsJson = False
) -> None:
    """Where two deltas change the same entries, and where to different values."""
    from slicefine.deltas.difference import difference

    one, two = _Target(store, target), _Target(store, other)
    rows = difference(one.delta, two.delta)
    same = one.delta.base.get("sha256") == two.delta.base.get("sha256")
    tables.differences(rows, one.label, two.label, same, as_json)


@app.command()
def lineage(target: str, store: StorePath = _STORE, as_json: AsJson = False) -> None:
    """A delta, what it was trained on top of or merged from, and so on to the base."""
    from slicefine.deltas.store import parents_of

    found = _Target(store, target)
    known = (
        {entry.sha256: entry for entry in found.store.entries()}
        if found.store.path.is_dir()
        else {}
    )
    first = found.delta.sha256 or ""
    parents = {first: found.entry.parents if found.entry else parents_of(found.delta)}
    waiting, order = [first], []
    while waiting:
        sha = waiting.pop(0)
        if sha in order:
            continue
        # the nearest first; a delta that several others come of is listed once
        order.append(sha)
        parents.setdefault(sha, known[sha].parents if sha in known else [])
        waiting += parents[sha]
    rows = [
        {
            "delta": sha,
            "label": known[sha].label if sha in known else None,
            "parents": parents[sha],
            "base": found.delta.base.get("sha256"),
        }
        for sha in order
    ]
    tables.lineage(rows, found.label, as_json)


@app.command()
def promote(
    target: str, stage: str, store: StorePath = _STORE, as_json: AsJson = False
) -> None:
    """Make a delta the current one of a stage among the versions of its name: name@stage."""
    entry = Store(store).promote(target, stage)
    tables.show(asdict(entry), as_json, f"{entry.name}@{stage} is {entry.label}")


@app.command()
def revoke(
    target: str,
    reason: Annotated[str, typer.Option(help="why")],
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Mark a delta as not to be used any more; apply, promote and export refuse it."""
    entry = Store(store).revoke(target, reason)
    tables.show(asdict(entry), as_json, f"{entry.label} is revoked: {entry.revoked}")


# Models


@app.command()
def apply(
    target: str,
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            help="folder for the merged model; default: --model itself, replaced in one step"
        ),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(help="only if the owner of this Ed25519 key has signed the delta"),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="hash the whole base; without it, compare only the entries to be replaced"
        ),
    ] = True,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="apply a revoked delta too, and replace another model"
        ),
    ] = False,
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Write a model with the delta's values in it; bit for bit what was trained."""
    from slicefine.cli import folders

    found = _usable(store, target, force)
    if public_key is not None:
        from slicefine.deltas import signing

        # the signature of what was loaded, whatever the file is by now
        signing.verify(found.path, public_key, sha256=found.delta.sha256)
    output = _output(output, model)
    folders.check_output(model, output, force)
    with tables.quiet():
        loaded = folders.load_for(found.delta, model)
        found.delta.apply_to(loaded, verify=verify)
        folders.write(loaded, model, output)
    found.record("apply", model=model, output=str(output), forced=force or None)
    tables.show(
        {"delta": found.delta.sha256, "model": model, "output": str(output)},
        as_json,
        f"applied {found.label}: {output}",
    )


@app.command()
def revert(
    target: str,
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            help="folder for the model; default: --model itself, replaced in one step"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="replace another model in it")
    ] = False,
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Write a model with the values from before the delta; says whether that is the base, bit for
    bit.
    """
    from slicefine.cli import folders

    found = _Target(store, target)
    output = _output(output, model)
    folders.check_output(model, output, force)
    with tables.quiet():
        loaded = folders.load_for(found.delta, model)
        found.delta.revert_from(loaded)
        base = folders.same_base(found.delta, loaded)
        folders.write(loaded, model, output)
    found.record("revert", model=model, output=str(output), base=base)
    what = "bit for bit the base" if base else "not the base: another delta is still in it"
    tables.show(
        {
            "delta": found.delta.sha256,
            "model": model,
            "output": str(output),
            "is_base": base,
        },
        as_json,
        f"reverted {found.label}: {output}, {what}",
    )


@app.command()
def export(
    target: str,
    output: Annotated[Path, typer.Option(help="folder for the LoRA adapter")],
    server: Annotated[
        str, typer.Option(help="peft: a rank per weight; vllm: one legal rank, no heads")
    ] = "peft",
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="truncate beyond it; vllm: 512 at most")
    ] = None,
    leave_out: Annotated[
        bool,
        typer.Option(
            "--leave-out", help="drop heads and biases that the server's LoRA cannot hold"
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="export a revoked delta too")
    ] = False,
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Write a delta as a LoRA adapter of equal outputs; without loss unless a rank is truncated,
    and then says the error.
    """
    from slicefine.deltas.lora import to_lora

    if server not in ("peft", "vllm"):
        raise typer.BadParameter(
            f"{server!r} is not one of peft, vllm", param_hint="--server"
        )
    found = _usable(store, target, force)
    adapter = to_lora(found.delta, server=server, max_rank=max_rank, leave_out=leave_out)
    adapter.save(output)
    found.record("export", output=str(output), server=server, error=adapter.error)
    tables.adapter(adapter, output, as_json)


@app.command()
def scale(
    target: str,
    alpha: Annotated[float, typer.Argument(help="0 is the base, 1 the delta itself")],
    output: Annotated[Path, typer.Option(help="folder for the scaled delta")],
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Write a delta part of the way between the base and a fine-tune."""
    from slicefine.deltas.folder import save_folder

    found = _Target(store, target)
    try:
        scaled = found.delta.scaled(alpha)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="ALPHA") from error
    save_folder(scaled, output, f"{found.label}, {alpha:g} of it")
    tables.show(
        {
            "delta": scaled.sha256,
            "of": found.delta.sha256,
            "alpha": alpha,
            "output": str(output),
        },
        as_json,
        f"{alpha:g} of {found.label}: {output}, SHA-256 {scaled.sha256}",
    )


# Trust


@app.command()
def keygen(
    path: Annotated[
        Path,
        typer.Argument(help="file for the private key; the public one gets .pub behind it"),
    ],
    password: Password = None,
    as_json: AsJson = False,
) -> None:
    """Make a pair of Ed25519 keys."""
    from slicefine.deltas import signing

    public = signing.new_key(path, password)
    tables.show(
        {"private": str(path), "public": str(public)},
        as_json,
        f"private key {path}, public key {public}",
    )


@app.command()
def sign(
    target: str,
    key: Annotated[Path, typer.Option(help="private key in PEM")],
    password: Password = None,
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Sign a delta: Ed25519, beside its file."""
    from slicefine.deltas import signing

    found = _Target(store, target)
    by = signing.sign(found.path, key, password, sha256=found.delta.sha256)
    found.record("sign", key=by)
    content = {
        "delta": found.delta.sha256,
        "key": by,
        "signature": str(signing.signature_path(found.path)),
    }
    tables.show(
        content, as_json, f"signed {found.label} with key {by}: {content['signature']}"
    )


@app.command()
def verify(
    target: Annotated[
        str | None,
        typer.Argument(help="a delta; default: the whole store"),
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="PEM file of a key that you trust")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="also check that this model is the delta's base")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="a head of the log that `list` printed earlier")
    ] = None,
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a delta, its signature and its base; without TARGET the store's log and
    all its files.
    """
    checked: list[str] = []
    try:
        if target is None:
            opened = Store(store)
            if problems := opened.verify(head):
                raise DeltaError("\n".join(problems))
            checked.append(
                f"the log of {store} and every delta in it ({len(opened.entries())})"
            )
            if public_key is not None:
                from slicefine.deltas import signing

                for entry in opened.entries():
                    signing.verify(opened.blob(entry), public_key, sha256=entry.sha256)
                checked.append(f"signatures of key {public_key}")
        else:
            checked += _verify_one(store, target, public_key, model)
    except (DeltaError, UserError) as error:
        tables.show(
            {"ok": False, "problems": str(error).split("\n")}, as_json, f"FAILED: {error}"
        )
        raise typer.Exit(1) from None
    tables.show({"ok": True, "checked": checked}, as_json, "ok: " + "; ".join(checked))


def _verify_one(
    store: Path, target: str, public_key: Path | None, model: str | None
) -> list[str]:
    found = _Target(store, target)
    checked = [f"every byte of {found.label}, SHA-256 {found.delta.sha256}"]
    if found.entry is not None and found.entry.revoked is not None:
        raise DeltaError(f"{found.label} is revoked: {found.entry.revoked}")
    if public_key is not None:
        from slicefine.deltas import signing

        by = signing.verify(found.path, public_key, sha256=found.delta.sha256)
        checked.append(f"signed by key {by}")
    if model is not None:
        from slicefine.cli import folders

        with tables.quiet():
            loaded = folders.load_for(found.delta, model)
        found.delta.check_base(loaded)
        found.delta.check_base(loaded, everything=False)
        checked.append(f"{model} is its base")
    return checked


@app.command()
def audit(
    target: str,
    model: Annotated[
        str | None, typer.Option(help="the base model, if not where it was")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="the evaluation's data, if not where they were")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="allowed difference, as a share of the recorded value"),
    ] = 0.001,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; default: cuda where there is one")
    ] = None,
    store: StorePath = _STORE,
    as_json: AsJson = False,
) -> None:
    """Load the base, apply the delta, evaluate on the recorded rows, and compare with what was
    recorded.
    """
    import torch

    from slicefine.cli import folders
    from slicefine.training import evaluation

    found = _Target(store, target)
    place = torch.device(device) if device else folders.default_device()
    with tables.quiet():
        recorded, value = evaluation.repeat(found.delta, model, data, place)
    # of a recorded 0 no share is anything
    passed = abs(value - recorded.value) <= tolerance * max(abs(recorded.value), 1e-12)
    found.record(
        "audit",
        metric=recorded.metric,
        recorded=recorded.value,
        measured=value,
        passed=passed,
        device=str(place),
    )
    result = {
        "delta": found.delta.sha256,
        "metric": recorded.metric,
        "recorded": recorded.value,
        "measured": value,
        "rows": recorded.rows,
        "data": data or recorded.data,
        "tolerance": tolerance,
        "passed": passed,
    }
    verdict = "passed" if passed else "FAILED"
    tables.show(
        result,
        as_json,
        f"{verdict}: {recorded.metric} {value:.6g}, recorded {recorded.value:.6g}, on"
        f" {recorded.rows:,d} rows of {result['data']}",
    )
    if not passed:
        raise typer.Exit(1)


def _usable(store: Path, target: str, force: bool) -> _Target:
    """A delta that is not revoked. A file outside of the store is looked up in it by its hash."""
    found = _Target(store, target)
    entries: list[Entry] = [found.entry] if found.entry else []
    if not entries and found.store.path.is_dir():
        entries = [
            entry for entry in found.store.entries() if entry.sha256 == found.delta.sha256
        ]
    for entry in entries:
        if not force:
            found.store.require_usable(entry)
    return found


def _local(target: str) -> Path:
    """A path here, or where a delta of the hub has been downloaded to."""
    from slicefine.deltas.adapters import local_path

    try:
        return local_path(target)
    except OSError as error:
        raise UserError(f"no delta at {target}: {error}") from error


def _output(output: Path | None, model: str) -> Path:
    if output is not None:
        return output
    if not Path(model).is_dir():
        raise UserError(
            f"--model {model} is no folder here that could be replaced; give --output"
        )
    return Path(model)
