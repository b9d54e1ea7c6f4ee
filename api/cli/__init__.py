"""`ramrec …`: the command line. Each command imports heavy modules only when it runs."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from api.cli import data, inspection, jobs, keys, serving, tour, training
from model.errors import RamrecError

app = typer.Typer(
    help="RAMRec: a recommendation service that remembers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.add_typer(serving.memory_app, name="memory")
app.add_typer(keys.app, name="keys")
for command in (
    training.train,
    training.evaluate,
    serving.serve,
    jobs.reembed,
    jobs.recommend,
    jobs.ingest,
    inspection.inspect,
    tour.quickstart,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ramrec {version('ramrec')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `ramrec`: an expected error becomes one line on stderr and exit code 2."""
    try:
        app()
    except RamrecError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit code 2."""
    typer.echo(f"ramrec: {message}", err=True)
    sys.exit(2)
