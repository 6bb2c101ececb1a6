"""`slicefine delta`: keep, look at, apply, revert, sign and serve deltas, from a store or from
files.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slicefine.cli import delta_formats, tables
from slicefine.cli.delta_target import (
    STORE,
    AsJson,
    Model,
    Password,
    StorePath,
    Target,
    local,
    output_of,
    usable,
)
from slicefine.deltas.delta import DeltaError
from slicefine.deltas.store import Store
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
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Add a delta to the store; saving a name again makes its next version."""
    entry = Store(store).save(name, local(path), parents=parent, note=note)
    tables.show(asdict(entry), as_json, f"saved {entry.label}, SHA-256 {entry.sha256}")


@app.command("list")
def list_(store: StorePath = STORE, as_json: AsJson = False) -> None:
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
def show(target: str, store: StorePath = STORE, as_json: AsJson = False) -> None:
    """What a delta changes, of which base, and what is recorded of it."""
    found = Target(store, target)
    tables.delta(found.delta, found.entry, found.label, as_json)


@app.command()
def diff(
    target: str, other: str, store: StorePath = STORE, as_json: AsJson = False
) -> None:
    """Where two deltas change the same entries, and where to different values."""
    from slicefine.deltas.difference import difference

    one, two = Target(store, target), Target(store, other)
    rows = difference(one.delta, two.delta)
    same = one.delta.base.get("sha256") == two.delta.base.get("sha256")
    tables.differences(rows, one.label, two.label, same, as_json)


@app.command()
def lineage(target: str, store: StorePath = STORE, as_json: AsJson = False) -> None:
    """A delta, what it was trained on top of or merged from, and so on to the base."""
    from slicefine.deltas.store import parents_of

    found = Target(store, target)
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
    target: str, stage: str, store: StorePath = STORE, as_json: AsJson = False
) -> None:
    """Make a delta the current one of a stage among the versions of its name: name@stage."""
    entry = Store(store).promote(target, stage)
    tables.show(asdict(entry), as_json, f"{entry.name}@{stage} is {entry.label}")


@app.command()
def revoke(
    target: str,
    reason: Annotated[str, typer.Option(help="why")],
    store: StorePath = STORE,
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
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Write a model with the delta's values in it; bit for bit what was trained."""
    from slicefine.cli import folders

    found = usable(store, target, force)
    if public_key is not None:
        from slicefine.deltas import signing

        # the signature of what was loaded, whatever the file is by now
        signing.verify(found.path, public_key, sha256=found.delta.sha256)
    output = output_of(output, model)
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
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Write a model with the values from before the delta; says whether that is the base, bit for
    bit.
    """
    from slicefine.cli import folders

    found = Target(store, target)
    output = output_of(output, model)
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
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Sign a delta: Ed25519, beside its file."""
    from slicefine.deltas import signing

    found = Target(store, target)
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
    store: StorePath = STORE,
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
    found = Target(store, target)
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
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Load the base, apply the delta, evaluate on the recorded rows, and compare with what was
    recorded.
    """
    import torch

    from slicefine.cli import folders
    from slicefine.training import evaluation

    found = Target(store, target)
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


app.command()(delta_formats.export)
app.command("import")(delta_formats.import_)
app.command()(delta_formats.scale)
