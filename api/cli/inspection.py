"""`ramrec inspect`: show what the service remembers about a user."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from api.cli.options import ApiUrlOption


class MemoryScope(StrEnum):
    """Whose memories are used."""

    own = "own"
    collective = "collective"


def inspect(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    url: ApiUrlOption = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="RAMREC_KEY", help="API key with the scopes `admin` and `recommend`.")
    ] = None,
    memories: Annotated[int, typer.Option(min=0, help="Most memories, and most pruned items, to show.")] = 15,
    top_n: Annotated[int, typer.Option(min=1, max=1000, help="Number of items to recommend.")] = 5,
    k: Annotated[int | None, typer.Option(min=1, max=100, help="What if this many own memories were used?")] = None,
    scope: Annotated[
        list[MemoryScope] | None,
        typer.Option(help="What if only the user's own memories, or only those of others, were used?"),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="ITEM", help="What if the user had not taken this item? May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers of the api as one JSON object.")] = False,
) -> None:
    """Show what is remembered about a user, and how memory changes their recommendations. Changes nothing.

    Shows the bank, its entropy, how K was computed, what was pruned and why, and where each recommendation comes from.
    With --k, --scope or --ignore, shows what would be recommended then, and how that differs from now.

    Exit code 1: the user is unknown; the recommendations for a newcomer are shown. 2: the api did not answer, or
    refused.
    """
    from api.commands.inspect.command import WhatIf, look
    from api.commands.inspect.text import plain

    question = WhatIf(top_n, k, tuple(choice.value for choice in scope or ()), tuple(ignore or ()))
    if not look(url, user, question, key=key, rows=memories, raw=as_json):
        typer.echo(f"ramrec: nothing is known about user {plain(user)}", err=True)
        sys.exit(1)
