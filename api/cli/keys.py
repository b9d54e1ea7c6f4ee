"""`ramrec keys`: manage the file of API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Manage API keys: who may call the REST API, and what for.", no_args_is_help=True)
FileOption = Annotated[Path, typer.Option("--file", help="File of API keys; RAMREC_API_KEYS of the api names it.")]


@app.command()
def create(
    file: FileOption,
    name: Annotated[str, typer.Option(help="Name of the key in logs.")],
    scope: Annotated[
        list[str],
        typer.Option(help="What the key allows: recommend, ingest (write), admin (read, delete, configure)."),
    ],
    per_second: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Limit of requests per second.")] = None,
) -> None:
    """Create a key and print it. It cannot be printed again: the file holds only its hash.

    A running api accepts the key within a second.
    """
    from api.access.keys import create_key

    typer.echo(create_key(file, name, tuple(scope), per_second))


@app.command("list")
def list_keys(file: FileOption) -> None:
    """List names, scopes, limits, dates of creation, and the first digits of the hashes of all keys."""
    from api.access.keys import read_keys

    for key in read_keys(file):
        limit = f"{key.per_second}/s" if key.per_second else "no limit"
        typer.echo(f"{key.name}\t{','.join(key.scopes)}\t{limit}\t{key.created}\tsha256 {key.sha256[:8]}…")


@app.command()
def revoke(file: FileOption, name: Annotated[str, typer.Option(help="Name of the key to remove.")]) -> None:
    """Remove a key. A running api refuses it within a second."""
    from api.access.keys import revoke_key

    revoke_key(file, name)
    typer.echo(f"revoked {name}", err=True)
