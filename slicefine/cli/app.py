"""The typer application: one function per verb, each in its file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slicefine.cli import env as env_verb
from slicefine.cli.advise import advise
from slicefine.cli.capacity import capacity
from slicefine.cli.compare import compare
from slicefine.cli.continual import continual
from slicefine.cli.delta import app as delta_verbs
from slicefine.cli.diagnose import diagnose
from slicefine.cli.patch import patch
from slicefine.cli.plan import plan
from slicefine.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune pretrained models by training a moving slice of each weight.",
)
app.command()(train)
app.command()(plan)
app.add_typer(delta_verbs, name="delta")
app.command()(capacity)
app.command()(patch)
app.command()(continual)
app.command()(diagnose)
app.command()(advise)
app.command()(compare)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Say which backends exist here and why the others do not."""
    sys.exit(env_verb.main(["--json"] if as_json else []))
